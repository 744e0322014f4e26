//! Text to token ids: exactly those of the `tokenizers` library, which is called as seldom as can be.

mod byte_level;
mod cache;
mod chars;
mod fast;
mod vet;
mod word_piece;

use aho_corasick::AhoCorasick;
use serde_json::Value;

use crate::data::guard::guarded;
use crate::data::store::Vocab;
use crate::error::{Error, Result};
use cache::WordCache;
use fast::Fast;

/// Text handed to the library at once: longer documents are cut where that is exact.
const PIECE: usize = 64 << 10;

/// Longest text whose cuts are looked for by the library alone.
const OFFSETS: usize = 1 << 20;

/// Content of the mask token while texts are encoded: characters that no text holds.
const NO_TEXT: &str = "\u{fdd0}\u{fdd1}bd3lm mask\u{fdd1}\u{fdd0}";

/// A tokenizer with the special ids of its vocabulary.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: String,
    vocab: Vocab,
    cut: Cut,
    fast: std::result::Result<Fast, &'static str>,
    /// Texts that hold none of these are encoded by `fast`.
    added: AhoCorasick,
}

/// Where a text can be cut without changing its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// GPT-2's byte-level rule: a single space between a non-space and a letter begins a word, and
    /// so does a line end behind a non-space.
    ByteLevel,
    /// BERT's rule: words never cross a space.
    AtSpace,
    /// Unknown rule: whole documents only.
    Never,
}

/// A place in a text where its ids can be divided: ids and bytes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seam {
    /// Ids before it.
    pub ids: usize,
    /// Bytes of the text before it.
    pub bytes: usize,
}

/// Checks the definition of a tokenizer from a stranger before the library loads it; returns its
/// largest id.
///
/// # Errors
/// [`Error::Tokenizer`] for one that would abort the process, or run or grow without bound.
pub fn vet(json: &str) -> Result<Option<u64>> {
    let value: Value = serde_json::from_str(json).map_err(|e| bad(&e))?;
    vet::vet(&value).map_err(|e| bad(&e))?;
    Ok(vet::largest_id(&value))
}

fn bad(reason: &dyn std::fmt::Display) -> Error {
    Error::Tokenizer {
        name: "definition".into(),
        reason: reason.to_string(),
    }
}

impl Tokenizer {
    /// From the text of a `tokenizer.json`.
    ///
    /// Dropout, padding and truncation are off, and a text that spells out the mask token is
    /// encoded as ordinary characters.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the definition does not load, or needs ids beyond the vocabulary.
    pub fn from_json(json: &str, vocab: Vocab) -> Result<Self> {
        let mut value: Value = serde_json::from_str(json).map_err(|e| bad(&e))?;
        vet::vet(&value).map_err(|e| bad(&e))?;
        let needed = vet::largest_id(&value).map_or(0, |id| id + 1);
        if needed > u64::from(vocab.vocab_size) {
            return Err(bad(&format!(
                "it makes {needed} ids, more than the vocabulary of {}",
                vocab.vocab_size
            )));
        }
        let changed = drop_dropout(&mut value) | hide_mask(&mut value, vocab.mask_id);
        let rewritten = changed.then(|| value.to_string());
        let text = rewritten.as_deref().unwrap_or(json);
        // Loading the library's tokenizer and ours takes about the same time: in parallel.
        let (inner, read) = std::thread::scope(|scope| {
            let value = &value;
            let read = scope.spawn(move || {
                let added = value["added_tokens"].as_array().into_iter().flatten();
                let added = added.filter_map(|token| token["content"].as_str());
                guarded(|| (Cut::of(value), Fast::new(value), AhoCorasick::new(added)))
            });
            let inner = guarded(|| tokenizers::Tokenizer::from_bytes(text.as_bytes()));
            (inner, read.join().expect("its panics are caught"))
        });
        let mut inner = inner.map_err(|e| bad(&e))?.map_err(|e| bad(&e))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| bad(&e))?;
        let (cut, fast, added) = read.map_err(|e| bad(&e))?;
        let fast = guarded(|| fast.and_then(|fast| fast.agreeing(&inner)));
        Ok(Tokenizer {
            cut,
            fast: fast.map_err(|e| bad(&e))?,
            added: added.map_err(|e| bad(&e))?,
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

    /// An encoder for one of `threads` threads, which share the memory for caches.
    pub fn encoder(&self, threads: usize) -> Encoder<'_> {
        Encoder {
            tokenizer: self,
            cache: WordCache::new(threads),
        }
    }

    /// Ids of a text by the library, without special tokens around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the model cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, false));
        let encoding = encoding
            .map_err(|e| refused(&e))?
            .map_err(|e| refused(&e))?;
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

/// BPE-dropout is for training a model on several tokenizations of a text, by another at each
/// epoch. In a data set it would be frozen, and in a prompt it would be random.
fn drop_dropout(definition: &mut Value) -> bool {
    let dropout = definition["model"].get_mut("dropout");
    dropout.is_some_and(|dropout| !std::mem::take(dropout).is_null())
}

/// Gives the mask token a content that no text holds, so that a text that spells it out is encoded
/// as ordinary characters. It is not removed: the ids of the added tokens after it would move.
fn hide_mask(definition: &mut Value, mask_id: u32) -> bool {
    let added = definition["added_tokens"]
        .as_array_mut()
        .into_iter()
        .flatten();
    let mut content = None;
    for token in added {
        if token["id"] == mask_id {
            content = Some(std::mem::replace(&mut token["content"], NO_TEXT.into()));
            for rule in ["normalized", "lstrip", "rstrip", "single_word"] {
                token[rule] = false.into();
            }
        }
    }
    let Some(Value::String(content)) = content else {
        return false;
    };
    let model = &mut definition["model"];
    let in_merges = |merge: &Value| match merge {
        Value::String(pair) => pair.replacen(' ', "", 1) == content,
        pair => pair[0]
            .as_str()
            .zip(pair[1].as_str())
            .is_some_and(|(a, b)| content == [a, b].concat()),
    };
    if model["merges"]
        .as_array()
        .is_some_and(|merges| merges.iter().any(in_merges))
    {
        return true; // the model makes it out of characters
    }
    match &mut model["vocab"] {
        Value::Object(ids) => {
            if let Some(id) = ids.remove(&content) {
                ids.insert(NO_TEXT.into(), id);
            }
        }
        Value::Array(pieces) => {
            if let Some(piece) = pieces.get_mut(mask_id as usize)
                && piece[0] == content
            {
                piece[0] = NO_TEXT.into();
            }
        }
        _ => {}
    }
    true
}

fn refused(e: &dyn std::fmt::Display) -> Error {
    Error::Tokenizer {
        name: "of this data set".into(),
        reason: format!("it cannot encode a text ({e})"),
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
                Ok(fast) if !self.tokenizer.added.is_match(piece) => {
                    let (inner, cache) = (&self.tokenizer.inner, &mut self.cache);
                    guarded(|| fast.encode(piece, inner, cache, out))
                        .map_err(|e| refused(&e))?
                        .map_err(|e| refused(&e))?;
                }
                _ => out.extend_from_slice(&self.tokenizer.encode(piece)?),
            }
            rest = after;
        }
        Ok(())
    }

