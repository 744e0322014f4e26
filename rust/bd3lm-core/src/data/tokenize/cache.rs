//! Ids of the words met so far: a table of fixed size, so that memory is bounded on any text.

use std::collections::HashMap;
use std::ops::Range;

use rustc_hash::FxBuildHasher;

use crate::cpu::prefetch::prefetch;

/// Ids that an entry of the table holds; words of more go to the map.
const INLINE: usize = 3;
/// Bytes of a word that a key holds, in addition to its length.
const KEY_BYTES: usize = 15;
/// Pairs of entries: 8 MiB, which holds the words of a large corpus that are worth keeping.
const SETS: usize = 1 << 17;
/// Pairs of entries of all threads together: 256 MiB.
const ALL_SETS: usize = 1 << 22;
/// Pairs of entries of the smallest table: 64 KiB.
const FEWEST_SETS: usize = 1 << 10;
/// Bytes of words and ids that the map holds before it is emptied.
const LONG_BYTES: usize = 8 << 20;

/// Words that are found before the first of them is looked up: their lines of the table come
/// meanwhile, which otherwise takes as long as all the rest.
const TOGETHER: usize = 16;

/// The key of a word that has too many bytes for the table, and of no other.
const LONG: u128 = u128::MAX;

/// A word of a text that is about to be looked up.
#[derive(Clone, Copy, Default)]
struct Wanted<K> {
    start: usize,
    end: usize,
    kind: K,
    /// [`LONG`] for a word that the table does not hold.
    key: u128,
    at: usize,
}

/// Two words whose hashes agree, the latest first: one line of the processor's cache.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Set {
    keys: [u128; 2],
    ids: [[u32; INLINE + 1]; 2],
}

/// Ids of words by their bytes. May forget a word; never gives wrong ids.
pub(super) struct WordCache {
    sets: Vec<Set>,
    long: HashMap<Box<[u8]>, Box<[u32]>, FxBuildHasher>,
    long_bytes: usize,
}

impl WordCache {
    /// A table for one of `threads` threads: smaller where there are many.
    pub(super) fn new(threads: usize) -> Self {
        let share = (ALL_SETS / threads.max(1)).clamp(FEWEST_SETS, SETS);
        WordCache {
            sets: vec![Set::default(); 1 << share.ilog2()],
            long: HashMap::default(),
            long_bytes: 0,
        }
    }

