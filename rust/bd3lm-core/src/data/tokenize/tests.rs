use proptest::prelude::*;

use super::*;

pub(crate) const VOCAB: Vocab = Vocab {
    vocab_size: 300,
    bos_id: 256,
    eos_id: 256,
    mask_id: 257,
};

/// Byte-level BPE with every byte and a few merges.
pub(crate) fn definition() -> String {
    let mut vocab = serde_json::Map::new();
    let mut next = 256u32;
    for b in 0..=255u32 {
        // GPT-2's printable stand-ins
        let printable =
            (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
        let c = if printable {
            char::from_u32(b).unwrap()
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap()
        };
        vocab.insert(c.to_string(), b.into());
    }
    vocab.insert("<eos>".into(), 256.into());
    vocab.insert("<mask>".into(), 257.into());
    let merges = ["t h", "th e", "Ġ the", "Ġ a", "i n", "Ġ Ġ"];
    for (i, m) in merges.iter().enumerate() {
        vocab.insert(m.replace(' ', ""), (258 + i).into());
    }
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges}
    })
    .to_string()
}

/// Cutting anywhere the rule allows never changes the ids.
#[test]
fn cuts_are_exact() {
    let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
    assert_eq!(tokenizer.cut, Cut::ByteLevel);
    let text = "the  cat's in the\n\n the é x1 2b  a;\tthe end don't a\u{3000}b c ".repeat(3);
    let whole = tokenizer.encode(&text).unwrap();
    let mut cuts = 0;
    for from in 1..text.len() - 1 {
        let Some(at) = tokenizer.cut.find(&text, from) else {
            continue;
        };
        let mut joined = tokenizer.encode(&text[..at]).unwrap();
        joined.extend(tokenizer.encode(&text[at..]).unwrap());
        assert_eq!(joined, whole, "cut at {at}");
        cuts += 1;
    }
    assert!(cuts > 20);
}

#[test]
fn long_documents_equal_their_whole() {
    let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
    let text = "in the beginning a thing was there ".repeat(6000);
    assert!(tokenizer.part(&text, PIECE) < text.len() / 2);
    assert_eq!(encoded(&tokenizer, &text), tokenizer.encode(&text).unwrap());
}

fn encoded(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    tokenizer.encoder(1).encode(text, &mut ids).unwrap();
    ids
}

/// BERT's pipeline with a few pieces.
fn word_pieces(cased: bool) -> String {
    let pieces = [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "b", "##a", "##b", "e", "##e",
        "\u{4e2d}", ".", "\u{201c}", "\u{2014}", "1", "##1", "The", "ab", "##\u{e9}",
    ];
    let vocab: serde_json::Map<_, _> = pieces
        .iter()
        .enumerate()
        .map(|(i, p)| (p.to_string(), i.into()))
        .collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [{
            "id": 4, "content": "[MASK]", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "BertNormalizer", "clean_text": true,
            "handle_chinese_chars": true, "strip_accents": null, "lowercase": !cased},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null, "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 20, "vocab": vocab}
    })
    .to_string()
}

fn all_kinds() -> [Tokenizer; 3] {
    [definition(), word_pieces(false), word_pieces(true)].map(|json| {
        let tokenizer = Tokenizer::from_json(&json, VOCAB).unwrap();
        assert_eq!(tokenizer.slow(), None);
        tokenizer
    })
}

/// Beside letters, digits, marks, white space, and marks that can be put in another order.
#[test]
fn every_character_is_taken_as_the_library_takes_it() {
    for tokenizer in all_kinds() {
        let mut encoder = tokenizer.encoder(1);
        // All of the small scripts and their marks, and a share of the rest.
        let taken = |c: &u32| *c < 0x600 || c.is_multiple_of(if *c < 0x3400 { 7 } else { 997 });
        let mut chars = (0..=0x10_FFFFu32)
            .filter(taken)
            .filter_map(char::from_u32)
            .peekable();
        while chars.peek().is_some() {
            let text: String = chars
                .by_ref()
                .take(50)
                .flat_map(|c| {
                    ["a", "1", " ", ".\u{301}", "a\u{302e}"]
                        .into_iter()
                        .flat_map(move |beside| [beside.to_string(), c.to_string()])
                })
                .collect();
            let mut ids = Vec::new();
            encoder.encode(&text, &mut ids).unwrap();
            assert_eq!(
                ids,
                tokenizer.encode(&text).unwrap(),
                "{:?}",
                text.chars().nth(1)
            );
        }
    }
}

