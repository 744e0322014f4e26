use std::io::Write;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::error::Error;

fn read_with(path: &Path, options: &ReadOptions) -> Result<(Vec<String>, Records)> {
    let mut documents = vec![String::new()];
    let mut reader = Reader::new(options);
    for input in expand(&[path.to_path_buf()], options)? {
        reader.read(&input, &mut |piece| {
            documents.last_mut().unwrap().push_str(piece.text);
            if piece.last {
                documents.push(String::new());
            }
            Ok(())
        })?;
    }
    assert_eq!(documents.pop().unwrap(), "", "the last document ends");
    Ok((documents, reader.records().clone()))
}

fn collect(path: &Path, options: &ReadOptions) -> Result<Vec<String>> {
    read_with(path, options).map(|(documents, _)| documents)
}

/// Documents and records of a file of that name and content.
fn content(name: &str, bytes: &[u8]) -> (Vec<String>, Records) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    read_with(&path, &ReadOptions::default()).unwrap()
}

fn compress(kind: &str, bytes: &[u8]) -> Vec<u8> {
    match kind {
        ".gz" => {
            let mut w = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            w.write_all(bytes).unwrap();
            w.finish().unwrap()
        }
        ".xz" => {
            let mut w = liblzma::write::XzEncoder::new(Vec::new(), 1);
            w.write_all(bytes).unwrap();
            w.finish().unwrap()
        }
        ".zst" => zstd::encode_all(bytes, 1).unwrap(),
        _ => bytes.to_vec(),
    }
}

#[test]
fn every_kind_and_compression() {
    let dir = tempfile::tempdir().unwrap();
    let json = b"{\"text\": \"one\\ntwo\", \"split\": \"a\"}\n\n{\"text\": \"\xc3\xa9\", \"split\": \"b\"}\r\n";
    for kind in ["", ".gz", ".xz", ".zst"] {
        for name in ["x.jsonl", "x.ndjson", "x.json"] {
            let path = dir.path().join(format!("{name}{kind}"));
            std::fs::write(&path, compress(kind, json)).unwrap();
            let options = ReadOptions::default();
            assert_eq!(collect(&path, &options).unwrap(), ["one\ntwo", "é"]);
            let only = ReadOptions {
                filter: Some(("split".into(), "b".into())),
                ..Default::default()
            };
            assert_eq!(collect(&path, &only).unwrap(), ["é"]);
        }
        let path = dir.path().join(format!("x.txt{kind}"));
        std::fs::write(&path, compress(kind, b"a b\n\nc")).unwrap();
        assert_eq!(
            collect(&path, &ReadOptions::default()).unwrap(),
            ["a b\n\nc"]
        );
        let lines = ReadOptions {
            lines: true,
            ..Default::default()
        };
        assert_eq!(collect(&path, &lines).unwrap(), ["a b", "c"]);
        // The first bytes tell where no name does.
        let path = dir.path().join("nameless");
        std::fs::write(&path, compress(kind, json)).unwrap();
        assert_eq!(
            collect(&path, &ReadOptions::default()).unwrap(),
            ["one\ntwo", "é"]
        );
        std::fs::write(&path, compress(kind, b"{plain}")).unwrap();
        assert_eq!(
            collect(&path, &ReadOptions::default()).unwrap(),
            ["{plain}"]
        );
    }
}

#[test]
fn byte_order_marks() {
    let text = "née\n日本";
    let utf16 = |little: bool| -> Vec<u8> {
        let unit = |u: u16| {
            if little {
                u.to_le_bytes()
            } else {
                u.to_be_bytes()
            }
        };
        [0xFEFF]
            .into_iter()
            .chain(text.encode_utf16())
            .flat_map(unit)
            .collect()
    };
    for bytes in [
        [b"\xef\xbb\xbf", text.as_bytes()].concat(),
        utf16(true),
        utf16(false),
    ] {
        for kind in ["", ".gz"] {
            let (documents, _) = content(&format!("x.txt{kind}"), &compress(kind, &bytes));
            assert_eq!(documents, [text]);
        }
    }
    let (documents, _) = content(
        "x.jsonl",
        b"\xef\xbb\xbf{\"text\": \"a\"}\n{\"text\": \"b\"}",
    );
    assert_eq!(documents, ["a", "b"]);
    assert_eq!(
        content("x.txt", b"a\xef\xbb\xbfb").0,
        ["a\u{feff}b"],
        "only at the start"
    );
}

#[test]
fn stories_between_separators() {
    let text = b"one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\n\n<|endoftext|>three<|endoftext|>\n";
    let (documents, records) = content("x.txt", text);
    assert_eq!(documents, ["one", "two", "three"]);
    assert_eq!(records.read, 3);
    let many = "story\n<|endoftext|>\n".repeat(100_000);
    assert_eq!(content("x.txt", many.as_bytes()).0.len(), 100_000);
    assert_eq!(
        content("x.txt", b" a\n\nb\n").0,
        [" a\n\nb\n"],
        "nothing else is touched"
    );
}

