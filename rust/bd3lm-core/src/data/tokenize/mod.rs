//! Text to token ids: exactly those of the `tokenizers` library, which is asked as seldom as can be.

mod byte_level;
mod cache;
mod chars;
mod fast;
mod word_piece;

use aho_corasick::AhoCorasick;
use serde_json::Value;

use crate::data::store::Vocab;
use crate::error::{Error, Result};
use cache::WordCache;
use fast::Fast;

/// Text handed to the library at once: longer documents are cut where that is exact.
const PIECE: usize = 64 << 10;

/// A tokenizer with the special ids of its vocabulary.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: String,
    vocab: Vocab,
    cut: Cut,
    fast: std::result::Result<Fast, &'static str>,
    /// What text must not hold for the fast way: it is an id by itself wherever it stands.
    added: AhoCorasick,
}

/// Where a text can be cut without changing its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// GPT-2's byte-level rule: a single space between a non-space and a letter begins a word.
    BeforeSpaceAndLetter,
    /// BERT's rule: words never cross a space.
    AtSpace,
    /// Unknown rule: whole documents only.
    Never,
}

impl Tokenizer {
    /// From the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the definition does not load, or needs ids beyond the vocabulary.
    pub fn from_json(json: &str, vocab: Vocab) -> Result<Self> {
        let bad = |reason: String| Error::Tokenizer {
            name: "definition".into(),
            reason,
        };
        // The library and what is read here take about as long, side by side.
        let read = || -> serde_json::Result<_> {
            let value: Value = serde_json::from_str(json)?;
            let added = value["added_tokens"].as_array().into_iter().flatten();
            let added = added.filter_map(|token| token["content"].as_str());
            Ok((Cut::of(&value), Fast::new(&value), AhoCorasick::new(added)))
        };
        let (inner, read) = std::thread::scope(|scope| {
            let read = scope.spawn(read);
            let inner = tokenizers::Tokenizer::from_bytes(json.as_bytes());
            (
                inner,
                read.join().expect("reading a definition does not panic"),
            )
        });
        let mut inner = inner.map_err(|e| bad(e.to_string()))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| bad(e.to_string()))?;
        let needed = inner.get_vocab_size(true);
        if needed > vocab.vocab_size as usize {
            return Err(bad(format!(
                "it makes {needed} ids, more than the vocabulary of {}",
                vocab.vocab_size
            )));
        }
        let (cut, fast, added) = read.map_err(|e| bad(e.to_string()))?;
        Ok(Tokenizer {
            cut,
            fast: fast.and_then(|fast| fast.agreeing(&inner)),
            added: added.map_err(|e| bad(e.to_string()))?,
            inner,
            json: json.into(),
            vocab,
        })
    }

    /// The definition, as it was given.
    pub fn json(&self) -> &str {
        &self.json
    }

    /// Special ids.
    pub fn vocab(&self) -> Vocab {
        self.vocab
    }

    /// Why the library does all of the work; `None` where words are cached.
    pub fn slow(&self) -> Option<&'static str> {
        self.fast.as_ref().err().copied()
    }

    /// What encodes texts one after the other, and remembers their words.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder {
            tokenizer: self,
            cache: WordCache::new(),
        }
    }

    /// Ids of a text by the library, without special tokens around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the model cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(refused)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The end of the first part of a text whose ids are those it has in the whole: `from` bytes
    /// or a little more, or all of it.
    pub(crate) fn part(&self, text: &str, from: usize) -> usize {
        if text.len() <= from {
            return text.len();
        }
        self.cut.find(text, from).unwrap_or(text.len())
    }
}

fn refused(e: tokenizers::Error) -> Error {
    Error::Tokenizer {
        name: "of this data set".into(),
        reason: e.to_string(),
    }
}

/// Encodes texts with a memory of the words it has met, of bounded size.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    cache: WordCache,
}

impl Encoder<'_> {
    /// Appends the ids of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the model cannot encode it.
    pub fn encode(&mut self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(self.tokenizer.part(rest, PIECE));
            match &self.tokenizer.fast {
                Ok(fast) if !self.tokenizer.added.is_match(piece) => fast
                    .encode(piece, &self.tokenizer.inner, &mut self.cache, out)
                    .map_err(refused)?,
                _ => out.extend_from_slice(&self.tokenizer.encode(piece)?),
            }
            rest = after;
        }
        Ok(())
    }
}

impl Cut {
    fn of(definition: &Value) -> Self {
        let added = definition["added_tokens"].as_array();
        let spaced = |token: &Value| {
            let content = token["content"].as_str().unwrap_or_default();
            content.contains(' ') || token["rstrip"] == true
        };
        if added.is_some_and(|tokens| tokens.iter().any(spaced)) {
            return Cut::Never; // such a token can stand across any cut
        }
        let pre = &definition["pre_tokenizer"];
        match pre["type"].as_str() {
            Some("ByteLevel")
                if definition["normalizer"].is_null()
                    && pre["add_prefix_space"] == false
                    && pre["use_regex"] != false =>
            {
                Cut::BeforeSpaceAndLetter
            }
            Some("BertPreTokenizer") => Cut::AtSpace,
            _ => Cut::Never,
        }
    }

    /// The first exact cut at or after `from`.
    fn find(self, text: &str, from: usize) -> Option<usize> {
        if self == Cut::Never {
            return None;
        }
        let bytes = text.as_bytes();
        // ASCII neighbours alone, so that a cut is never inside a character and no Unicode
        // space or combining mark can take part in it.
        (from..bytes.len() - 1).find(|&i| {
            bytes[i] == b' '
                && bytes[i - 1].is_ascii_alphanumeric()
                && bytes[i + 1].is_ascii_alphabetic()
        })
    }
}

#[cfg(test)]
pub(crate) mod tests;
