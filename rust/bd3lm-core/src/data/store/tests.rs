use super::*;
use proptest::prelude::*;
use std::path::PathBuf;

const VOCAB: Vocab = Vocab {
    vocab_size: 100,
    bos_id: 0,
    eos_id: 0,
    mask_id: 99,
};

fn written(dir: &Path, documents: &[Vec<u32>], vocab: Vocab) -> PathBuf {
    let target = dir.join("set");
    let mut writer = StoreWriter::create(&target, vocab, "{}").unwrap();
    for document in documents {
        writer.push(document).unwrap();
        writer.end_document(document.len() as u64).unwrap();
    }
    writer.finish(vec!["test".into()]).unwrap();
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
        let store = TokenStore::open(&target, true).unwrap();
        assert_eq!(documents(&store), [vec![1, 2, 3, 0], vec![0], vec![98, 0]]);
        assert_eq!(store.manifest().unwrap().num_bytes, 4);
    }
}

#[test]
fn nothing_is_left_of_an_unfinished_set() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("set");
    let mut writer = StoreWriter::create(&target, VOCAB, "{}").unwrap();
    writer.push(&[1]).unwrap();
    assert!(matches!(
        writer.push(&[100]),
        Err(Error::TokenOutOfRange { id: 100, .. })
    ));
    assert!(
        writer
            .push(&[99])
            .unwrap_err()
            .to_string()
            .contains("mask token")
    );
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn occupied_and_empty_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let made = StoreWriter::create(dir.path(), VOCAB, "{}");
    assert!(matches!(made, Err(Error::Exists { .. })));
    let writer = StoreWriter::create(&dir.path().join("x"), VOCAB, "{}").unwrap();
    assert!(matches!(
        writer.finish(vec![]),
        Err(Error::EmptyCorpus { .. })
    ));
    assert!(matches!(
        TokenStore::open(dir.path(), true),
        Err(Error::NotADataset { .. })
    ));
    let missing = TokenStore::open(&dir.path().join("y"), true);
    assert!(matches!(missing, Err(Error::Missing { .. })));
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
        prop_assert!(TokenStore::open(&target, true).is_ok());
        let path = target.join([BIN, IDX, TOKENIZER, MANIFEST][which]);
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, bytes).unwrap();
        let opened = TokenStore::open(&target, true);
        let named = match opened.unwrap_err() {
            Error::Truncated { .. } => cut && which < 3,
            Error::Corrupt { .. } => !cut || which == 3,
            // A field of the manifest has another name, or a value of another kind.
            Error::NotADataset { .. } => which == 3,
            _ => false,
        };
        prop_assert!(named);
    }
}
