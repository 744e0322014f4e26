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
    let text = "the  cat's in the\n\n the é x1 2b  a;\tthe end. don't a\u{3000}b c!\n 字。\n字\nin,                 the \u{301}a the THE\r\n x the\n";
    let text = text.repeat(3);
    for (name, tokenizer) in shapes() {
        let whole = tokenizer.encode(&text).unwrap();
        let mut cuts = 0;
        for from in 1..text.len() - 1 {
            let Some(at) = (from..=from + 3).find(|at| text.is_char_boundary(*at)) else {
                continue;
            };
            let at = tokenizer.part(&text, at);
            if at == text.len() {
                continue;
            }
            let mut ids = Vec::new();
            let mut encoder = tokenizer.encoder(1);
            encoder.encode(&text[..at], false, &mut ids).unwrap();
            encoder.encode(&text[at..], true, &mut ids).unwrap();
            assert_eq!(ids, whole, "{name}: cut at {at}");
            if cuts % 10 == 0 {
                let mut seamed = Vec::new();
                let (head, tail) = text.split_at(at);
                let mut add = |part, continued| {
                    encoder
                        .encode_with_seams(part, continued, 16, &mut seamed)
                        .unwrap();
                };
                add(head, false);
                add(tail, true);
                assert_eq!(seamed, whole, "{name}: seams, cut at {at}");
            }
            cuts += 1;
        }
        assert!(cuts > 20, "{name}: {cuts}");
    }
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
    tokenizer.encoder(1).encode(text, false, &mut ids).unwrap();
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

/// Rules for words of families of tokenizers, as they are published.
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_MARKS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

fn split(pattern: &str, behavior: &str, invert: bool) -> Value {
    serde_json::json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior,
                       "invert": invert})
}

/// The byte-level definition with other rules for words.
fn byte_level(rules: Vec<Value>, regex: bool, changes: &[(&str, Value)]) -> String {
    let mut value: Value = serde_json::from_str(&definition()).unwrap();
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false,
                                   "trim_offsets": true, "use_regex": regex});
    let parts: Vec<Value> = rules.into_iter().chain([bytes]).collect();
    value["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": parts});
    for (pointer, changed) in changes {
        *value.pointer_mut(pointer).unwrap() = changed.clone();
    }
    value.to_string()
}

/// A SentencePiece model with a few pieces, which can join spaces, and a space behind a letter.
fn pieces(normalizer: Value, pre_tokenizer: Value) -> String {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".into(), 0.into());
    for byte in 0..=255u32 {
        vocab.insert(format!("<{byte:#04X}>"), (byte + 1).into());
    }
    let merges = [
        "\u{2581} \u{2581}",
        "t h",
        "th e",
        "\u{2581} the",
        "\u{2581} a",
        "i n",
        "\u{2581} in",
        "e .",
        "\u{2581}\u{2581} \u{2581}\u{2581}",
        "\u{e9} \u{4e2d}",
        "\n \n",
        "b \u{2581}",
    ];
    let singles = "\u{2581}theainb.\u{e9}\u{4e2d}\n";
    let made = merges.iter().map(|merge| merge.replace(' ', ""));
    for piece in singles.chars().map(String::from).chain(made) {
        let next = vocab.len();
        vocab.entry(piece).or_insert(next.into());
    }
    let merges: Vec<_> = merges.iter().map(|m| m.split_once(' ').unwrap()).collect();
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                  "byte_fallback": true, "ignore_merges": false, "vocab": vocab, "merges": merges}
    })
    .to_string()
}

