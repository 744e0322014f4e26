//! Definitions of tokenizers with anything in them: loaded, or refused by a sentence.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::tests::{VOCAB, definition};
use super::{Tokenizer, vet};

/// A JSON value of any kind.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![
            Just(0),
            Just(-1),
            Just(1 << 40),
            Just(i64::MAX),
            any::<i64>()
        ]
        .prop_map(Value::from),
        Just(json!(1e300)),
        Just(Value::from(u64::MAX)),
        prop_oneof![
            Just(String::new()),
            Just("(a+)+$".to_owned()),
            Just("(".to_owned()),
            ".{0,8}",
            prop::sample::select(vec![
                "BPE",
                "WordPiece",
                "Unigram",
                "ByteLevel",
                "Replace",
                "Precompiled",
                "Split"
            ])
            .prop_map(str::to_owned),
        ]
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("type|id|content|vocab|merges|[a-z_]{1,6}", inner, 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// All places of a value that hold something.
fn places(value: &Value, path: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
    found.push(path.clone());
    let inside: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(k, v)| (k.clone(), v))
            .take(12)
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(i, v)| (i.to_string(), v))
            .take(12)
            .collect(),
        _ => Vec::new(),
    };
    for (name, child) in inside {
        path.push(name);
        places(child, path, found);
        path.pop();
    }
}

fn set(root: &mut Value, path: &[String], new: Value) {
    match path.split_first() {
        None => *root = new,
        Some((name, rest)) => {
            let child = match root {
                Value::Array(items) => &mut items[name.parse::<usize>().unwrap()],
                other => &mut other[name.as_str()],
            };
            set(child, rest, new);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_definition_is_loaded_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4),
        text in ".{0,30}",
    ) {
        let mut root: Value = serde_json::from_str(&definition()).unwrap();
        for (at, new) in changes {
            let mut found = Vec::new();
            places(&root, &mut Vec::new(), &mut found);
            set(&mut root, &found[at.index(found.len())], new);
        }
        let json = root.to_string();
        if let Ok(tokenizer) = Tokenizer::from_json(&json, VOCAB) {
            let largest = vet(&json, &[]).expect("what was loaded was vetted").largest_id;
            if let Ok(ids) = tokenizer.encode(&text) {
                prop_assert!(ids.iter().all(|id| largest.is_none_or(|most| u64::from(*id) <= most)));
            }
        }
    }
}
