//! The library's tokenizer of a definition: all of it, or the part that a few texts need.

use std::sync::OnceLock;

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
    let unknown = definition.rest["model"]["unk_token"].as_str();
    let is_named = |token: &str| token.starts_with("<0x") || Some(token) == unknown;
    definition.text(Some(&|token| held(token) || is_named(token)))
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

#[cfg(test)]
mod tests {
    use super::super::PROBES;
    use super::super::tests::shapes;
    use super::*;

    #[test]
    fn a_part_encodes_its_texts_as_the_whole_does() {
        for (name, tokenizer) in shapes() {
            let definition = Definition::parse(tokenizer.json()).unwrap();
            if definition.merges.is_none() {
                continue; // WordPiece is loaded as a whole
            }
            let (whole, part) = (
                tokenizer.library.get().unwrap(),
                Library::part(&definition, &PROBES),
            );
            let part = part.get().unwrap();
            for text in PROBES {
                let ids = |from: &Tokenizer| from.encode_fast(text, false).unwrap();
                assert_eq!(ids(part).get_ids(), ids(whole).get_ids(), "{name}: {text}");
            }
        }
        let json = super::super::tests::definition();
        let definition = Definition::parse(&json).unwrap();
        let part = excerpt(&definition, &["a in"]);
        let part = Definition::parse(&part).unwrap();
        let mut tokens: Vec<&str> = part.vocab.iter().flatten().map(|(t, _)| &**t).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, ["a", "i", "in", "n", "\u{120}"]);
        assert_eq!(part.merges.unwrap().len(), 1);
    }
}
