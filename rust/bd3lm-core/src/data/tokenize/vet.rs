//! Checks of a tokenizer's definition before the library loads it. Aborts, endless loops and
//! unbounded allocations cannot be caught, so their known causes are refused.

use std::collections::BTreeSet;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

use super::definition::{Definition, Merge};
use crate::data::store::MAX_VOCAB;

/// WordPiece tries every substring of a word: the square of this many.
const MAX_WORD_CHARS: u64 = 1000;

/// Factor by which all normalizers together may lengthen a text.
const MAX_GROWTH: f64 = 64.0;

/// Checks a definition; the error is the reason to refuse it.
pub(super) fn vet(definition: &Definition<'_>) -> Result<(), String> {
    if let Some(largest) = definition.largest_id()
        && largest >= u64::from(MAX_VOCAB)
    {
        return Err(format!(
            "its largest id is {largest}; it must be below {MAX_VOCAB}"
        ));
    }
    vet_model(definition)?;
    let rest = &definition.rest;
    let growth = vet_normalizer(&rest["normalizer"])? * vet_normalizer(&rest["pre_tokenizer"])?;
    if growth > MAX_GROWTH {
        return Err(format!(
            "its normalizers make a text up to {growth:.3e} times as long; at most {MAX_GROWTH} are \
             allowed"
        ));
    }
    Ok(())
}

fn vet_model(definition: &Definition<'_>) -> Result<(), String> {
    let model = &definition.rest["model"];
    let longest = model["max_input_chars_per_word"].as_u64();
    if longest.is_some_and(|longest| longest > MAX_WORD_CHARS) {
        return Err(format!(
            "its max_input_chars_per_word must be at most {MAX_WORD_CHARS}"
        ));
    }
    // The library cuts the prefix off the right side of a merge without looking at it.
    let prefix = model["continuing_subword_prefix"]
        .as_str()
        .unwrap_or_default();
    let shorter = |Merge(_, right): &Merge<'_>| !right.is_char_boundary(prefix.len());
    if definition.merges.iter().flatten().any(shorter) {
        return Err(format!(
            "a merge is shorter than its continuing_subword_prefix {prefix:?}"
        ));
    }
    Ok(())
}

/// Checks a normalizer or pre-tokenizer; returns how much longer it can make a text.
fn vet_normalizer(part: &Value) -> Result<f64, String> {
    match part["type"].as_str() {
        Some("Sequence") => {
            let parts = part["normalizers"]
                .as_array()
                .or(part["pretokenizers"].as_array());
            let mut growth = 1.0;
            for part in parts.into_iter().flatten() {
                growth *= vet_normalizer(part)?;
            }
            Ok(growth)
        }
        Some("Replace") => {
            let content = part["content"].as_str().unwrap_or_default().len() as f64;
            Ok(match part["pattern"]["String"].as_str() {
                Some(pattern) if !pattern.is_empty() => (content / pattern.len() as f64).max(1.0),
                // An expression may match nothing, between any two bytes.
                _ => content + 1.0,
            })
        }
        Some("Precompiled") => {
            vet_charsmap(part["precompiled_charsmap"].as_str().unwrap_or_default())
                .map_err(|reason| format!("its precompiled_charsmap is damaged: {reason}"))?;
            Ok(1.0)
        }
        _ => Ok(1.0),
    }
}

/// Checks SentencePiece's table of replacements: a double-array trie over bytes whose leaves point
/// into a text. The library follows both without looking.
fn vet_charsmap(encoded: &str) -> Result<(), &'static str> {
    let bytes = BASE64_STANDARD
        .decode(encoded)
        .map_err(|_| "it is not base64")?;
    let (size, rest) = bytes.split_first_chunk::<4>().ok_or("it is empty")?;
    let size = u32::from_le_bytes(*size) as usize;
    if size > rest.len() || !size.is_multiple_of(4) || size == 0 {
        return Err("its trie does not fit it");
    }
    let (trie, text) = rest.split_at(size);
    let text = str::from_utf8(text).map_err(|_| "its text is not UTF-8")?;
    let units: Vec<usize> = trie
        .as_chunks::<4>()
        .0
        .iter()
        .map(|unit| u32::from_le_bytes(*unit) as usize)
        .collect();
    let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let label = |unit: usize| unit & ((1 << 31) | 0xFF);
    let mut seen = BTreeSet::new();
    let mut open = vec![offset(units[0])];
    while let Some(node) = open.pop() {
        for byte in 1..=255 {
            let child = node ^ byte;
            let unit = *units.get(child).ok_or("its trie leads beyond its end")?;
            if label(unit) != byte || !seen.insert(child) {
                continue;
            }
            let below = child ^ offset(unit);
            if (unit >> 8) & 1 == 1 {
                let leaf = *units.get(below).ok_or("its trie leads beyond its end")?;
                if !text.is_char_boundary(leaf & ((1 << 31) - 1)) {
                    return Err("a replacement lies beyond its text");
                }
            }
            open.push(below);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refused(part: Value) -> String {
        let mut definition = json!({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
        for (key, value) in part.as_object().unwrap() {
            definition[key] = value.clone();
        }
        let definition = definition.to_string();
        let read = Definition::parse(&definition);
        read.and_then(|definition| vet(&definition))
            .err()
            .unwrap_or_default()
    }

    #[test]
    fn what_the_library_does_not_survive_is_refused() {
        let model = |model: Value| refused(json!({"model": model}));
        assert!(model(json!({"vocab": {"a": 1 << 30}})).contains("largest id is 1073741824"));
        assert!(model(json!({"max_input_chars_per_word": 1u64 << 60})).contains("at most 1000"));
        let short = json!({"continuing_subword_prefix": "####", "merges": [["a", "b"]]});
        assert!(model(short).contains("shorter than"));
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let chain = json!({"type": "Sequence", "normalizers": vec![double; 40]});
        assert!(refused(json!({"normalizer": chain})).contains("times as long"));
        assert_eq!(refused(json!({})), "");
    }

    #[test]
    fn damaged_charsmaps_are_refused() {
        let map = |bytes: &[u8]| {
            let part = json!({"type": "Precompiled",
                              "precompiled_charsmap": BASE64_STANDARD.encode(bytes)});
            refused(json!({"normalizer": part}))
        };
        assert!(map(b"").contains("empty"));
        assert!(map(&u32::MAX.to_le_bytes()).contains("does not fit"));
        assert!(map(&[4, 0, 0, 0, 0, 255, 255, 255]).contains("beyond its end"));
        // One block without any child.
        let mut good = 1024u32.to_le_bytes().to_vec();
        good.resize(4 + 1024, 0);
        assert_eq!(map(&good), "");
    }
}