#[test]
fn a_document_longer_than_a_part_is_whole() {
    for unit in ["a word ", "日本語"] {
        let text = unit.repeat((MAX_DOCUMENT + (4 << 20)) / unit.len());
        let (documents, records) = content("x.txt", text.as_bytes());
        assert_eq!(documents.len(), 1);
        assert!(documents[0] == text);
        assert_eq!((records.read, records.long), (1, 1));
    }
}

#[test]
fn arrays_and_objects_of_several_lines() {
    let one = r#"{"text": "a ] } \" [", "n": [1, {"m": "]"}]}"#;
    for json in [
        format!("[{one}, {one}]"),
        format!("\n[\n  {one},\n  {one}\n]\n"),
        format!("{}\n{}", one.replace(", ", ",\n"), one.replace(", ", ",\n")),
        format!("{one}{one}"),
    ] {
        assert_eq!(
            content("x.json", json.as_bytes()).0,
            ["a ] } \" ["; 2],
            "{json}"
        );
    }
    let (documents, records) = content(
        "x.json",
        b"[{\"text\": \"a\"}, 3, \"x, y\", null, [1], {\"text\": \"b\"}]",
    );
    assert_eq!(documents, ["a", "b"]);
    assert_eq!((records.read, records.bad), (6, 4));
}

#[test]
fn one_bad_record_costs_one_record() {
    let lines = [
        r#"{"text": "a"}"#,
        r#"{"text": null}"#,
        r#"{"text": "half \ud83d of a pair, \ud83d\ude00 whole"}"#,
        r#"{"text": "b", "score": NaN, "more": [-Infinity, Infinity], "s": "NaN"}"#,
        r#"{"text": 3}"#,
        r#"{"text": "cut"#,
        r#"{"body": "x"}"#,
        r#"{"text": ""}"#,
        r#"{"text": "c"}"#,
    ];
    let mut bytes = lines.join("\n").into_bytes();
    bytes.extend_from_slice(b"\n{\"text\": \"\xff\"}\n");
    let (documents, records) = content("x.jsonl", &bytes);
    assert_eq!(
        documents,
        ["a", "half \u{fffd} of a pair, 😀 whole", "b", "c"]
    );
    let first = records.first_bad.as_deref().unwrap();
    assert!(
        first.ends_with("record 5: its field text is not a string"),
        "{first}"
    );
    let counts = (
        records.read,
        records.null,
        records.bad,
        records.empty,
        records.repaired,
    );
    assert_eq!(counts, (10, 1, 4, 1, 1));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.jsonl");
    std::fs::write(&path, bytes).unwrap();
    let strict = ReadOptions {
        strict: true,
        ..Default::default()
    };
    let refused = collect(&path, &strict).unwrap_err().to_string();
    assert!(refused.contains("record 5"), "{refused}");
}

#[test]
fn what_follows_a_gzip_member() {
    let member = |text: &[u8]| compress(".gz", text);
    let read = |bytes: &[u8]| content("x.txt.gz", bytes).0.concat();
    assert_eq!(
        read(&[member(b"a"), member(b"b"), member(b"c")].concat()),
        "abc"
    );
    assert_eq!(read(&[member(b"a"), vec![0; 1000]].concat()), "a");
    assert_eq!(read(&[member(b"a"), b"garbage".to_vec()].concat()), "a");
    assert_eq!(read(&[member(b"a"), vec![0x1F]].concat()), "a");
    let many: Vec<u8> = (0..20_000).flat_map(|_| member(b"x")).collect();
    assert_eq!(read(&many).len(), 20_000);
}

#[test]
fn folders_are_walked_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    };
    for name in [
        "b.txt",
        "a/2.txt",
        "a/10.txt",
        "c.md",
        ".hidden.txt",
        "nameless",
    ] {
        put(name);
    }
    #[cfg(unix)]
    std::os::unix::fs::symlink(dir.path(), dir.path().join("a/loop")).unwrap();
    let options = ReadOptions::default();
    assert_eq!(
        collect(dir.path(), &options).unwrap(),
        ["a/10.txt", "a/2.txt", "b.txt"]
    );
    let all = ReadOptions {
        format: Some(Format::Text),
        ..Default::default()
    };
    assert_eq!(collect(dir.path(), &all).unwrap().len(), 5);
    let empty = tempfile::tempdir().unwrap();
    let refused = collect(empty.path(), &options).unwrap_err().to_string();
    assert!(
        refused.contains("the folder holds no text file"),
        "{refused}"
    );
}

