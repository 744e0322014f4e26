use super::*;
use proptest::prelude::*;
use std::path::PathBuf;

const VOCAB: Vocab = Vocab {
    vocab_size: 100,
    bos_id: 0,
    eos_id: 0,
    mask_id: 99,
};

fn recipe(vocab: Vocab) -> Recipe {
    Recipe {
        vocab,
        tokenizer: "{}".into(),
        detokenizer: None,
        no_eos: false,
    }
}

fn written(dir: &Path, documents: &[Vec<u32>], vocab: Vocab) -> PathBuf {
    let target = dir.join("set");
    write_documents(&target, recipe(vocab), documents.iter().map(Vec::as_slice)).unwrap();
    target
}

fn documents(store: &TokenStore) -> Vec<Vec<i64>> {
    let tokens = store.tokens();
    store
        .doc_offsets()
        .windows(2)
        .map(|w| {
            let mut ids = vec![0; (w[1] - w[0]) as usize];
            tokens.copy_to(w[0] as usize, &mut ids);
            ids
        })
        .collect()
}

#[test]
fn wide_and_narrow_round_trip() {
    for vocab_size in [100, 70_000] {
        let dir = tempfile::tempdir().unwrap();
        let vocab = Vocab {
            vocab_size,
            mask_id: vocab_size - 1,
            ..VOCAB
        };
        let target = written(dir.path(), &[vec![1, 2, 3], vec![], vec![98]], vocab);
        let store = TokenStore::open(&target, Verify::Always).unwrap();
        assert_eq!(documents(&store), [vec![1, 2, 3, 0], vec![0], vec![98, 0]]);
        assert_eq!(store.manifest().unwrap().num_bytes, 4);
    }
}

#[test]
fn tokens_that_are_elsewhere_are_read_from_copies() {
    for vocab_size in [100, 70_000] {
        let dir = tempfile::tempdir().unwrap();
        let vocab = Vocab {
            vocab_size,
            ..VOCAB
        };
        let long: Vec<u32> = (0..20_000).map(|i| i * 7 % 99).collect();
        let target = written(dir.path(), &[vec![1, 2, 3], long], vocab);
        let whole = TokenStore::open(&target, Verify::Always).unwrap();
        let bytes = fs::read(target.join(BIN)).unwrap();
        let pieces = whole.manifest().unwrap().pieces.clone().unwrap();
        let each = bytes.chunks(pieces.bytes as usize).map(sha256);
        let digests = fs::read(target.join(DIGESTS)).unwrap();
        let found = digests.chunks(32).map(digest::hex);
        assert_eq!(found.collect::<Vec<_>>(), each.collect::<Vec<_>>());
        assert_eq!(pieces.digests.sha256, sha256(&digests));
        fs::remove_file(target.join(BIN)).unwrap();
        let stop = AtomicBool::new(false);
        let absent = TokenStore::open_absent(&target, Verify::Always, &stop).unwrap();
        assert_eq!(absent.num_tokens(), whole.num_tokens());
        assert_eq!(absent.doc_offsets(), whole.doc_offsets());
        let runs = [4000..4100, 3..10, 3950..4050];
        let mut copies = vec![0; 207];
        let (mut at, mut expected) = (0, Vec::new());
        for run in &runs {
            whole
                .tokens()
                .copy_to(run.start, &mut copies[at..at + run.len()]);
            expected.push(copies[at..at + run.len()].to_vec());
            at += run.len();
        }
        let narrow: Vec<u16> = copies.iter().map(|id| *id as u16).collect();
        let wide: Vec<i32> = copies.iter().map(|id| *id as i32).collect();
        let ids = match vocab_size {
            100 => Tokens::U16(&narrow),
            _ => Tokens::I32(&wide),
        };
        let staged = Staged::new(&absent, &runs, ids).unwrap();
        for (run, ids) in runs.iter().zip(&expected) {
            let mut out = vec![0; run.len()];
            Tokens::Staged(&staged).copy_to(run.start, &mut out);
            assert_eq!(&out, ids);
        }
        assert_eq!(Tokens::Staged(&staged).len(), whole.num_tokens());
        assert!(Staged::new(&absent, &runs[..2], ids).is_err());
        let bad = if vocab_size == 100 { 100 } else { -1 };
        for (bad, name) in [(99, "the mask id 99"), (bad, "vocabulary")] {
            let (one, two) = ([1, bad as u16], [1, bad]);
            let ids = match vocab_size {
                100 => Tokens::U16(&one),
                _ => Tokens::I32(&two),
            };
            let refused = Staged::new(&absent, &[5..6, 9..10], ids).unwrap_err();
            assert!(refused.to_string().contains(name), "{refused}");
        }
    }
}