    /// Appends the ids of words of `text` to `out`: `next` finds them one after the other, as
    /// (start, end, kind) of non-empty words, and `make` appends the ids of one that is not known.
    #[inline]
    pub(super) fn words<K: Copy + Default, E>(
        &mut self,
        text: &[u8],
        out: &mut Vec<u32>,
        mut next: impl FnMut() -> Option<(usize, usize, K)>,
        make: impl Fn(Range<usize>, K, &mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut words = [Wanted::default(); TOGETHER];
        // Ids that were found and are not in `out` yet. All four numbers of an entry are copied
        // there, the next over those that are no ids: no branch depends on their count.
        let mut found = [0; (INLINE + 1) * TOGETHER];
        loop {
            let mut count = 0;
            while count < TOGETHER
                && let Some((start, end, kind)) = next()
            {
                let (mut key, mut at) = (LONG, 0);
                if end - start <= KEY_BYTES {
                    key = key_of(text, start, end - start);
                    at = self.place(key);
                    prefetch(&self.sets[at..=at]);
                }
                words[count] = Wanted {
                    start,
                    end,
                    kind,
                    key,
                    at,
                };
                count += 1;
            }
            if count == 0 {
                return Ok(());
            }
            let mut filled = 0;
            for word in &words[..count] {
                let (Wanted { key, at, .. }, range) = (*word, word.start..word.end);
                let set = &self.sets[at];
                let (first, second) = (set.keys[0] == key, set.keys[1] == key);
                let ids = set.ids[usize::from(second)];
                let held = ids[INLINE] as usize;
                if (first | second) & (held <= INLINE) {
                    found[filled..filled + INLINE + 1].copy_from_slice(&ids);
                    filled += held;
                } else {
                    out.extend_from_slice(&found[..filled]);
                    filled = 0;
                    let is_new = key != LONG && !(first | second);
                    let known = (key, at, is_new);
                    self.get(known, &text[range.clone()], out, |out| {
                        make(range, word.kind, out)
                    })?;
                }
            }
            out.extend_from_slice(&found[..filled]);
        }
    }

    /// Appends the ids of a word that the table does not hold; `is_new`: it has room for it.
    #[cold]
    fn get<E>(
        &mut self,
        (key, at, is_new): (u128, usize, bool),
        word: &[u8],
        out: &mut Vec<u32>,
        make: impl FnOnce(&mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        if !is_new {
            return self.get_long(word, out, make);
        }
        let before = out.len();
        make(out)?;
        let made = &out[before..];
        let mut ids = [0; INLINE + 1];
        ids[INLINE] = made.len().min(INLINE + 1) as u32;
        if made.len() <= INLINE {
            ids[..made.len()].copy_from_slice(made);
        } else {
            let made = made.into();
            self.keep(word, made);
        }
        let set = &mut self.sets[at];
        set.keys[1] = set.keys[0];
        set.ids[1] = set.ids[0];
        set.keys[0] = key;
        set.ids[0] = ids;
        Ok(())
    }

    #[cold]
    fn get_long<E>(
        &mut self,
        word: &[u8],
        out: &mut Vec<u32>,
        make: impl FnOnce(&mut Vec<u32>) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(ids) = self.long.get(word) {
            out.extend_from_slice(ids);
            return Ok(());
        }
        let before = out.len();
        make(out)?;
        let ids = out[before..].into();
        self.keep(word, ids);
        Ok(())
    }

    fn keep(&mut self, word: &[u8], ids: Box<[u32]>) {
        // Overhead of an entry of the map, about.
        let size = word.len() + 4 * ids.len() + 64;
        if size > LONG_BYTES / 64 {
            return;
        }
        self.long_bytes += size;
        if self.long_bytes > LONG_BYTES {
            self.long.clear();
            self.long_bytes = size;
        }
        self.long.insert(word.into(), ids);
    }
}

/// The bytes of a word of so many.
const MASKS: [u128; KEY_BYTES + 1] = {
    let mut masks = [0; KEY_BYTES + 1];
    let mut length = 0;
    while length <= KEY_BYTES {
        masks[length] = (1 << (8 * length)) - 1;
        length += 1;
    }
    masks
};

/// The bytes of a short word with its length above them; never 0.
#[inline]
fn key_of(text: &[u8], start: usize, length: usize) -> u128 {
    let bytes = if let Some(sixteen) = text.get(start..start + 16) {
        let all = u128::from_le_bytes(sixteen.try_into().expect("16 bytes"));
        all & MASKS[length]
    } else {
        let mut padded = [0; 16];
        padded[..length].copy_from_slice(&text[start..start + length]);
        u128::from_le_bytes(padded)
    };
    bytes | (length as u128) << (8 * KEY_BYTES)
}

impl WordCache {
    /// The set of a key.
    #[inline]
    fn place(&self, key: u128) -> usize {
        let (low, high) = (key as u64, (key >> 64) as u64);
        let product =
            u128::from(low ^ 0x9E37_79B9_7F4A_7C15) * u128::from(high ^ 0xD6E8_FEB8_6659_FD93);
        (product as u64 ^ (product >> 64) as u64) as usize & (self.sets.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lookups give the ids of the word, after any other lookups and evictions.
    #[test]
    fn ids_are_those_that_were_made() {
        let mut cache = WordCache::new(1);
        let ids = |word: &[u8]| -> Vec<u32> {
            let count = word[0] as usize % 6;
            (0..count)
                .map(|i| u32::from(word[i % word.len()]) + 7 * i as u32)
                .collect()
        };
        let (mut text, mut ends) = (Vec::new(), vec![0]);
        for i in 0..400_000u64 {
            let mut word = (i * 0x9E37_79B9).to_le_bytes().to_vec();
            word.resize(1 + (i % 40) as usize, 9);
            text.extend(word);
            ends.push(text.len());
        }
        text.extend_from_slice(b"more"); // the bytes behind are no part of a word
        let all: Vec<u32> = ends
            .windows(2)
            .flat_map(|w| ids(&text[w[0]..w[1]]))
            .collect();
        for round in 0..2 {
            let mut out = vec![1];
            let mut words = ends.windows(2);
            let next = || words.next().map(|w| (w[0], w[1], w[0] % 7));
            let made = cache.words(&text, &mut out, next, |word, kind, out| {
                assert_eq!(word.start % 7, kind);
                out.extend(ids(&text[word]));
                Ok::<_, ()>(())
            });
            made.unwrap();
            assert!(out[0] == 1 && out[1..] == all, "round {round}");
        }
        assert!(cache.long_bytes <= LONG_BYTES);
    }
}