/// Every shape of tokenizer that is known here.
pub(super) fn shapes() -> Vec<(&'static str, Tokenizer)> {
    let isolated = |pattern| split(pattern, "Isolated", false);
    let mark = "\u{2581}";
    let replace =
        serde_json::json!({"type": "Replace", "pattern": {"String": " "}, "content": mark});
    let prepend = serde_json::json!({"type": "Prepend", "prepend": mark});
    let legacy = serde_json::json!({"type": "Sequence", "normalizers": [prepend, replace]});
    let at_spaces = serde_json::json!({"type": "Split", "pattern": {"String": " "},
                                       "behavior": "MergedWithPrevious", "invert": false});
    let metaspace = |scheme: &str, split: bool| {
        serde_json::json!({"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme,
                           "split": split})
    };
    let digits =
        |individual: bool| serde_json::json!({"type": "Digits", "individual_digits": individual});
    let no_normalizer = serde_json::json!({"type": "Sequence", "normalizers": []});
    let nfc = [("/normalizer", serde_json::json!({"type": "NFC"}))];
    let whole = [("/model/ignore_merges", true.into())];
    let definitions = [
        ("GPT-2", definition()),
        ("BERT", word_pieces(false)),
        ("BERT, cased", word_pieces(true)),
        (
            "cl100k",
            byte_level(vec![split(CL100K, "Removed", true)], false, &[]),
        ),
        ("Llama 3", byte_level(vec![isolated(CL100K)], false, &whole)),
        ("o200k", byte_level(vec![isolated(O200K)], false, &whole)),
        ("Tekken", byte_level(vec![isolated(TEKKEN)], false, &[])),
        ("Qwen 2", byte_level(vec![isolated(QWEN)], false, &nfc)),
        (
            "Qwen 3.5",
            byte_level(vec![isolated(QWEN_MARKS)], false, &nfc),
        ),
        ("SmolLM", byte_level(vec![digits(true)], true, &[])),
        ("runs of digits", byte_level(vec![digits(false)], true, &[])),
        (
            "DeepSeek",
            byte_level(
                DEEPSEEK.map(isolated).to_vec(),
                false,
                &[("/normalizer", no_normalizer)],
            ),
        ),
        ("Llama 2", pieces(legacy, Value::Null)),
        ("Mistral", pieces(Value::Null, metaspace("first", false))),
        (
            "Metaspace, always",
            pieces(Value::Null, metaspace("always", true)),
        ),
        (
            "Metaspace, never",
            pieces(Value::Null, metaspace("never", false)),
        ),
        ("Gemma", pieces(replace, at_spaces)),
    ];
    definitions
        .map(|(name, json)| {
            let tokenizer = Tokenizer::from_json(&json, VOCAB).unwrap();
            assert_eq!(tokenizer.slow(), None, "{name}");
            (name, tokenizer)
        })
        .into()
}

/// Beside letters, digits, marks, white space, and marks that can be put in another order.
#[test]
fn every_character_is_taken_as_the_library_takes_it() {
    for (number, (name, tokenizer)) in shapes().into_iter().enumerate() {
        let mut encoder = tokenizer.encoder(1);
        // All of the small scripts and their marks, and a share of the rest; for most shapes, which
        // differ in rules alone, a fifth of these.
        let share = if number < 3 { 1 } else { 5 };
        let taken = |c: &u32| {
            (*c < 0x600 && c.is_multiple_of(share))
                || c.is_multiple_of(share * if *c < 0x3400 { 7 } else { 997 })
        };
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
            encoder.encode(&text, false, &mut ids).unwrap();
            assert_eq!(
                ids,
                tokenizer.encode(&text).unwrap(),
                "{name}: {:?}",
                text.chars().nth(1)
            );
        }
    }
}

