//! BPE over characters in which a mark replaces the space: SentencePiece's models.

use rustc_hash::FxHashSet;
use serde_json::Value;

use super::bpe::Bpe;
use super::chars::char_at;
use super::definition::Definition;
use super::plain::run_end;

/// The mark in such vocabularies.
pub(super) const MARK: char = '\u{2581}';

/// When a text gets a mark that it does not begin with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Prepend {
    Never,
    /// Every text, and every text behind an added token, even before a space.
    Normalizer,
    /// The same, less those that begin with a space.
    Always,
    /// The beginning of a document, unless it is a space.
    First,
}

/// Where a text was in its document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Beginning,
    /// Behind a cut.
    Continued,
    /// Behind an added token.
    Behind,
}

/// The parts of such a tokenizer that its words and ids depend on.
pub(super) struct Metaspace {
    pub(super) bpe: Bpe,
    prepend: Prepend,
    joins: Joins,
}

/// Characters that are neighbours in a merged token. A word may end between any two others,
/// because no merge crosses them.
struct Joins {
    /// Bits of the ASCII characters that follow each of them.
    ascii: [[u64; 2]; 128],
    others: FxHashSet<(char, char)>,
    /// Whether each mark begins a word: nothing joins with it.
    splits: bool,
}

impl Joins {
    fn new(splits: bool) -> Self {
        Joins {
            ascii: [[0; 2]; 128],
            others: FxHashSet::default(),
            splits,
        }
    }

    fn add(&mut self, text: &str) {
        let before = text.chars().map(unmarked);
        let pairs = before.clone().zip(before.skip(1));
        for (a, b) in pairs.filter(|(_, b)| !(self.splits && *b == ' ')) {
            if a.is_ascii() && b.is_ascii() {
                self.ascii[a as usize][b as usize / 64] |= 1 << (b as u32 % 64);
            } else {
                self.others.insert((a, b));
            }
        }
    }

    #[inline]
    fn has(&self, a: char, b: char) -> bool {
        let (a, b) = (unmarked(a), unmarked(b));
        if a.is_ascii() && b.is_ascii() {
            return self.has_ascii(a as u8, b as u8);
        }
        self.others.contains(&(a, b))
    }

    #[inline]
    fn has_ascii(&self, a: u8, b: u8) -> bool {
        self.ascii[a as usize][b as usize / 64] >> (b % 64) & 1 == 1
    }
}

fn unmarked(c: char) -> char {
    if c == MARK { ' ' } else { c }
}