#[test]
#[should_panic(expected = "not staged")]
fn tokens_without_copies_are_not_read() {
    let store = TokenStore::from_arrays(vec![1; 50], &[50], VOCAB).unwrap();
    let runs = [10..20, 30..31];
    let staged = Staged::new(&store, &runs, Tokens::U16(&[1; 11])).unwrap();
    Tokens::Staged(&staged).copy_to(15, &mut [0; 6]);
}

#[test]
fn nothing_is_left_of_an_unfinished_set() {
    let dir = tempfile::tempdir().unwrap();
    let partial = Partial::create(&dir.path().join("a/set")).unwrap();
    let mut writer = StoreWriter::create(partial.path(), recipe(VOCAB)).unwrap();
    writer.push(&[1], 1).unwrap();
    assert!(matches!(
        writer.push(&[100], 1),
        Err(Error::TokenOutOfRange { id: 100, .. })
    ));
    let mask = writer.push(&[99], 1).unwrap_err().to_string();
    assert!(mask.contains("makes the mask token out of document 1"));
    drop((writer, partial));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn occupied_and_empty_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("x");
    let partial = Partial::create(&target).unwrap();
    assert!(matches!(Partial::create(&target), Err(Error::Busy { .. })));
    let writer = StoreWriter::create(partial.path(), recipe(VOCAB)).unwrap();
    let empty = writer.finish(vec![], None);
    assert!(matches!(empty, Err(Error::EmptyCorpus { .. })));
    partial.commit().unwrap();
    assert!(matches!(
        Partial::create(&target),
        Err(Error::Exists { .. })
    ));
    assert!(matches!(
        TokenStore::open(dir.path(), Verify::Always),
        Err(Error::NotADataset { .. })
    ));
    let missing = TokenStore::open(&dir.path().join("y"), Verify::Always);
    assert!(matches!(missing, Err(Error::Missing { .. })));
}

#[test]
fn an_empty_directory_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("set");
    fs::create_dir(&target).unwrap();
    // A process was killed while it moved its files up.
    fs::create_dir(target.join(".partial")).unwrap();
    fs::write(target.join(".partial/committing"), "").unwrap();
    fs::write(target.join(BIN), "old").unwrap();
    let same = File::open(&target).unwrap();
    written(dir.path(), &[vec![1]], VOCAB);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 4);
    assert!(TokenStore::open(&target, Verify::Always).is_ok());
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let now = fs::metadata(&target).unwrap().ino();
        assert_eq!(same.metadata().unwrap().ino(), now);
    }
    assert!(matches!(
        Partial::create(&target),
        Err(Error::Exists { .. })
    ));
    assert_eq!(fs::read_dir(&target).unwrap().count(), 4);
}

#[test]
fn a_last_document_moves_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = Vec::new();
    let partial = Partial::create(&dir.path().join("set")).unwrap();
    for side in ["train", "valid"] {
        fs::create_dir(partial.path().join(side)).unwrap();
        made.push(StoreWriter::create(&partial.path().join(side), recipe(VOCAB)).unwrap());
    }
    let [train, valid] = made.as_mut_slice() else {
        unreachable!()
    };
    for ids in [[1, 2].as_slice(), &[3], &[4, 5, 6]] {
        train.push(ids, 10 * ids.len() as u64).unwrap();
        train.end_document().unwrap();
    }
    train.move_last(valid).unwrap();
    let manifests: Vec<_> = made
        .into_iter()
        .map(|w| w.finish(vec!["x".into()], None).unwrap())
        .collect();
    partial.commit().unwrap();
    assert_eq!(
        manifests.iter().map(|m| m.num_bytes).collect::<Vec<_>>(),
        [30, 30]
    );
    let open = |side| TokenStore::open(&dir.path().join("set").join(side), Verify::Always).unwrap();
    assert_eq!(documents(&open("train")), [vec![1, 2, 0], vec![3, 0]]);
    assert_eq!(documents(&open("valid")), [vec![4, 5, 6, 0]]);
}

