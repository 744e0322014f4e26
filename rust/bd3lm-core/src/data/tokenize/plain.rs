//! Words of ASCII letters, which most are: found without an automaton.

use super::rule::{Automaton, MATCH};

/// The ASCII characters that do not change a state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    Letters,
    Lower,
    Other,
}

/// Words of ASCII letters, which need no steps of the automaton: behind one other character or
/// none, up to one that ends every word.
pub(super) struct Plain {
    /// Bytes before the letters of a word that begins with a byte, or [`Plain::NONE`].
    leads: [u8; 256],
    /// Whether a word of letters ends before a byte.
    ends: [bool; 256],
}

impl Plain {
    const NONE: u8 = 2;

    pub(super) fn new(rule: &Automaton, runs: &[Run], ascii: &[u8; 256]) -> Self {
        let mut plain = Plain {
            leads: [Self::NONE; 256],
            ends: [false; 256],
        };
        let next = |state: u8, byte: u8| rule.next[state as usize][ascii[byte as usize] as usize];
        let letters = || (0..128).filter(u8::is_ascii_alphabetic);
        let inside = next(1, b'a');
        if runs[inside as usize] != Run::Letters
            || rule.matched[inside as usize] != MATCH
            || letters().any(|letter| next(1, letter) != inside)
        {
            return plain;
        }
        for byte in 0..128 {
            let begun = next(1, byte);
            if byte.is_ascii_alphabetic() {
                plain.leads[byte as usize] = 0;
            } else if begun != 0 && letters().all(|letter| next(begun, letter) == inside) {
                plain.leads[byte as usize] = 1;
            }
            plain.ends[byte as usize] = next(inside, byte) == 0;
        }
        plain
    }

    /// The end of such a word that begins at `at`; `None` where another may begin there.
    #[inline(always)]
    pub(super) fn end(&self, text: &[u8], at: usize) -> Option<usize> {
        let lead = self.leads[text[at] as usize];
        if lead == Self::NONE {
            return None;
        }
        let start = at + lead as usize;
        let end = run_end::<0x20>(text, start);
        let is_whole = end > start && self.ends[*text.get(end)? as usize];
        is_whole.then_some(end)
    }
}

/// The end of a run of ASCII letters that begins at `at`, eight at a time: a branch for each letter
/// would be predicted wrongly once a word. `FOLD` is the bit of the case that does not matter.
#[inline]
pub(super) fn run_end<const FOLD: u8>(bytes: &[u8], mut at: usize) -> usize {
    const HIGH: u64 = 0x8080_8080_8080_8080;
    const fn all(byte: u8) -> u64 {
        u64::from_le_bytes([byte; 8])
    }
    while let Some(eight) = bytes.get(at..at + 8) {
        let eight = u64::from_le_bytes(eight.try_into().expect("8 bytes"));
        let low = (eight | all(FOLD)) & !HIGH;
        // The high bit of a byte: at least `a`, and above `z`. Neither sum carries.
        let (from, beyond) = (low + all(0x80 - b'a'), low + all(0x7F - b'z'));
        let others = !(from & !beyond & !eight) & HIGH;
        if others != 0 {
            return at + others.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while at < bytes.len() && (bytes[at] | FOLD).is_ascii_lowercase() {
        at += 1;
    }
    at
}