impl Metaspace {
    /// From a `tokenizer.json`; or why it is not known.
    pub(super) fn new(definition: &Definition<'_>) -> Result<Self, &'static str> {
        let (normalizer, pre) = (
            &definition.rest["normalizer"],
            &definition.rest["pre_tokenizer"],
        );
        let (normalizer_prepends, replaces) = normalizers(normalizer)?;
        let mut prepend = if normalizer_prepends {
            Prepend::Normalizer
        } else {
            Prepend::Never
        };
        let mut splits = false;
        match pre["type"].as_str() {
            None if replaces => {}
            // No space is left to be split at.
            Some("Split") if replaces && pre["pattern"]["String"] == " " => {}
            Some("Metaspace") if normalizer.is_null() => {
                if pre["replacement"].as_str() != Some(MARK.encode_utf8(&mut [0; 4])) {
                    return Err("its mark of a space is not SentencePiece's");
                }
                prepend = match pre["prepend_scheme"].as_str() {
                    Some("never") => Prepend::Never,
                    Some("first") => Prepend::First,
                    Some("always") => Prepend::Always,
                    _ => return Err("its pre-tokenizer is of an older form"),
                };
                splits = pre["split"] != false;
            }
            _ => return Err("its pre-tokenizer is not SentencePiece's"),
        }
        let marked = |token: &Value| {
            let content = token["content"].as_str().unwrap_or_default();
            token["normalized"] == true && content.contains([' ', MARK])
        };
        if !normalizer.is_null() && definition.added().any(marked) {
            return Err("its added tokens are looked for in normalized text");
        }
        let model = &definition.rest["model"];
        if model["byte_fallback"] != true || model["ignore_merges"] == true {
            return Err("it does not fall back to bytes");
        }
        let mut joins = Joins::new(splits);
        let bpe = Bpe::new(definition, false, |text| joins.add(text))?;
        Ok(Metaspace {
            bpe,
            prepend,
            joins,
        })
    }

    /// Whether every text gets a mark, which one behind a cut must not.
    pub(super) fn prepends_to_all(&self) -> bool {
        self.prepend == Prepend::Normalizer
    }

    /// Whether a text at a place gets a mark.
    pub(super) fn prepends(&self, text: &str, place: Place) -> bool {
        let marked = text.starts_with([' ', MARK]);
        match self.prepend {
            Prepend::Never => false,
            Prepend::Normalizer => place != Place::Continued,
            Prepend::Always => !marked,
            Prepend::First => !marked && place == Place::Beginning,
        }
    }

    /// The end of the word of `text` that begins at `at`, which is not its end.
    ///
    /// A run of ASCII letters is not divided, even between letters that nothing joins: most words
    /// are one, and the ids are the same.
    #[inline]
    pub(super) fn word_end(&self, text: &str, at: usize) -> usize {
        let bytes = text.as_bytes();
        let end = run_end::<0x20>(bytes, at + usize::from(bytes[at] == b' '));
        if end > at
            && let Some(b) = bytes.get(end)
            && b.is_ascii()
            && !self.joins.has_ascii(bytes[end - 1], *b)
        {
            return end;
        }
        self.other_end(text, end, at)
    }

    /// The same for a word of more than a space and letters, whose first part ends at `end`.
    fn other_end(&self, text: &str, mut end: usize, at: usize) -> usize {
        let bytes = text.as_bytes();
        let mut before = text[at..end].chars().next_back();
        while end < bytes.len() {
            let (c, length) = char_at(text, end);
            if before.is_some_and(|before| !self.joins.has(before, c)) {
                break;
            }
            end += length;
            before = Some(c);
            if c.is_ascii_alphabetic() {
                end = run_end::<0x20>(bytes, end);
                before = Some(bytes[end - 1] as char);
            }
        }
        end
    }

    /// Appends the ids of a mark and the beginning of `text`; returns where that ends.
    pub(super) fn encode_marked(&self, text: &str, out: &mut Vec<u32>) -> usize {
        let first = text.chars().next();
        let joined = first.is_some_and(|c| self.joins.has(MARK, c));
        let end = if joined { self.word_end(text, 0) } else { 0 };
        self.encode(&format!("{MARK}{}", &text[..end]), out);
        end
    }

    /// Appends the ids of a word.
    pub(super) fn encode(&self, word: &str, out: &mut Vec<u32>) {
        if word.contains(' ') {
            self.bpe.encode(&word.replace(' ', "\u{2581}"), out);
        } else {
            self.bpe.encode(word, out);
        }
    }

    /// The first place at or after `from` where cutting the text changes no word: before a space
    /// alone.
    pub(super) fn cut(&self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        (from.max(1)..bytes.len().saturating_sub(1)).find(|&i| {
            bytes[i] == b' '
                && bytes[i - 1].is_ascii_alphanumeric()
                && bytes[i + 1].is_ascii_alphabetic()
                && !self.joins.has_ascii(bytes[i - 1], b' ')
        })
    }
}

/// Whether a normalizer prepends the mark, and whether it replaces spaces by it.
fn normalizers(part: &Value) -> Result<(bool, bool), &'static str> {
    let alone = std::slice::from_ref(part);
    let parts = match part["type"].as_str() {
        None => &[],
        Some("Sequence") => part["normalizers"].as_array().map_or(alone, Vec::as_slice),
        _ => alone,
    };
    let mark = Some(MARK.to_string());
    let mut found = (false, false);
    for part in parts {
        let text = |field: &str| part[field].as_str().map(str::to_owned);
        match part["type"].as_str() {
            Some("Prepend") if text("prepend") == mark && !found.0 => found.0 = true,
            Some("Replace") if part["pattern"]["String"] == " " && text("content") == mark => {
                found.1 = true;
            }
            _ => return Err("it normalizes text in a way that is not known here"),
        }
    }
    Ok(found)
}