#[test]
fn each_cause_has_its_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        collect(&path, &ReadOptions::default())
            .unwrap_err()
            .to_string()
    };
    assert!(put("a.jsonl", b"{}\n").contains("record 1: it has no field text"));
    assert!(put("a.jsonl", b"{\n").contains("record 1: not valid JSON"));
    assert!(put("a.jsonl", b"[1]\n").contains("not a JSON object"));
    assert!(put("a.jsonl", b"{\"text\": 1}\n").contains("not a string"));
    assert!(put("a.txt", b"ab\xff").contains("not valid UTF-8 (byte 2"));
    assert!(put("a.csv", b"x").contains("must be .txt"));
    assert!(put("a.parquet", b"nonsense").contains("not a readable parquet"));
    assert!(put("a.txt.gz", b"nonsense").contains("cannot be decompressed"));
    let whole = compress(".xz", &[b'a'; 5000]);
    assert!(put("a.txt.xz", &whole[..whole.len() / 2]).contains("cannot be decompressed"));
    let missing = collect(&dir.path().join("none.txt"), &ReadOptions::default());
    assert!(matches!(missing, Err(Error::Missing { .. })));
    let hopeless = "{\"text\": 1}\n".repeat(2000) + "{\"text\": \"late\"}\n";
    assert!(put("a.jsonl", hopeless.as_bytes()).contains("record 1: its field"));
}

#[test]
fn rows_of_several_files() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["a", "b"] {
        let lines: String = (0..5)
            .map(|i| format!("{{\"text\": \"{file}{i}\"}}\n"))
            .collect();
        std::fs::write(dir.path().join(file.to_owned() + ".jsonl"), lines).unwrap();
    }
    let options = ReadOptions {
        rows: Some((3, 7)),
        ..Default::default()
    };
    let (documents, records) = read_with(dir.path(), &options).unwrap();
    assert_eq!(documents, ["a3", "a4", "b0", "b1"]);
    assert_eq!(records.read, 4);
}

/// Bytes that resemble the readers' formats, and any others.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let parts = [
        "{",
        "}",
        "[",
        "]",
        "\"",
        "\\",
        ",",
        ":",
        "\n",
        "\r\n",
        " ",
        "null",
        "NaN",
        "1e999",
        "-",
        "\"text\"",
        "\"text\": \"a b\"",
        "{\"text\": \"x\"}",
        "\\ud83d",
        "\\udc00",
        "\\u00",
        "é",
        "\u{feff}",
        "<|endoftext|>",
        "<|endof",
    ];
    let part = prop_oneof![
        8 => proptest::sample::select(parts.map(|p| p.as_bytes().to_vec()).to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..6),
    ];
    proptest::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_bytes_are_read_or_refused(bytes in bytes(), kind in 0usize..6, lines: bool) {
        let dir = tempfile::tempdir().unwrap();
        let name = ["x.txt", "x.jsonl", "x.json", "x", "x.jsonl.gz", "x.parquet"][kind];
        let path = dir.path().join(name);
        let content = if kind == 4 { compress(".gz", &bytes) } else { bytes };
        std::fs::write(&path, content).unwrap();
        let options = ReadOptions { lines, ..Default::default() };
        if let Ok((documents, records)) = read_with(&path, &options) {
            prop_assert!(documents.iter().all(|d| !d.is_empty()));
            let left_out = records.filtered + records.empty + records.null + records.bad;
            prop_assert_eq!(records.read, documents.len() as u64 + left_out);
        }
    }

    #[test]
    fn texts_survive_json(texts in proptest::collection::vec(any::<String>(), 1..6), pretty: bool) {
        let records: Vec<_> = texts.iter().map(|t| serde_json::json!({"n": 1, "text": t})).collect();
        let array = if pretty {
            serde_json::to_string_pretty(&records)
        } else {
            serde_json::to_string(&records)
        };
        let lines: Vec<_> = records.iter().map(ToString::to_string).collect();
        let kept: Vec<_> = texts.iter().filter(|t| !t.is_empty()).cloned().collect();
        prop_assert_eq!(content("x.json", array.unwrap().as_bytes()).0, kept.clone());
        prop_assert_eq!(content("x.jsonl", lines.join("\n").as_bytes()).0, kept);
    }

    #[test]
    fn stories_survive_their_separators(texts in proptest::collection::vec("[a-z \u{e9}]{1,9}", 1..6)) {
        let joined = texts.join("\n<|endoftext|>\n");
        let kept: Vec<_> = texts.iter().filter(|t| !t.trim_ascii().is_empty()).cloned().collect();
        let (documents, _) = content("x.txt", joined.as_bytes());
        if texts.len() > 1 {
            prop_assert_eq!(documents, kept);
        }
    }
}