/// A manifest that agrees with itself and the files' bytes, after `change`.
fn reseal(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join(MANIFEST);
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    value["sha256"] = "".into();
    let text = serde_json::to_string_pretty(&value).unwrap() + "\n";
    let digest = sha256(text.as_bytes());
    let at = text.rfind("\"sha256\": \"\"").unwrap() + "\"sha256\": \"".len();
    fs::write(&path, [&text[..at], &digest, &text[at..]].concat()).unwrap();
}

#[test]
fn manifests_that_lie_are_named() {
    type Change = fn(&mut serde_json::Value);
    let lies: [(&str, Change); 14] = [
        ("num_documents", |m| {
            m["num_documents"] = (2u64 + (1 << 62)).into()
        }),
        ("num_documents", |m| m["num_documents"] = 1.into()),
        ("num_tokens", |m| m["num_tokens"] = 1_000_000.into()),
        ("num_tokens", |m| m["num_tokens"] = u64::MAX.into()),
        ("dtype", |m| m["dtype"] = "float64".into()),
        ("num_tokens", |m| m["dtype"] = "int32".into()),
        ("vocab_size", |m| m["vocab_size"] = u32::MAX.into()),
        ("vocab_size", |m| m["vocab_size"] = 0.into()),
        ("vocab_size", |m| m["vocab_size"] = 70_000.into()),
        ("eos_id", |m| m["eos_id"] = 100.into()),
        ("mask_id", |m| m["mask_id"] = u32::MAX.into()),
        ("files", |m| {
            m["files"]["/dev/zero"] = m["files"][BIN].clone()
        }),
        ("files", |m| m["files"]["../x"] = m["files"][BIN].clone()),
        ("chunk_bytes", |m| m["files"][BIN]["chunk_bytes"] = 1.into()),
    ];
    for (field, lie) in lies {
        let dir = tempfile::tempdir().unwrap();
        let target = written(dir.path(), &[vec![1, 2, 3], vec![98]], VOCAB);
        reseal(&target, |_| {});
        assert!(TokenStore::open(&target, Verify::Always).is_ok());
        reseal(&target, lie);
        for verify in [Verify::Always, Verify::Never] {
            let error = TokenStore::open(&target, verify).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{field}: {error}");
            assert!(error.to_string().contains(field), "{field}: {error}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let target = written(dir.path(), &[vec![1, 2, 3]], VOCAB);
    reseal(&target, |m| m["mask_id"] = 2.into());
    let error = TokenStore::open(&target, Verify::Always).unwrap_err();
    assert!(
        error.to_string().contains("it holds the mask id 2"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_refused() {
    for name in [BIN, IDX, TOKENIZER, MANIFEST] {
        let dir = tempfile::tempdir().unwrap();
        let target = written(dir.path(), &[vec![1, 2, 3]], VOCAB);
        let path = target.join(name);
        fs::remove_file(&path).unwrap();
        let place = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: a valid path.
        assert_eq!(unsafe { libc::mkfifo(place.as_ptr(), 0o600) }, 0);
        let error = TokenStore::open(&target, Verify::Never).unwrap_err();
        assert!(
            error.to_string().contains("is not a regular file"),
            "{error}"
        );
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        let error = TokenStore::open(&target, Verify::Never).unwrap_err();
        assert!(
            error.to_string().contains("is not a regular file"),
            "{error}"
        );
    }
}

#[test]
fn unverified_ids_are_counted_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let target = written(dir.path(), &[vec![1, 2, 3]], VOCAB);
    let path = target.join(BIN);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1] = 0xFF;
    fs::write(&path, bytes).unwrap();
    let store = TokenStore::open(&target, Verify::Never).unwrap();
    assert!(matches!(
        store.token_counts(&AtomicBool::new(false)),
        Err(Error::TokenOutOfRange { .. })
    ));
    assert!(store.check_unchanged().is_ok());
    fs::write(&path, [0; 8]).unwrap();
    let changed = store.check_unchanged().unwrap_err().to_string();
    assert!(
        changed.contains("it was written to while it was in use"),
        "{changed}"
    );
}

#[test]
fn ids_beyond_the_vocabulary_are_named() {
    let made = TokenStore::from_arrays(vec![1, 100], &[2], VOCAB);
    assert!(matches!(made, Err(Error::TokenOutOfRange { id: 100, .. })));
    assert!(TokenStore::from_arrays(vec![1, 2], &[3], VOCAB).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_damage_is_noticed(
        documents in proptest::collection::vec(
            proptest::collection::vec(0u32..99, 0..20), 1..6),
        which in 0usize..4,
        at: proptest::sample::Index,
        bit in 0u8..8,
        cut: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let target = written(dir.path(), &documents, VOCAB);
        prop_assert!(TokenStore::open(&target, Verify::Always).is_ok());
        let path = target.join([BIN, IDX, TOKENIZER, MANIFEST][which]);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, bytes).unwrap();
        let opened = TokenStore::open(&target, Verify::Always);
        let named = match opened.unwrap_err() {
            Error::Truncated { .. } => cut && which < 3,
            Error::Corrupt { .. } => !cut || which == 3,
            // A field of the manifest has another name, or a value of another kind.
            Error::NotADataset { .. } => which == 3,
            _ => false,
        };
        prop_assert!(named);
    }

    #[test]
    fn any_lie_is_named_or_harmless(
        field in prop::sample::select(vec![
            "vocab_size", "bos_id", "eos_id", "mask_id", "num_documents", "num_tokens", "num_bytes",
            "files", "dtype", "version", "tokens.bin", "tokens.idx", "tokenizer.json", "source",
        ]),
        part in prop::sample::select(vec!["", "bytes", "chunk_bytes", "sha256"]),
        value in prop_oneof![
            any::<u64>().prop_map(serde_json::Value::from),
            prop::sample::select(vec![0u64, 1, 2, 4, 7, 1 << 31, 1 << 32, 1 << 62, u64::MAX])
                .prop_map(serde_json::Value::from),
            Just(serde_json::json!(-1)),
            Just(serde_json::json!("int32")),
            Just(serde_json::json!("/dev/zero")),
            Just(serde_json::Value::Null),
        ],
        never: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let target = written(dir.path(), &[vec![1, 2, 3], vec![98]], VOCAB);
        reseal(&target, |m| {
            let inside = field.contains('.');
            let place = if inside { &mut m["files"][field] } else { &mut m[field] };
            if inside && !part.is_empty() {
                place[part] = value;
            } else {
                *place = value;
            }
        });
        let verify = if never { Verify::Never } else { Verify::Always };
        if let Ok(store) = TokenStore::open(&target, verify) {
            prop_assert_eq!(store.tokens().len(), 6); // with the EOS of each
            prop_assert_eq!(store.doc_offsets(), &[0, 4, 6]);
            let _ = store.token_counts(&AtomicBool::new(false));
        }
    }
}

/// Shards of a directory, of 3 documents each.
fn shards(dir: &Path, vocab_size: u32) -> Vec<Vec<u32>> {
    let vocab = Vocab {
        vocab_size,
        mask_id: vocab_size - 1,
        ..VOCAB
    };
    let documents: Vec<Vec<u32>> = (0..9u32).map(|i| (0..i * 7 % 20).collect()).collect();
    for (i, three) in documents.chunks(3).enumerate() {
        let target = dir.join(format!("shard-{i}"));
        write_documents(&target, recipe(vocab), three.iter().map(Vec::as_slice)).unwrap();
    }
    documents
}

fn names() -> Vec<String> {
    (0..3).map(|i| format!("shard-{i}")).collect()
}

#[test]
fn shards_are_read_as_one() {
    for vocab_size in [100, 70_000] {
        let dir = tempfile::tempdir().unwrap();
        let made = shards(dir.path(), vocab_size);
        let manifest = join(dir.path(), &names()).unwrap();
        let store = TokenStore::open(dir.path(), Verify::Always).unwrap();
        assert_eq!(store.manifest(), Some(&manifest));
        let expected: Vec<Vec<i64>> = made
            .iter()
            .map(|ids| ids.iter().map(|id| i64::from(*id)).chain([0]).collect())
            .collect();
        assert_eq!(documents(&store), expected);
        let all = expected.concat();
        let tokens = store.tokens();
        assert_eq!(tokens.len(), all.len());
        for start in 0..all.len() {
            for len in [0, 1, 5, all.len() - start] {
                let len = len.min(all.len() - start);
                let mut ids = vec![-1; len];
                tokens.copy_to(start, &mut ids);
                tokens.prefetch(start, len);
                store.will_need(start..start + len);
                assert_eq!(ids, all[start..start + len]);
            }
        }
        let counts = store.token_counts(&AtomicBool::new(false)).unwrap();
        assert_eq!(counts.iter().sum::<u64>(), all.len() as u64);
        assert_eq!(counts[0], all.iter().filter(|id| **id == 0).count() as u64);
        store.check_unchanged().unwrap();
    }
}

#[test]
fn shards_that_do_not_belong_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path(), 100);
    let refused = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        join(dir.path(), &names).unwrap_err().to_string()
    };
    assert!(refused(&[]).contains("at least one"));
    assert!(refused(&["../shard-0"]).contains("a directory inside the data set"));
    assert!(refused(&["shard-0", "shard-7"]).contains("no such file"));
    let other = Recipe {
        no_eos: true,
        ..recipe(VOCAB)
    };
    write_documents(&dir.path().join("other"), other, [&[1u32][..]]).unwrap();
    assert!(refused(&["shard-0", "other"]).contains("must be made with the tokenizer"));
    join(dir.path(), &names()).unwrap();
    assert!(matches!(
        join(dir.path(), &names()),
        Err(Error::Exists { .. })
    ));
    // Another data set in place of a shard.
    fs::remove_dir_all(dir.path().join("shard-1")).unwrap();
    fs::rename(dir.path().join("shard-2"), dir.path().join("shard-1")).unwrap();
    let error = TokenStore::open(dir.path(), Verify::Always).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("its shard shard-1 is not the one"),
        "{error}"
    );
}