    /// As [`Self::encode`]; also finds places where the ids can be divided: no two of them are
    /// less than `spacing` bytes apart.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_seams(
        &mut self,
        text: &str,
        spacing: usize,
        out: &mut Vec<u32>,
    ) -> Result<Vec<Seam>> {
        let mut seams = Vec::new();
        let tokenizer = self.tokenizer;
        let start = out.len();
        let first = tokenizer.part(text, spacing);
        let is_cuttable = tokenizer.cut != Cut::Never && first < text.len().min(4 * spacing);
        if !is_cuttable && (tokenizer.fast.is_err() || text.len() <= OFFSETS) {
            // The library knows which bytes each id stands for.
            let encoding = guarded(|| tokenizer.inner.encode(text, false));
            let encoding = encoding
                .map_err(|e| refused(&e))?
                .map_err(|e| refused(&e))?;
            let (mut end, mut last) = (0, 0);
            for (ids, (from, to)) in encoding.get_offsets().iter().copied().enumerate() {
                if from >= end && from >= last + spacing && text.is_char_boundary(from) {
                    seams.push(Seam { ids, bytes: from });
                    last = from;
                }
                end = end.max(to);
            }
            out.extend_from_slice(encoding.get_ids());
            return Ok(seams);
        }
        let mut at = 0;
        while at < text.len() {
            let end = at + tokenizer.part(&text[at..], spacing);
            self.encode(&text[at..end], out)?;
            at = end;
            if at < text.len() {
                seams.push(Seam {
                    ids: out.len() - start,
                    bytes: at,
                });
            }
        }
        Ok(seams)
    }
}

impl Cut {
    fn of(definition: &Value) -> Self {
        let added = definition["added_tokens"].as_array();
        let spaced = |token: &Value| {
            let content = token["content"].as_str().unwrap_or_default();
            content.contains([' ', '\n']) || token["rstrip"] == true
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
                Cut::ByteLevel
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
        (from.max(1)..bytes.len()).find(|&i| match bytes[i] {
            // ASCII neighbours alone, so that a cut is never inside a character and no Unicode
            // space or combining mark can take part in it.
            b' ' => {
                bytes[i - 1].is_ascii_alphanumeric()
                    && bytes.get(i + 1).is_some_and(u8::is_ascii_alphabetic)
            }
            // No word crosses a line end, and white space is matched from its beginning.
            b'\n' => text[..i].chars().next_back().is_some_and(ends_word),
            _ => false,
        })
    }
}

/// Whether a character is no white space by anyone's definition.
fn ends_word(c: char) -> bool {
    // The ranges are East Asian punctuation.
    c.is_ascii_graphic()
        || c.is_alphanumeric()
        || ('\u{3001}'..='\u{3020}').contains(&c)
        || ('\u{ff01}'..='\u{ff65}').contains(&c)
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
pub(crate) mod tests;