#[test]
fn words_of_any_length() {
    for (name, tokenizer) in shapes() {
        for length in [1, 14, 15, 16, 17, 31, 32, 33, 100, 3000] {
            for word in [
                "a", "the", "in", " ", "\u{e9}", "'s", "ab1", "\u{2581}", "\n", "1",
            ] {
                let text = word.repeat(length);
                let ids = encoded(&tokenizer, &text);
                assert_eq!(
                    ids,
                    tokenizer.encode(&text).unwrap(),
                    "{name}: {length} times {word:?}"
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
                "(the|in|a|b|'s|'LL|'\u{17f}|The|[MASK]|<eos>| |  |\n|\r|\t|1|!|/|\\.|\u{4e2d}|\u{201c}|\u{e9}|e\u{301}|\u{2581}|\u{a0}|\u{1112}\u{1161}|\u{c5c}){0,30}",
                ".{0,40}",
                "[ -~\n]{0,60}",
            ],
            1..4,
        )
    ) {
        for (name, tokenizer) in shapes() {
            let mut encoder = tokenizer.encoder(1);
            for text in &texts {
                let mut ids = Vec::new();
                encoder.encode(text, false, &mut ids).unwrap();
                prop_assert_eq!(ids, tokenizer.encode(text).unwrap(), "{}: {:?}", name, text);
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
    let unknown = "it normalizes text in a way that is not known here";
    assert_eq!(
        changed("/normalizer", serde_json::json!({"type": "Lowercase"})),
        unknown
    );
    let prefix = changed("/pre_tokenizer/add_prefix_space", true.into());
    assert_eq!(prefix, "its pre-tokenizer does not end with plain bytes");
    let no_rule = changed("/pre_tokenizer/use_regex", false.into());
    assert_eq!(no_rule, "it has no rule for words, or too many");
    let suffix = changed("/model/end_of_word_suffix", "</w>".into());
    assert_eq!(suffix, "its merges have options");
    for rule in [
        r"\b\w+",
        r"a(?=b)|\s+",
        r"\p{L}++|.",
        r"(?i:ss)|.",
        r"\p{L}*",
        r"\p{L}+?|.",
    ] {
        let rules = byte_level(vec![split(rule, "Isolated", false)], false, &[]);
        let tokenizer = Tokenizer::from_json(&rules, VOCAB).unwrap();
        assert_eq!(
            tokenizer.slow(),
            Some("its rule for words has parts that are not known here")
        );
    }
}

/// Added tokens are found as the library finds them, wherever a text spells them out.
#[test]
fn added_tokens_are_the_librarys() {
    let token = |id: u32, content: &str, how: &str| {
        let mut token = serde_json::json!({"id": id, "content": content, "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        if !how.is_empty() {
            token[how] = true.into();
        }
        token
    };
    let vocab = Vocab {
        vocab_size: 400,
        ..VOCAB
    };
    for (name, json) in shapes().iter().map(|(name, t)| (name, t.json())) {
        let mut value: Value = serde_json::from_str(json).unwrap();
        let normalizes = !value["normalizer"].is_null();
        let mut next = vet(&value.to_string(), &[]).unwrap().largest_id.unwrap() as u32;
        let mut tokens = Vec::new();
        for (content, how) in [
            ("<a>", ""),
            ("<a><b>", ""),
            ("<b>", "normalized"),
            ("<l>", "lstrip"),
            ("<r>", "rstrip"),
            ("the", "single_word"),
            ("\n\n\n", ""),
        ] {
            if how != "normalized" || !normalizes {
                next += 1;
                tokens.push(token(next, content, how));
            }
        }
        value["added_tokens"] = tokens.into();
        let tokenizer = Tokenizer::from_json(&value.to_string(), vocab).unwrap();
        assert_eq!(tokenizer.slow(), None, "{name}");
        for text in [
            "<a>",
            "a <a> the",
            "<a><b>in <b> x",
            "<a ><b>",
            " <l> in",
            "in <r>  a",
            "the thea",
            "a\n\n\n\n b",
            "<a>  in<a>in",
            "\u{2581}<a>\u{2581}in",
        ] {
            assert_eq!(
                encoded(&tokenizer, text),
                tokenizer.encode(text).unwrap(),
                "{name}: {text}"
            );
        }
    }
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
            .encode_with_seams(&text, false, 20, &mut ids)
            .unwrap();
        assert_eq!(ids[1..], whole);
        assert!(seams.len() > 4, "{text}: {seams:?}");
        for seam in seams {
            let tail = tokenizer
                .library
                .get()
                .unwrap()
                .decode(&whole[seam.ids..], false)
                .unwrap();
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
            let _ = tokenizer.encoder(1).encode("the thing in the end é", false, &mut ids);
        }
    }
}
