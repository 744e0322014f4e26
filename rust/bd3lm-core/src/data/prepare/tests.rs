use super::*;
use crate::data::store::{BIN, TokenStore, Verify};
use crate::data::text::{Chat, Exchange};
use crate::data::tokenize::tests::{VOCAB, definition};

fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_json(&definition(), VOCAB).unwrap())
}

fn made(text: &str, lines: bool, threads: usize, held_out: Option<f64>) -> Result<Vec<Vec<u8>>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.txt");
    std::fs::write(&path, text).unwrap();
    let options = ReadOptions {
        lines,
        ..Default::default()
    };
    let target = dir.path().join("out");
    let tokenizer = tokenizer();
    let paths = [path];
    let manifests = prepare(
        &paths,
        &options,
        held_out,
        &tokenizer,
        &target,
        threads,
        &mut |_| true,
    )?;
    let sides = held_out.map_or(vec![target.clone()], |_| {
        SIDES.iter().map(|side| target.join(side)).collect()
    });
    assert_eq!(manifests.unwrap().len(), sides.len());
    let bytes = |side: &PathBuf| {
        let store = TokenStore::open(side, Verify::Always).unwrap();
        assert!(store.manifest().unwrap().num_bytes > 0);
        std::fs::read(side.join(BIN)).unwrap()
    };
    Ok(sides.iter().map(bytes).collect())
}

fn lines(count: usize) -> String {
    (0..count)
        .map(|i| format!("the thing {i} in the end\n"))
        .collect()
}

#[test]
fn threads_do_not_change_the_result() {
    let text = lines(3000);
    assert_eq!(
        made(&text, true, 1, None).unwrap(),
        made(&text, true, 3, None).unwrap()
    );
    let one = made(&text, false, 1, Some(0.1)).unwrap();
    assert_eq!(one, made(&text, false, 3, Some(0.1)).unwrap());
}

#[test]
fn held_out_documents_are_the_others() {
    let text = lines(3000);
    let all = made(&text, true, 2, None).unwrap()[0].len();
    let sides = made(&text, true, 2, Some(0.1)).unwrap();
    assert_eq!(all, sides[0].len() + sides[1].len());
    let share = sides[1].len() as f64 / all as f64;
    assert!((share - 0.1).abs() < 0.03, "{share}");
}

#[test]
fn a_few_documents_give_the_last_one() {
    for count in [2, 3, 14] {
        let sides = made(&lines(count), true, 2, Some(1e-9)).unwrap();
        let all = made(&lines(count), true, 2, None).unwrap().remove(0);
        let last = made(lines(count).lines().last().unwrap(), true, 1, None).unwrap();
        assert_eq!(sides[1], last[0]);
        assert_eq!(sides.concat(), all);
        // A share of nearly everything leaves the first.
        assert!(!made(&lines(count), true, 2, Some(0.999_999)).unwrap()[0].is_empty());
    }
}

#[test]
fn a_lone_document_gives_its_tail() {
    let eos = 2; // bytes of an EOS
    for (text, shares) in [
        (lines(80), [0.02, 0.1, 0.5, 0.9]),
        // No space to cut at: the library's offsets.
        ("日本語の文章と中文句子".repeat(40), [0.02, 0.1, 0.5, 0.9]),
        ("a".repeat(2000), [0.02, 0.1, 0.5, 0.9]),
    ] {
        let whole = made(&text, false, 1, None).unwrap().remove(0);
        for share in shares {
            let sides = made(&text, false, 2, Some(share)).unwrap();
            let body = &sides[0][..sides[0].len() - eos];
            assert_eq!([body, &sides[1]].concat(), whole, "{share}");
            let got = sides[1].len() as f64 / whole.len() as f64;
            assert!((got - share).abs() < 0.05, "{share}: {got}");
        }
    }
    let refused = made("x", false, 1, Some(0.1)).unwrap_err().to_string();
    assert!(
        refused.contains("validation would hold 0 of 1 documents"),
        "{refused}"
    );
}

#[test]
fn bytes_of_a_divided_document_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let text = "naïve text in the house ".repeat(5000);
    let path = dir.path().join("x.txt");
    std::fs::write(&path, &text).unwrap();
    let target = dir.path().join("out");
    let options = ReadOptions::default();
    let made = prepare(
        &[path],
        &options,
        Some(0.25),
        &tokenizer(),
        &target,
        2,
        &mut |_| true,
    );
    let manifests = made.unwrap().unwrap();
    assert_eq!(
        manifests.iter().map(|m| m.num_bytes).sum::<u64>(),
        text.len() as u64
    );
    let share = manifests[1].num_bytes as f64 / text.len() as f64;
    assert!((share - 0.25).abs() < 0.01, "{share}");
}

#[test]
fn stopping_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.txt");
    std::fs::write(&path, "some text").unwrap();
    let target = dir.path().join("a/b/out");
    let options = ReadOptions::default();
    let stopped = prepare(
        &[path],
        &options,
        None,
        &tokenizer(),
        &target,
        1,
        &mut |_| false,
    );
    assert!(stopped.unwrap().is_none());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn a_pipe_without_a_writer_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.txt");
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a valid path.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let options = ReadOptions::default();
    let target = dir.path().join("out");
    let start = std::time::Instant::now();
    let mut calls = 0;
    let stopped = prepare(
        &[path],
        &options,
        None,
        &tokenizer(),
        &target,
        1,
        &mut |_| {
            calls += 1;
            calls < 3
        },
    );
    assert!(stopped.unwrap().is_none());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(!target.exists());
}

#[test]
fn responses_of_one_chat_are_on_one_side() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.jsonl");
    let records: String = (0..200).map(|i| format!("{{\"text\": [{i}]}}\n")).collect();
    std::fs::write(&path, records + "{\"text\": [\"bad\"]}\n").unwrap();
    // Three responses a record, whose number is the letters of each.
    let render = |record: &str| {
        let digits: String = record.chars().filter(char::is_ascii_digit).collect();
        let number: usize = digits.parse().map_err(|_| "no number".to_owned())?;
        let letters = "a".repeat(number + 1);
        let exchange = |response: &str| Exchange {
            prompt: letters.clone(),
            response: response.into(),
        };
        Ok(["in", "the", "end"].map(exchange).to_vec())
    };
    let options = ReadOptions {
        chat: Some(Chat(Arc::new(render))),
        ..Default::default()
    };
    let out = dir.path().join("out");
    let manifests = prepare(
        &[path],
        &options,
        Some(0.2),
        &tokenizer(),
        &out,
        2,
        &mut |_| true,
    );
    let [train, valid] = manifests.unwrap().unwrap().try_into().unwrap();
    assert_eq!(train.num_documents + valid.num_documents, 600);
    assert!(train.num_documents % 3 == 0 && valid.num_documents > 60);
    let records = train.records.unwrap();
    assert_eq!((records.read, records.bad), (201, 1));
    assert!(records.first_bad.unwrap().contains("record 201: no number"));
    for side in SIDES {
        let store = TokenStore::open(&out.join(side), Verify::Always).unwrap();
        for three in store.prompts().chunks(3) {
            assert!(three[0] > 0 && three.iter().all(|n| *n == three[0]));
        }
    }
}
