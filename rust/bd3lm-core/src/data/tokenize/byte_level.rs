//! Byte-level BPE over the words of any rule that is known.

use serde_json::Value;
use unicode_normalization_alignments::char::canonical_combining_class;
use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use super::bpe::Bpe;
use super::chars::Kinds;
use super::definition::Definition;
use super::split::Splitter;

/// Characters that composition neither changes nor reorders, and all others.
const INERT: u8 = 0;
const ACTIVE: u8 = 1;

/// The parts of such a tokenizer that its words and ids depend on.
pub(super) struct ByteLevel {
    pub(super) splitter: Splitter,
    pub(super) bpe: Bpe,
    /// Kinds of characters, where text is brought into NFC.
    nfc: Option<Kinds>,
}

impl ByteLevel {
    /// From a `tokenizer.json`; or why it is not known.
    pub(super) fn new(definition: &Definition<'_>) -> Result<Self, &'static str> {
        let normalizer = &definition.rest["normalizer"];
        let nfc = match normalizer["type"].as_str() {
            _ if is_identity(normalizer) => None,
            Some("NFC") => Some(Kinds::new()),
            _ => return Err("it normalizes text in a way that is not known here"),
        };
        Ok(ByteLevel {
            splitter: Splitter::new(&definition.rest["pre_tokenizer"])?,
            bpe: Bpe::new(definition, true, |_| ())?,
            nfc,
        })
    }

    /// The normalized form of a text, where it may differ.
    pub(super) fn normalized(&self, text: &str) -> Option<String> {
        let kinds = self.nfc.as_ref()?;
        if text.is_ascii() {
            return None;
        }
        // None below U+0300, whose first byte is 0xCC, changes.
        let inert = |c: char| c < '\u{300}' || kinds.of(c, kind_of) == INERT;
        if text.chars().all(inert) {
            return None;
        }
        Some(text.nfc().map(|(c, _)| c).collect())
    }
}

/// Whether a normalizer changes nothing.
pub(super) fn is_identity(normalizer: &Value) -> bool {
    let parts = normalizer["normalizers"].as_array();
    normalizer.is_null()
        || (normalizer["type"] == "Sequence" && parts.is_some_and(|p| p.is_empty()))
}

fn kind_of(c: char) -> u8 {
    let is_inert =
        is_nfc_quick(std::iter::once(c)) == IsNormalized::Yes && canonical_combining_class(c) == 0;
    if is_inert { INERT } else { ACTIVE }
}
