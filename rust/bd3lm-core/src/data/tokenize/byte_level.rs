//! Byte-level BPE with GPT-2's rule for words, without the library.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use rustc_hash::FxBuildHasher;
use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::chars::{Kinds, char_at};

const LETTER: u8 = 0;
const NUMBER: u8 = 1;
const OTHER: u8 = 2;
const SPACE: u8 = 3;
const WIDE: u8 = 4;

/// Kinds of the ASCII characters; the bytes of all others are [`WIDE`].
const ASCII: [u8; 256] = {
    let mut kinds = [WIDE; 256];
    let mut i = 0;
    while i < 128 {
        let c = i as u8;
        kinds[i] = if c.is_ascii_alphabetic() {
            LETTER
        } else if c.is_ascii_digit() {
            NUMBER
        } else if c == b' ' || (c >= 9 && c <= 13) {
            SPACE
        } else {
            OTHER
        };
        i += 1;
    }
    kinds
};

/// Words up to this many bytes are merged by scanning, longer ones with a heap.
const SCANNED: usize = 32;

/// The parts of such a tokenizer that its words and ids depend on.
pub(super) struct ByteLevel {
    /// Id of each byte.
    bytes: [u32; 256],
    /// Rank of a pair and the id that it becomes.
    merges: HashMap<(u32, u32), (u32, u32), FxBuildHasher>,
    kinds: Kinds,
}

impl ByteLevel {
    /// From a `tokenizer.json`, or the reason for which the library is needed.
    pub(super) fn new(definition: &Value) -> Result<Self, &'static str> {
        let pre = &definition["pre_tokenizer"];
        if !definition["normalizer"].is_null() {
            return Err("it normalizes text");
        }
        if pre["type"] != "ByteLevel"
            || pre["add_prefix_space"] != false
            || pre["use_regex"] == false
        {
            return Err("its pre-tokenizer is not GPT-2's");
        }
        let model = &definition["model"];
        let empty = |field: &str| model[field].as_str().unwrap_or_default().is_empty();
        if !(model["dropout"].is_null() || model["dropout"] == 0.0)
            || !empty("continuing_subword_prefix")
            || !empty("end_of_word_suffix")
            || model["ignore_merges"] == true
        {
            return Err("its merges have options");
        }
        let vocab = model["vocab"].as_object().ok_or("it has no vocabulary")?;
        // Hundreds of thousands of look-ups: hashed, they take a third of the time.
        let vocab: HashMap<&str, u32, FxBuildHasher> = vocab
            .iter()
            .filter_map(|(token, id)| Some((token.as_str(), id.as_u64()? as u32)))
            .collect();
        let id = |token: &str| vocab.get(token).copied();
        let mut bytes = [0; 256];
        for (byte, c) in printable().into_iter().enumerate() {
            bytes[byte] = id(c.encode_utf8(&mut [0; 4])).ok_or("it does not hold every byte")?;
        }
        let mut merges = HashMap::default();
        for (rank, merge) in model["merges"].as_array().into_iter().flatten().enumerate() {
            let pair = match merge {
                Value::String(pair) => pair.split_once(' '),
                pair => pair[0].as_str().zip(pair[1].as_str()),
            };
            let (left, right) = pair.ok_or("its merges are not pairs")?;
            let ids = id(left).zip(id(right)).zip(id(&format!("{left}{right}")));
            let ((left, right), joined) = ids.ok_or("its merges are not in its vocabulary")?;
            merges.insert((left, right), (rank as u32, joined));
        }
        Ok(ByteLevel {
            bytes,
            merges,
            kinds: Kinds::new(),
        })
    }

    /// The end of the word of `text` that begins at `at`, as the rule
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` has it.
    #[inline]
    pub(super) fn word_end(&self, text: &str, at: usize) -> usize {
        let bytes = text.as_bytes();
        let mut start = at;
        match bytes[at] {
            b'\'' => {
                if let Some(length) = contraction(&bytes[at + 1..]) {
                    return at + 1 + length;
                }
            }
            b' ' => start += 1,
            _ => {}
        }
        if start == bytes.len() {
            return start;
        }
        let (kind, mut end) = self.kind(text, start);
        if kind == SPACE {
            return self.spaces_end(text, at);
        }
        loop {
            while end < bytes.len() && ASCII[bytes[end] as usize] == kind {
                end += 1;
            }
            if end == bytes.len() || ASCII[bytes[end] as usize] != WIDE {
                return end;
            }
            let (next, after) = self.kind(text, end);
            if next != kind {
                return end;
            }
            end = after;
        }
    }

    /// White space, less its last character where something follows.
    fn spaces_end(&self, text: &str, at: usize) -> usize {
        let (mut last, mut end) = (at, at);
        while end < text.len() {
            let (kind, after) = self.kind(text, end);
            if kind != SPACE {
                return if last > at { last } else { end };
            }
            (last, end) = (end, after);
        }
        end
    }

    /// The kind of the character at `at`, and where it ends.
    #[inline]
    fn kind(&self, text: &str, at: usize) -> (u8, usize) {
        match ASCII[text.as_bytes()[at] as usize] {
            WIDE => {
                let (c, length) = char_at(text, at);
                (self.kinds.of(c, ask), at + length)
            }
            kind => (kind, at + 1),
        }
    }

    /// Appends the ids of one word: the leftmost of the pairs of lowest rank is merged until none
    /// is left.
    pub(super) fn merge(&self, word: &[u8], out: &mut Vec<u32>) {
        if word.len() > SCANNED {
            return self.merge_long(word, out);
        }
        let start = out.len();
        out.extend(word.iter().map(|b| self.bytes[*b as usize]));
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
    fn merge_long(&self, word: &[u8], out: &mut Vec<u32>) {
        let n = word.len();
        let mut ids: Vec<u32> = word.iter().map(|b| self.bytes[*b as usize]).collect();
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

/// Length of the letters after the apostrophe of one of the seven English contractions.
#[inline]
fn contraction(rest: &[u8]) -> Option<usize> {
    match rest {
        [b's' | b't' | b'm' | b'd', ..] => Some(1),
        [b'r' | b'v', b'e', ..] | [b'l', b'l', ..] => Some(2),
        _ => None,
    }
}

/// The kind of a character in the library's own rule, by the characters that it joins.
#[cold]
fn ask(c: char) -> u8 {
    let rule = tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, false, true);
    let joins = |before: char| {
        let mut text = PreTokenizedString::from(format!("{before}{c}"));
        rule.pre_tokenize(&mut text)
            .expect("this rule takes any text");
        text.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .len()
            == 1
    };
    match () {
        () if joins('a') => LETTER,
        () if joins('1') => NUMBER,
        () if joins('!') => OTHER,
        () => SPACE,
    }
}

/// The printable character that stands for each byte in such a vocabulary.
fn printable() -> [char; 256] {
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
