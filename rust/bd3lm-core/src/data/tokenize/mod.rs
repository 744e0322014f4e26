//! Text to token ids: exactly those of the `tokenizers` library, which is called as seldom as can be.

mod added;
mod bpe;
mod byte_level;
mod cache;
mod chars;
mod definition;
mod fast;
mod library;
mod metaspace;
mod plain;
mod rule;
mod split;
mod vet;
mod word_piece;

use serde_json::Value;

use crate::data::guard::guarded;
use crate::data::store::Vocab;
use crate::error::{Error, Result};
use added::{Added, Part};
use cache::WordCache;
use definition::Definition;
use fast::Fast;
use library::Library;
use metaspace::Place;

/// Text handed to the library at once: longer documents are cut where that is exact.
const PIECE: usize = 64 << 10;

/// Longest text whose cuts are looked for by the library alone.
const OFFSETS: usize = 1 << 20;

/// Texts on which a pipeline has to agree with the library before it is used.
const PROBES: [&str; 5] = [
    "The old house's 3rd door isn't  OPEN;\tthey'LL say \"we've\" -- (1,024.50)!\r\n\n  Ünïted, naïve.",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # ok\n\n\n",
    "日本語のテキスト、中文字符。한국어 العربية हिन्दी ไทย e\u{301}\u{323} ﬁ ½ Ⅳ 👩\u{200d}👩 \u{a0}\u{3000}\u{2028}.",
    "\u{0}\u{1}\u{b}\u{7f}\u{85}\u{feff}\u{fffd}\u{302e}\u{1d165}“q”—x…y  ",
    " \u{2581}HTMLElement/ǅ 'ſ\u{c5c}<s> http://www.x.org/a_b?c=1&d[0]=%20 $5 ▁▁ \u{1112}\u{1161}\u{11ab}",
];

/// A tokenizer with the special ids of its vocabulary.
pub struct Tokenizer {
    library: Library,
    vocab: Vocab,
    cut: Cut,
    fast: std::result::Result<Fast, &'static str>,
    added: Added,
}

/// Where a text can be cut without changing its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// Where the rule of a byte-level model lets words end before a space or a line end.
    ByteLevel,
    /// Before a space, which a model replaces by a mark.
    Metaspace,
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

/// Checks the definition of a tokenizer from a stranger before the library loads it.
///
/// # Errors
/// [`Error::Tokenizer`] for one that would abort the process, or run or grow without bound.
pub fn vet(json: &str, names: &[String]) -> Result<Vetted> {
    let definition = Definition::parse(json).map_err(|e| bad(&e))?;
    vet::vet(&definition).map_err(|e| bad(&e))?;
    Ok(Vetted {
        largest_id: definition.largest_id(),
        tokens: tokens(&definition, names),
    })
}

/// Parts of a definition, read without the library.
pub struct Vetted {
    /// Largest id.
    pub largest_id: Option<u64>,
    /// Number of tokens, and an id for each of the names that is one; `None` where only the library
    /// says whether the definition loads.
    pub tokens: Option<(usize, Vec<Option<u32>>)>,
}

