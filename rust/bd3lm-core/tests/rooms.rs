//! Imports between the rooms of the crate point one way.

use std::fs;
use std::path::Path;

/// A room, and the rooms that it may import from.
const ROOMS: [(&str, &[&str]); 6] = [
    ("error", &[]),
    ("cpu", &["error"]),
    ("random", &["cpu"]),
    ("noise", &["random", "cpu", "error"]),
    ("data", &["noise", "random", "cpu", "error"]),
    ("kernels", &["random", "cpu", "error"]),
];

fn sources(path: &Path, each: &mut impl FnMut(&Path, &str)) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            sources(&entry.unwrap().path(), each);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        each(path, &fs::read_to_string(path).unwrap());
    }
}

#[test]
fn imports_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for (room, below) in ROOMS {
        let folder = src.join(room);
        let path = match folder.is_dir() {
            true => folder,
            false => src.join(format!("{room}.rs")),
        };
        sources(&path, &mut |file, text| {
            for (line, code) in text.lines().enumerate() {
                for rest in code.split("crate::").skip(1) {
                    let of = rest
                        .split(|c: char| !c.is_alphanumeric() && c != '_')
                        .next();
                    let of = match of.unwrap_or_default() {
                        "" | "Error" | "Result" => "error",
                        other => other,
                    };
                    seen += 1;
                    assert!(
                        of == room || below.contains(&of),
                        "{}:{}: {room} imports {of}",
                        file.display(),
                        line + 1
                    );
                }
            }
        });
    }
    assert!(seen > 50, "no imports were found");
    let listed = fs::read_dir(&src).unwrap().count() - 1; // lib.rs is no room
    assert_eq!(listed, ROOMS.len(), "a room is missing from this test");
}
