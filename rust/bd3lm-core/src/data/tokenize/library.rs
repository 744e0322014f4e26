//! The library's tokenizer of a definition: all of it, or the part that a few texts need.

use std::sync::OnceLock;

use rustc_hash::FxHashSet;
use serde_json::Value;
use tokenizers::{Result, Tokenizer};
use unicode_normalization_alignments::UnicodeNormalization;

use super::bpe::printable;
use super::definition::Definition;
use super::metaspace::MARK;
use crate::data::guard::guarded;

/// The library's tokenizer of a definition, which is loaded when it is first used.
pub(super) struct Library {
    json: String,
    mask_id: u32,
    loaded: OnceLock<std::result::Result<Tokenizer, String>>,
}

impl Library {
    /// From a definition whose mask token is to be hidden.
    pub(super) fn new(json: &str, mask_id: u32) -> Self {
        Library {
            json: json.into(),
            mask_id,
            loaded: OnceLock::new(),
        }
    }

    /// A part of it, which encodes some texts as the whole does.
    pub(super) fn part(definition: &Definition<'_>, texts: &[&str]) -> Self {
        Library {
            json: String::new(),
            mask_id: 0,
            loaded: load(&excerpt(definition, texts)).into(),
        }
    }

    /// The definition, as it was given.
    pub(super) fn json(&self) -> &str {
        &self.json
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// The definition does not load.
    #[inline]
    pub(super) fn get(&self) -> Result<&Tokenizer> {
        let loaded = self.loaded.get_or_init(|| self.load());
        loaded.as_ref().map_err(|reason| reason.as_str().into())
    }

    fn load(&self) -> std::result::Result<Tokenizer, String> {
        let mut definition = Definition::parse(&self.json)?;
        if definition.drop_dropout() | definition.hide_mask(self.mask_id) {
            load(&definition.text(None))
        } else {
            load(&self.json)
        }
    }
}

/// Loads a definition, without padding and truncation.
fn load(json: &str) -> std::result::Result<Tokenizer, String> {
    let mut loaded =
        guarded(|| Tokenizer::from_bytes(json.as_bytes()))?.map_err(|e| e.to_string())?;
    loaded.with_padding(None);
    loaded.with_truncation(None).map_err(|e| e.to_string())?;
    Ok(loaded)
}

/// The definition of a BPE that encodes some texts as the whole does: without the tokens of the
/// model that none of these holds, and the merges that make them.
fn excerpt(definition: &Definition<'_>, texts: &[&str]) -> String {
    let image = image(texts);
    let mut pairs = vec![false; 1 << 16];
    let pair = |two: &[u8]| usize::from(two[0]) << 8 | usize::from(two[1]);
    for two in image.as_bytes().windows(2) {
        pairs[pair(two)] = true;
    }
    let held = |token: &str| {
        // Few tokens pass the first of these.
        token.as_bytes().windows(2).all(|two| pairs[pair(two)]) && image.contains(token)
    };
    let added = definition.added().map(|token| &token["content"]);
    let named = added.chain([&definition.rest["model"]["unk_token"]]);
    let named: FxHashSet<&str> = named.filter_map(Value::as_str).collect();
    let is_byte = |token: &str| token.starts_with("<0x");
    definition.text(Some(&|token| {
        held(token) || is_byte(token) || named.contains(token)
    }))
}

/// Texts as the models of the pipelines that are known see them.
fn image(texts: &[&str]) -> String {
    let printable = printable();
    let mut image = String::new();
    for text in texts {
        for text in [text.to_string(), text.nfc().map(|(c, _)| c).collect()] {
            image.extend(text.bytes().map(|byte| printable[usize::from(byte)]));
            image.push('\n');
        }
        image.push(MARK);
        image.extend(text.chars().map(|c| if c == ' ' { MARK } else { c }));
        image.push('\n');
    }
    image
}