fn tokens(definition: &Definition<'_>, names: &[String]) -> Option<(usize, Vec<Option<u32>>)> {
    let added = guarded(|| definition.added_ids()).ok()?.ok()?;
    let size = definition.vocab.as_ref()?.len();
    let more = added
        .keys()
        .filter(|content| definition.id(content).is_none());
    if !definition.merges_are_tokens() || Library::part(definition, &[]).get().is_err() {
        return None;
    }
    let id = |name: &String| added.get(&**name).copied().or(definition.id(name));
    Some((size + more.count(), names.iter().map(id).collect()))
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
        let mut definition = Definition::parse(json).map_err(|e| bad(&e))?;
        vet::vet(&definition).map_err(|e| bad(&e))?;
        let needed = definition.largest_id().map_or(0, |id| id + 1);
        if needed > u64::from(vocab.vocab_size) {
            return Err(bad(&format!(
                "it makes {needed} ids, more than the vocabulary of {}",
                vocab.vocab_size
            )));
        }
        definition.drop_dropout();
        definition.hide_mask(vocab.mask_id);
        let read = guarded(|| {
            let ids = definition.added_ids();
            let fast = ids.as_ref().map_err(|reason| *reason);
            let fast = fast.and_then(|_| Fast::new(&definition));
            (fast, Added::new(&definition, &ids.unwrap_or_default()))
        });
        let (fast, added) = read.map_err(|e| bad(&e))?;
        // Comparing needs a part of the library's tokenizer, which loads in a hundredth of the
        // time. WordPiece needs all of it for words that are not ASCII.
        let in_part = matches!(fast, Ok(Fast::ByteLevel(_) | Fast::Metaspace(_)));
        let library = if in_part {
            Library::part(&definition, &PROBES)
        } else {
            Library::new(json, vocab.mask_id)
        };
        library.get().map_err(|e| bad(&e))?;
        let mut made = Tokenizer {
            cut: Cut::of(&definition, &fast),
            fast,
            added: added.map_err(|e| bad(&e))?,
            library,
            vocab,
        };
        if made.fast.is_ok() && !made.agrees() {
            made.fast = Err("its ids are not those of its definition as it is read here");
            made.cut = Cut::Never;
        }
        if in_part {
            made.library = Library::new(json, vocab.mask_id);
        }
        Ok(made)
    }

    /// Whether the ids of odd texts are the library's.
    fn agrees(&self) -> bool {
        let mut encoder = self.encoder(usize::MAX);
        PROBES.iter().all(|text| {
            let mut ids = Vec::new();
            match (encoder.encode(text, false, &mut ids), self.encode(text)) {
                (Ok(()), Ok(known)) => ids == known,
                (made, known) => made.is_err() && known.is_err(),
            }
        })
    }

    /// The definition, as it was given.
    pub fn json(&self) -> &str {
        self.library.json()
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
        self.guarded(|library| library.encode_fast(text, false))
            .map(|encoding| encoding.get_ids().to_vec())
    }

    /// A text behind a cut for the library. It begins with a single space, which the normalizer of
    /// some puts there itself.
    fn continued<'a>(&self, text: &'a str, place: Place) -> &'a str {
        match &self.fast {
            Ok(Fast::Metaspace(model)) if model.prepends_to_all() && place == Place::Continued => {
                text.strip_prefix(' ').unwrap_or(text)
            }
            _ => text,
        }
    }

    fn guarded(
        &self,
        encode: impl FnOnce(&tokenizers::Tokenizer) -> tokenizers::Result<tokenizers::Encoding>,
    ) -> Result<tokenizers::Encoding> {
        guarded(|| self.library.get().and_then(encode))
            .map_err(|e| refused(&e))?
            .map_err(|e| refused(&e))
    }

    /// The end of the first part of a text whose ids are those it has in the whole: `from` bytes
    /// or a little more, or all of it.
    pub(crate) fn part(&self, text: &str, from: usize) -> usize {
        if text.len() <= from {
            return text.len();
        }
        let found = match (self.cut, &self.fast) {
            (Cut::ByteLevel, Ok(Fast::ByteLevel(model))) => model.splitter.cut(text, from),
            (Cut::Metaspace, Ok(Fast::Metaspace(model))) => model.cut(text, from),
            (Cut::AtSpace, _) => cut_at_space(text, from),
            _ => None,
        };
        found.unwrap_or(text.len())
    }
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
    /// Appends the ids of a text, without special tokens around it. `continued`: it is not the
    /// beginning of a document, but a part behind a cut.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the model cannot encode it.
    pub fn encode(&mut self, text: &str, continued: bool, out: &mut Vec<u32>) -> Result<()> {
        let mut place = if continued {
            Place::Continued
        } else {
            Place::Beginning
        };
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(self.tokenizer.part(rest, PIECE));
            self.encode_piece(piece, place, out)?;
            place = Place::Continued;
            rest = after;
        }
        Ok(())
    }

    fn encode_piece(&mut self, piece: &str, place: Place, out: &mut Vec<u32>) -> Result<()> {
        let tokenizer = self.tokenizer;
        let fast = match &tokenizer.fast {
            Ok(fast) if !tokenizer.added.is_odd(piece) => fast,
            _ => {
                let text = tokenizer.continued(piece, place);
                out.extend_from_slice(&tokenizer.encode(text)?);
                return Ok(());
            }
        };
        let mut place = place;
        let (library, cache) = (&tokenizer.library, &mut self.cache);
        let mut take = |part: Part<'_>| {
            match part {
                Part::Token(id) => out.push(id),
                Part::Text(text) => fast.encode(text, place, library, cache, out)?,
            }
            place = Place::Behind;
            tokenizers::Result::Ok(())
        };
        guarded(|| tokenizer.added.divide(piece, &mut take))
            .map_err(|e| refused(&e))?
            .map_err(|e| refused(&e))
    }

    /// As [`Self::encode`]; also finds places where the ids can be divided: no two of them are
    /// less than `spacing` bytes apart.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_seams(
        &mut self,
        text: &str,
        continued: bool,
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
            let place = if continued {
                Place::Continued
            } else {
                Place::Beginning
            };
            let rest = tokenizer.continued(text, place);
            let skipped = text.len() - rest.len();
            let encoding = tokenizer.guarded(|library| library.encode(rest, false))?;
            let (mut end, mut last) = (0, 0);
            for (ids, (from, to)) in encoding.get_offsets().iter().copied().enumerate() {
                let from = from + if from > 0 { skipped } else { 0 };
                if from >= end && from >= last + spacing && text.is_char_boundary(from) {
                    seams.push(Seam { ids, bytes: from });
                    last = from;
                }
                end = end.max(to + skipped);
            }
            out.extend_from_slice(encoding.get_ids());
            return Ok(seams);
        }
        let mut at = 0;
        while at < text.len() {
            let end = at + tokenizer.part(&text[at..], spacing);
            self.encode(&text[at..end], continued || at > 0, out)?;
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
    fn of(definition: &Definition<'_>, fast: &std::result::Result<Fast, &'static str>) -> Self {
        let (cut, ends): (_, &[char]) = match fast {
            Ok(Fast::ByteLevel(_)) => (Cut::ByteLevel, &[' ', '\n']),
            Ok(Fast::Metaspace(_)) => (Cut::Metaspace, &[' ']),
            _ if definition.rest["pre_tokenizer"]["type"] == "BertPreTokenizer" => {
                (Cut::AtSpace, &[' ', '\n'])
            }
            _ => (Cut::Never, &[]),
        };
        // Such a token can lie across any cut.
        let spaced = |token: &Value| {
            let content = token["content"].as_str().unwrap_or_default();
            content.contains(ends) || token["rstrip"] == true
        };
        if definition.added().any(spaced) {
            return Cut::Never;
        }
        cut
    }
}

/// The first cut at or after `from` between words that never cross a space.
fn cut_at_space(text: &str, from: usize) -> Option<usize> {
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