#[test]
fn words_of_any_length() {
    for tokenizer in all_kinds() {
        for length in [1, 14, 15, 16, 17, 31, 32, 33, 100, 3000] {
            for word in ["a", "the", "in", " ", "\u{e9}", "'s", "ab1"] {
                let text = word.repeat(length);
                let ids = encoded(&tokenizer, &text);
                assert_eq!(
                    ids,
                    tokenizer.encode(&text).unwrap(),
                    "{length} times {word:?}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn ids_are_the_librarys(
        texts in prop::collection::vec(
            prop_oneof![
                "(the|in|a|b|'s|'ll|The|[MASK]|<eos>| |  |\n|\t|1|!|\u{4e2d}|\u{201c}|\u{e9}|e\u{301}){0,30}",
                ".{0,40}",
                "[ -~\n]{0,60}",
            ],
            1..4,
        )
    ) {
        for tokenizer in all_kinds() {
            let mut encoder = tokenizer.encoder(1);
            for text in &texts {
                let mut ids = Vec::new();
                encoder.encode(text, &mut ids).unwrap();
                prop_assert_eq!(ids, tokenizer.encode(text).unwrap(), "{:?}", text);
            }
        }
    }
}

/// A pipeline that is not known, or not what its definition says, goes to the library.
#[test]
fn other_pipelines_are_left_to_the_library() {
    let changed = |pointer: &str, value: Value| {
        let mut json: Value = serde_json::from_str(&definition()).unwrap();
        *json.pointer_mut(pointer).unwrap() = value;
        let tokenizer = Tokenizer::from_json(&json.to_string(), VOCAB).unwrap();
        let text = "The in the\n the end ".repeat(9);
        assert_eq!(encoded(&tokenizer, &text), tokenizer.encode(&text).unwrap());
        tokenizer.slow().expect("left to the library")
    };
    let lower = serde_json::json!({"type": "Lowercase"});
    assert_eq!(changed("/normalizer", lower), "it normalizes text");
    let not_gpt2 = "its pre-tokenizer is not GPT-2's";
    assert_eq!(
        changed("/pre_tokenizer/add_prefix_space", true.into()),
        not_gpt2
    );
    assert_eq!(changed("/pre_tokenizer/use_regex", false.into()), not_gpt2);
    assert_eq!(
        changed("/model/ignore_merges", true.into()),
        "its merges have options"
    );
}

/// The mask token is hidden from texts and keeps its id; other added tokens keep theirs.
#[test]
fn a_text_that_spells_out_the_mask_token_is_characters() {
    let mut value: Value = serde_json::from_str(&definition()).unwrap();
    let token = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": true,
                           "rstrip": false, "normalized": false, "special": true})
    };
    value["added_tokens"] = vec![
        token(256, "<eos>"),
        token(257, "<mask>"),
        token(264, "<more>"),
    ]
    .into();
    let tokenizer = Tokenizer::from_json(&value.to_string(), VOCAB).unwrap();
    let text = "the <mask> in<eos>a<more>";
    let ids = tokenizer.encode(text).unwrap();
    assert!(!ids.contains(&257) && ids.contains(&256) && ids.contains(&264));
    assert_eq!(encoded(&tokenizer, text), ids);
    assert_eq!(
        tokenizer.json(),
        value.to_string(),
        "the definition is kept as it is"
    );
}

#[test]
fn dropout_is_off() {
    let plain = Tokenizer::from_json(&definition(), VOCAB).unwrap();
    let text = definition().replace("\"dropout\":null", "\"dropout\":0.9");
    let dropping = Tokenizer::from_json(&text, VOCAB).unwrap();
    assert!(text.contains("0.9"));
    assert_eq!(
        dropping.encode("the thing in the end").unwrap(),
        plain.encode("the thing in the end").unwrap()
    );
}

#[test]
fn seams_divide_ids_and_bytes() {
    let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
    for text in [
        "the thing in the end ".repeat(50),
        "日本語の文章".repeat(50),
        "x".repeat(500),
    ] {
        let whole = tokenizer.encode(&text).unwrap();
        let mut ids = vec![7];
        let seams = tokenizer
            .encoder(1)
            .encode_with_seams(&text, 20, &mut ids)
            .unwrap();
        assert_eq!(ids[1..], whole);
        assert!(seams.len() > 4, "{text}: {seams:?}");
        for seam in seams {
            let tail = tokenizer.inner.decode(&whole[seam.ids..], false).unwrap();
            assert_eq!(tail, text[seam.bytes..], "{seam:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_mutated_definition_is_loaded_or_refused(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..6), 1..4),
    ) {
        let mut text = definition();
        for (at, change) in changes {
            let at = at.index(text.len());
            let Some(at) = (at..text.len()).find(|i| text.is_char_boundary(*i)) else { continue };
            match change {
                0 => { text.remove(at); }
                1 => text.insert(at, '9'),
                2 => text.insert(at, '"'),
                3 => text.truncate(at),
                4 => text.insert_str(at, "null"),
                _ => text.insert(at, '{'),
            }
            if text.is_empty() { break }
        }
        if let Ok(tokenizer) = Tokenizer::from_json(&text, VOCAB) {
            let _ = tokenizer.encode("the thing <mask> in the end é");
            let mut ids = Vec::new();
            let _ = tokenizer.encoder(1).encode("the thing in the end é", &mut ids);
        }
    }
}
