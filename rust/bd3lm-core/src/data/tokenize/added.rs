//! Added tokens: texts that become one id before anything else is done.

use aho_corasick::{AhoCorasick, BuildError, MatchKind};
use rustc_hash::FxHashMap;

use super::definition::Definition;

/// The added tokens of a tokenizer.
pub(super) struct Added {
    /// Tokens that are looked for first, and those looked for in what these leave.
    plain: [Option<Plain>; 2],
    /// Tokens whose place in a text depends on what is around them.
    odd: Option<AhoCorasick>,
}

struct Plain {
    finder: AhoCorasick,
    ids: Vec<u32>,
}

/// A part of a text.
pub(super) enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

impl Added {
    pub(super) fn new(
        definition: &Definition<'_>,
        ids: &FxHashMap<&str, u32>,
    ) -> Result<Self, BuildError> {
        let normalizes = !definition.rest["normalizer"].is_null();
        let mut plain: [(Vec<&str>, Vec<u32>); 2] = Default::default();
        let mut odd = Vec::new();
        for token in definition.added() {
            let content = token["content"].as_str().unwrap_or_default();
            let Some(id) = ids.get(content).copied() else {
                continue; // it is empty
            };
            let set = |field: &str| token[field] == true;
            let later = set("normalized");
            if set("lstrip") || set("rstrip") || set("single_word") || (later && normalizes) {
                odd.push(content);
            } else {
                plain[usize::from(later)].0.push(content);
                plain[usize::from(later)].1.push(id);
            }
        }
        let finder = |contents: &[&str]| {
            let kind = MatchKind::LeftmostLongest;
            AhoCorasick::builder().match_kind(kind).build(contents)
        };
        let [first, later] = plain;
        let plain = |(contents, ids): (Vec<&str>, Vec<u32>)| {
            let made = (!contents.is_empty()).then(|| finder(&contents));
            let made = made.transpose()?;
            Ok::<_, BuildError>(made.map(|finder| Plain { finder, ids }))
        };
        Ok(Added {
            plain: [plain(first)?, plain(later)?],
            odd: (!odd.is_empty()).then(|| finder(&odd)).transpose()?,
        })
    }

    /// Whether a text spells out a token that is left to the library.
    pub(super) fn is_odd(&self, text: &str) -> bool {
        self.odd.as_ref().is_some_and(|odd| odd.is_match(text))
    }

    /// Calls `take` with the parts of a text, in order.
    pub(super) fn divide<'a, E>(
        &self,
        text: &'a str,
        take: &mut impl FnMut(Part<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.divide_from(0, text, take)
    }

    fn divide_from<'a, E>(
        &self,
        pass: usize,
        text: &'a str,
        take: &mut impl FnMut(Part<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(plain) = self.plain.get(pass) else {
            return if text.is_empty() {
                Ok(())
            } else {
                take(Part::Text(text))
            };
        };
        let mut start = 0;
        for found in plain.iter().flat_map(|plain| plain.finder.find_iter(text)) {
            self.divide_from(pass + 1, &text[start..found.start()], take)?;
            let ids = &plain.as_ref().expect("it found a token").ids;
            take(Part::Token(ids[found.pattern().as_usize()]))?;
            start = found.end();
        }
        self.divide_from(pass + 1, &text[start..], take)
    }
}
