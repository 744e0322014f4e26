//! Byte-pair encoding of words, over bytes or over characters, without the library.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;

use super::definition::{Definition, Merge};

/// Words up to this many symbols are merged by scanning, longer ones with a heap.
const SCANNED: usize = 32;

/// Symbols that merging begins with.
pub(super) enum Symbols {
    /// An id for each byte.
    Bytes([u32; 256]),
    /// An id for each character that has one, and for each byte of the others.
    Chars {
        chars: HashMap<char, u32, FxBuildHasher>,
        bytes: [u32; 256],
    },
}

/// Byte-pair encoding of words.
pub(super) struct Bpe {
    symbols: Symbols,
    /// Rank of a pair and the id that it becomes.
    merges: HashMap<(u32, u32), (u32, u32), FxBuildHasher>,
    /// Words that are not merged where the vocabulary holds them.
    whole: HashMap<Box<[u8]>, u32, FxBuildHasher>,
}

impl Bpe {
    /// From a `tokenizer.json`, over bytes or over characters; or why it is not known. `join` sees
    /// the text of every pair.
    pub(super) fn new(
        definition: &Definition<'_>,
        over_bytes: bool,
        mut join: impl FnMut(&str),
    ) -> Result<Self, &'static str> {
        let model = &definition.rest["model"];
        let empty = |field: &str| model[field].as_str().unwrap_or_default().is_empty();
        if !(model["dropout"].is_null() || model["dropout"] == 0.0)
            || !empty("continuing_subword_prefix")
            || !empty("end_of_word_suffix")
        {
            return Err("its merges have options");
        }
        let vocab = definition.vocab.as_ref().ok_or("it has no vocabulary")?;
        let id = |token: &str| vocab.get(token).copied();
        let mut bytes = [0; 256];
        let printable = printable();
        for (byte, c) in printable.iter().enumerate() {
            let token = if over_bytes {
                c.to_string()
            } else {
                format!("<{byte:#04X}>")
            };
            bytes[byte] = id(&token).ok_or("it does not hold every byte")?;
        }
        let mut whole = HashMap::default();
        let symbols = if over_bytes {
            if model["ignore_merges"] == true {
                let byte_of: HashMap<char, u8> =
                    (0..=255).map(|b| (printable[b as usize], b)).collect();
                let bytes = |token: &str| -> Option<Box<[u8]>> {
                    token.chars().map(|c| byte_of.get(&c).copied()).collect()
                };
                whole = vocab
                    .iter()
                    .filter_map(|(token, id)| Some((bytes(token)?, *id)))
                    .collect();
            }
            Symbols::Bytes(bytes)
        } else {
            let single = |(token, id): (&Cow<'_, str>, &u32)| {
                let mut chars = token.chars();
                chars
                    .next()
                    .filter(|_| chars.next().is_none())
                    .map(|c| (c, *id))
            };
            let chars = vocab.iter().filter_map(single).collect();
            Symbols::Chars { chars, bytes }
        };
        let pairs = definition.merges.as_ref().ok_or("it has no merges")?;
        let mut merges = HashMap::with_capacity_and_hasher(pairs.len(), FxBuildHasher);
        let mut both = String::new();
        for (rank, Merge(left, right)) in pairs.iter().enumerate() {
            both.clear();
            both.push_str(left);
            both.push_str(right);
            join(&both);
            let ids = id(left).zip(id(right)).zip(id(&both));
            let ((left, right), joined) = ids.ok_or("its merges are not in its vocabulary")?;
            merges.insert((left, right), (rank as u32, joined));
        }
        Ok(Bpe {
            symbols,
            merges,
            whole,
        })
    }

    /// Appends the ids of a word.
    pub(super) fn encode(&self, word: &str, out: &mut Vec<u32>) {
        if !self.whole.is_empty()
            && let Some(id) = self.whole.get(word.as_bytes())
        {
            return out.push(*id);
        }
        let start = out.len();
        match &self.symbols {
            Symbols::Bytes(ids) => out.extend(word.bytes().map(|b| ids[b as usize])),
            Symbols::Chars { chars, bytes } => {
                for c in word.chars() {
                    match chars.get(&c) {
                        Some(id) => out.push(*id),
                        None => {
                            let mut utf8 = [0; 4];
                            let fallback = c.encode_utf8(&mut utf8).bytes();
                            out.extend(fallback.map(|b| bytes[b as usize]));
                        }
                    }
                }
            }
        }
        self.merge(start, out);
    }

    /// Merges the leftmost of the pairs of lowest rank until none is left, in `out[start..]`.
    fn merge(&self, start: usize, out: &mut Vec<u32>) {
        if out.len() - start > SCANNED {
            return self.merge_long(start, out);
        }
        let rank = |ids: &[u32], i: usize| match self.merges.get(&(ids[i], ids[i + 1])) {
            Some(merge) => *merge,
            None => (u32::MAX, 0),
        };
        // ranks[i] is that of the pair (i, i + 1)
        let mut ranks = [(u32::MAX, 0); SCANNED];
        let ids = &mut out[start..];
        let mut count = ids.len();
        for (i, merge) in ranks[..count.saturating_sub(1)].iter_mut().enumerate() {
            *merge = rank(ids, i);
        }
        while count > 1 {
            let mut best = 0;
            for i in 1..count - 1 {
                if ranks[i].0 < ranks[best].0 {
                    best = i;
                }
            }
            let (lowest, joined) = ranks[best];
            if lowest == u32::MAX {
                break;
            }
            ids[best] = joined;
            ids.copy_within(best + 2..count, best + 1);
            ranks.copy_within(best + 1..count - 1, best);
            count -= 1;
            if best > 0 {
                ranks[best - 1] = rank(&ids[..count], best - 1);
            }
            if best + 1 < count {
                ranks[best] = rank(&ids[..count], best);
            }
        }
        out.truncate(start + count);
    }

    /// The same over a linked list, for words of any length.
    fn merge_long(&self, start: usize, out: &mut Vec<u32>) {
        let mut ids = out.split_off(start);
        let n = ids.len();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut alive = vec![true; n];
        // (rank, left, ids of both); stale entries are skipped
        let mut heap = BinaryHeap::new();
        let offer = |heap: &mut BinaryHeap<_>, ids: &[u32], left: usize, right: usize| {
            let pair = (ids[left], ids[right]);
            if let Some((rank, joined)) = self.merges.get(&pair) {
                heap.push(Reverse((*rank, left, pair, *joined)));
            }
        };
        for i in 0..n - 1 {
            offer(&mut heap, &ids, i, i + 1);
        }
        while let Some(Reverse((_, left, pair, joined))) = heap.pop() {
            let right = next[left];
            if !alive[left] || right == n || (ids[left], ids[right]) != pair {
                continue;
            }
            ids[left] = joined;
            alive[right] = false;
            next[left] = next[right];
            if next[left] < n {
                previous[next[left]] = left;
                offer(&mut heap, &ids, left, next[left]);
            }
            if previous[left] != usize::MAX {
                offer(&mut heap, &ids, previous[left], left);
            }
        }
        out.extend(
            ids.iter()
                .zip(alive)
                .filter(|(_, alive)| *alive)
                .map(|(id, _)| id),
        );
    }
}

/// The printable character that a byte-level vocabulary writes for each byte.
pub(super) fn printable() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let itself = matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if itself {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("below the surrogates")
    })
}
