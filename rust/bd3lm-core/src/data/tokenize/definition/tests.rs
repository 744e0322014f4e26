use super::*;
use crate::data::tokenize::tests::{VOCAB, definition};
use crate::data::tokenize::{Tokenizer, library::Library};
use serde_json::json;

fn with_merges(merges: Value) -> String {
    let mut value: Value = serde_json::from_str(&definition()).unwrap();
    value["model"]["merges"] = merges;
    value.to_string()
}

/// A definition whose merges the library would not load is refused, though no text needs it.
#[test]
fn merges_are_read_as_the_library_reads_them() {
    let escaped = r#"[["t","\u0068"], ["th", "e"]]"#;
    for merges in [
        json!([["t", "h"], ["th", "e"]]),
        json!(["#version: 0.2", "t h", "th e"]),
        serde_json::from_str(escaped).unwrap(),
    ] {
        let json = with_merges(merges);
        let tokenizer = Tokenizer::from_json(&json, VOCAB).unwrap();
        assert_eq!(tokenizer.slow(), None);
        let mut ids = Vec::new();
        tokenizer.encoder(1).encode("the", false, &mut ids).unwrap();
        assert_eq!((ids.as_slice(), ids.len()), (&[259][..], 1));
    }
    for merges in [
        json!([["t", "h"], "th e"]),
        json!([["t", "h", "e"]]),
        json!([["t"]]),
        json!(["t h e"]),
        json!(["th"]),
        json!([["t", 3]]),
        json!([["t", "none"]]),
        json!("t h"),
        json!(null),
    ] {
        let json = with_merges(merges.clone());
        assert!(Tokenizer::from_json(&json, VOCAB).is_err(), "{merges}");
        assert!(
            Library::new(&json, VOCAB.mask_id).get().is_err(),
            "{merges}"
        );
    }
}

/// The ids that the definition writes do not count.
#[test]
fn added_tokens_have_the_ids_of_the_library() {
    let token = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let mut value: Value = serde_json::from_str(&definition()).unwrap();
    value["added_tokens"] = json!([
        token(270, "<new>"),
        token(3, "<eos>"),
        token(9, "<newer>"),
        token(1, ""),
        token(258, "th")
    ]);
    let json = value.to_string();
    let definition = Definition::parse(&json).unwrap();
    let ids = definition.added_ids().unwrap();
    let library = Library::new(&json, VOCAB.mask_id);
    let library = library.get().unwrap();
    for content in ["<new>", "<eos>", "<newer>", "th"] {
        assert_eq!(
            ids.get(content).copied(),
            library.token_to_id(content),
            "{content}"
        );
    }
    value["added_tokens"] = json!([token(256, "<eos>"), token(256, "<eos>")]);
    let twice = value.to_string();
    let twice = Tokenizer::from_json(&twice, VOCAB).unwrap();
    assert_eq!(twice.slow(), Some("two of its added tokens are one"));
}
