//! Kinds of characters, computed by the library once each and then cached.

use std::sync::atomic::{AtomicU8, Ordering};

const UNKNOWN: u8 = u8::MAX;

/// A byte for each character, filled in as they are met.
pub(super) struct Kinds(Box<[AtomicU8]>);

impl Kinds {
    pub(super) fn new() -> Self {
        Kinds(
            (0..=char::MAX as u32)
                .map(|_| AtomicU8::new(UNKNOWN))
                .collect(),
        )
    }

    /// The kind of `c`; `ask` is called where it is not known yet, and returns less than 255.
    #[inline]
    pub(super) fn of(&self, c: char, ask: impl FnOnce(char) -> u8) -> u8 {
        let cell = &self.0[c as usize];
        let kind = cell.load(Ordering::Relaxed);
        if kind != UNKNOWN {
            return kind;
        }
        // Threads that look a character up at the same time get the same kind.
        let kind = ask(c);
        debug_assert!(kind != UNKNOWN);
        cell.store(kind, Ordering::Relaxed);
        kind
    }
}

/// The character that begins at a boundary of `text`, and its length in bytes.
#[inline]
pub(super) fn char_at(text: &str, at: usize) -> (char, usize) {
    let c = text[at..].chars().next().expect("within the text");
    (c, c.len_utf8())
}
