//! Exact ids without the library where its pipeline is known: words are looked up, new ones made.

use super::byte_level::{ByteLevel, is_identity};
use super::cache::WordCache;
use super::definition::Definition;
use super::library::Library;
use super::metaspace::{Metaspace, Place};
use super::split::Words;
use super::word_piece::{Word, WordPiece};

/// A pipeline that is known here.
pub(super) enum Fast {
    ByteLevel(Box<ByteLevel>),
    Metaspace(Box<Metaspace>),
    WordPiece(Box<WordPiece>),
}

impl Fast {
    /// From a `tokenizer.json`; or why the library has to do all of it.
    pub(super) fn new(definition: &Definition<'_>) -> Result<Self, &'static str> {
        let model = &definition.rest["model"];
        let bytes = model["byte_fallback"] == true;
        match model["type"].as_str() {
            Some("WordPiece") => {
                vet_added(definition, true)?;
                WordPiece::new(definition).map(|m| Fast::WordPiece(Box::new(m)))
            }
            Some("BPE") if bytes => {
                Metaspace::new(definition).map(|m| Fast::Metaspace(Box::new(m)))
            }
            Some("BPE") => {
                vet_added(definition, !is_identity(&definition.rest["normalizer"]))?;
                ByteLevel::new(definition).map(|m| Fast::ByteLevel(Box::new(m)))
            }
            _ => Err("its model is neither BPE nor WordPiece"),
        }
    }

    /// Appends the ids of a text that spells out no added token.
    pub(super) fn encode(
        &self,
        text: &str,
        place: Place,
        library: &Library,
        cache: &mut WordCache,
        out: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let bytes = text.as_bytes();
        match self {
            Fast::ByteLevel(model) => {
                let normalized = model.normalized(text);
                let text = normalized.as_deref().unwrap_or(text);
                let before = out.len();
                let (mut at, mut words) = (0, Words::new());
                let next = || {
                    (at < text.len()).then(|| {
                        let start = at;
                        at = model.splitter.word_end(text, start, &mut words);
                        (start, at, ())
                    })
                };
                cache.words(text.as_bytes(), out, next, |word, (), out| {
                    model.bpe.encode(&text[word], out);
                    tokenizers::Result::Ok(())
                })?;
                if words.foreign {
                    out.truncate(before);
                    let made = library.get()?.encode_fast(text, false)?;
                    out.extend_from_slice(made.get_ids());
                }
                Ok(())
            }
            Fast::Metaspace(model) => {
                let mut at = 0;
                if model.prepends(text, place) {
                    at = model.encode_marked(text, out);
                }
                let next = || {
                    (at < text.len()).then(|| {
                        let start = at;
                        at = model.word_end(text, start);
                        (start, at, ())
                    })
                };
                cache.words(bytes, out, next, |word, (), out| {
                    model.encode(&text[word], out);
                    Ok(())
                })
            }
            Fast::WordPiece(model) => {
                let (mut end, oracle) = (0, library.get()?);
                let next = || {
                    let start = model.skip(bytes, end);
                    (start < bytes.len()).then(|| {
                        let plain;
                        (plain, end) = match model.word(text, start, oracle) {
                            Word::Plain(end) => (true, end),
                            Word::Single(end) | Word::Odd(end) => (false, end),
                        };
                        (start, end, plain)
                    })
                };
                cache.words(bytes, out, next, |word, plain, out| {
                    if plain {
                        model.pieces(&bytes[word], out);
                    } else {
                        let made = oracle.encode_fast(&text[word], false)?;
                        out.extend_from_slice(made.get_ids());
                    }
                    Ok(())
                })
            }
        }
    }
}

/// Refuses added tokens that are looked for in normalized text.
fn vet_added(definition: &Definition<'_>, normalizes: bool) -> Result<(), &'static str> {
    if normalizes && definition.added().any(|token| token["normalized"] == true) {
        return Err("its added tokens are looked for in normalized text");
    }
    Ok(())
}