fn with_prompts(dir: &Path, name: &str, prompts: &[u32]) -> Manifest {
    let partial = Partial::create(&dir.join(name)).unwrap();
    let mut writer = StoreWriter::create(partial.path(), recipe(VOCAB)).unwrap();
    for prompt in prompts {
        if *prompt > 0 {
            writer.push_prompt(&vec![7; *prompt as usize]).unwrap();
        }
        writer.push(&[8, 9], 5).unwrap();
        writer.end_document().unwrap();
    }
    let manifest = writer.finish(vec!["x".into()], None).unwrap();
    partial.commit().unwrap();
    manifest
}

#[test]
fn prompts_round_trip_and_join() {
    let dir = tempfile::tempdir().unwrap();
    let made = with_prompts(dir.path(), "a", &[2, 0, 1]);
    assert_eq!((made.num_tokens, made.num_prompt_tokens), (12, 3));
    assert_eq!(made.num_bytes, 15, "without the prompts");
    assert!(
        !with_prompts(dir.path(), "b", &[0])
            .files
            .contains_key(PROMPTS)
    );
    with_prompts(dir.path(), "c", &[4]);
    join(dir.path(), &["a".into(), "b".into(), "c".into()]).unwrap();
    let store = TokenStore::open(dir.path(), Verify::Always).unwrap();
    assert_eq!(store.prompts(), [2, 0, 1, 0, 4]);
    assert_eq!(store.manifest().unwrap().num_prompt_tokens, 7);
    let file = dir.path().join("a").join(PROMPTS);
    fs::write(&file, [0; 12]).unwrap();
    let changed = TokenStore::open(dir.path(), Verify::Always).unwrap_err();
    assert!(changed.to_string().contains("SHA-256"), "{changed}");
    let changed = TokenStore::open(dir.path(), Verify::Never).unwrap_err();
    assert!(changed.to_string().contains("not those of the documents"));
}

#[test]
fn a_document_with_a_prompt_moves_whole_and_is_never_cut() {
    let dir = tempfile::tempdir().unwrap();
    let [mut train, mut valid] = ["train", "valid"].map(|side| {
        fs::create_dir(dir.path().join(side)).unwrap();
        StoreWriter::create(&dir.path().join(side), recipe(VOCAB)).unwrap()
    });
    for prompt in [3, 2] {
        train.push_prompt(&vec![7; prompt]).unwrap();
        train.push(&[8, 9], 5).unwrap();
        train.end_document().unwrap();
    }
    train.move_last(&mut valid).unwrap();
    assert!(!train.split_only(0.5, &mut valid).unwrap());
    for (writer, side, prompt) in [(train, "train", 3), (valid, "valid", 2)] {
        writer.finish(vec!["x".into()], None).unwrap();
        let store = TokenStore::open(&dir.path().join(side), Verify::Always).unwrap();
        assert_eq!(store.prompts(), [prompt]);
    }
}
