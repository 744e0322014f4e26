//! BERT's WordPiece: words of ASCII letters and digits here, all others by the library.

use std::collections::HashMap;

use rustc_hash::FxBuildHasher;
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use super::chars::{Kinds, char_at};
use super::definition::Definition;

const WORD: u8 = 0;
const SPACE: u8 = 1;
const SINGLE: u8 = 2;
/// Part of a word that the library has to see.
const ODD: u8 = 3;
const WIDE: u8 = 4;

/// Kinds of the ASCII characters; the bytes of all others are [`WIDE`].
const ASCII: [u8; 256] = {
    let mut kinds = [WIDE; 256];
    let mut i = 0;
    while i < 128 {
        let c = i as u8;
        kinds[i] = if c.is_ascii_alphanumeric() {
            WORD
        } else if matches!(c, b' ' | b'\t' | b'\n' | b'\r') {
            SPACE
        } else if c.is_ascii_punctuation() {
            SINGLE
        } else {
            ODD
        };
        i += 1;
    }
    kinds
};

type Pieces = HashMap<Box<[u8]>, u32, FxBuildHasher>;

/// The parts of such a tokenizer that its words and ids depend on.
pub(super) struct WordPiece {
    first: Pieces,
    continuing: Pieces,
    longest: usize,
    unknown: u32,
    longest_word: usize,
    lower: bool,
    kinds: Kinds,
}

/// A stretch of text that meets no other in any id.
pub(super) enum Word {
    /// ASCII letters and digits.
    Plain(usize),
    /// One punctuation mark or ideograph.
    Single(usize),
    /// Anything else.
    Odd(usize),
}

impl WordPiece {
    /// Builds the pipeline from a `tokenizer.json`, or gives the reason why the library is needed.
    pub(super) fn new(definition: &Definition<'_>) -> Result<Self, &'static str> {
        let rest = &definition.rest;
        if rest["normalizer"]["type"] != "BertNormalizer" {
            return Err("its normalizer is not BERT's");
        }
        if rest["pre_tokenizer"]["type"] != "BertPreTokenizer" {
            return Err("its pre-tokenizer is not BERT's");
        }
        let model = &rest["model"];
        let vocab = definition.vocab.as_ref().ok_or("it has no vocabulary")?;
        let text = |field: &str| model[field].as_str().ok_or("its model is not whole");
        let (prefix, unknown) = (text("continuing_subword_prefix")?, text("unk_token")?);
        let longest_word = model["max_input_chars_per_word"].as_u64();
        let (mut first, mut continuing, mut longest) = (Pieces::default(), Pieces::default(), 0);
        for (token, id) in vocab {
            first.insert(token.as_bytes().into(), *id);
            if let Some(rest) = token.strip_prefix(prefix) {
                continuing.insert(rest.as_bytes().into(), *id);
            }
            longest = longest.max(token.len());
        }
        Ok(WordPiece {
            unknown: *first
                .get(unknown.as_bytes())
                .ok_or("it has no unknown token")?,
            first,
            continuing,
            longest,
            longest_word: longest_word.ok_or("its model is not whole")? as usize,
            lower: rest["normalizer"]["lowercase"] == true,
            kinds: Kinds::new(),
        })
    }

    /// End of the white space that begins at `at`.
    #[inline]
    pub(super) fn skip(&self, text: &[u8], mut at: usize) -> usize {
        while at < text.len() && ASCII[text[at] as usize] == SPACE {
            at += 1;
        }
        at
    }

    /// The word that begins at `at`, which is not white space, and where it ends.
    ///
    /// Normalization sees neighbours only where it orders combining marks, and never across a
    /// character that is none: so text may be cut at ASCII white space and punctuation, and
    /// around the characters that the library always splits off.
    #[inline]
    pub(super) fn word(&self, text: &str, at: usize, oracle: &tokenizers::Tokenizer) -> Word {
        let bytes = text.as_bytes();
        let mut end = at;
        while end < bytes.len() && ASCII[bytes[end] as usize] == WORD {
            end += 1;
        }
        let kind = if end == bytes.len() {
            SPACE
        } else {
            ASCII[bytes[end] as usize]
        };
        if end > at && matches!(kind, SPACE | SINGLE) {
            return Word::Plain(end);
        }
        if end == at && kind == SINGLE {
            return Word::Single(at + 1);
        }
        self.odd(text, at, end, oracle)
    }

    /// Encodes like [`Self::word`], where the character at `end` is neither an ASCII letter nor a
    /// boundary.
    fn odd(&self, text: &str, at: usize, mut end: usize, oracle: &tokenizers::Tokenizer) -> Word {
        let bytes = text.as_bytes();
        let mut plain = true;
        while end < bytes.len() {
            let mut length = 1;
            let mut kind = ASCII[bytes[end] as usize];
            if kind == WIDE {
                let c;
                (c, length) = char_at(text, end);
                kind = self.kinds.of(c, |c| ask(c, oracle));
            }
            match kind {
                SINGLE if end == at => return Word::Single(end + length),
                SPACE | SINGLE => break,
                ODD => plain = false,
                _ => {}
            }
            end += length;
        }
        if plain {
            Word::Plain(end)
        } else {
            Word::Odd(end)
        }
    }

    /// Appends the ids of a word of ASCII letters and digits: the longest piece at each place, or
    /// the unknown id for all of it.
    pub(super) fn pieces(&self, word: &[u8], out: &mut Vec<u32>) {
        let start = out.len();
        let lowered = self.lower.then(|| word.to_ascii_lowercase());
        let mut rest = lowered.as_deref().unwrap_or(word);
        if rest.len() > self.longest_word {
            out.push(self.unknown);
            return;
        }
        let mut known = &self.first;
        while !rest.is_empty() {
            let longest = rest.len().min(self.longest);
            let found = (1..=longest)
                .rev()
                .find_map(|n| Some((n, *known.get(&rest[..n])?)));
            let Some((length, id)) = found else {
                out.truncate(start);
                out.push(self.unknown);
                return;
            };
            out.push(id);
            rest = &rest[length..];
            known = &self.continuing;
        }
    }
}

/// Returns whether the library always splits a character off.
#[cold]
fn ask(c: char, oracle: &tokenizers::Tokenizer) -> u8 {
    let apart = || -> tokenizers::Result<bool> {
        let mut text = NormalizedString::from(format!("a{c}a"));
        oracle
            .get_normalizer()
            .expect("BERT's")
            .normalize(&mut text)?;
        let mut text = PreTokenizedString::from(text);
        oracle
            .get_pre_tokenizer()
            .expect("BERT's")
            .pre_tokenize(&mut text)?;
        let words = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(words.len() == 3 && words[1].0.chars().count() == 1)
    };
    if apart().unwrap_or(false) {
        SINGLE
    } else {
        ODD
    }
}
