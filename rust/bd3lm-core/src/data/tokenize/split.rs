//! Text to words by one rule or several, each of which divides the pieces of the one before.

use std::collections::HashMap;

use serde_json::Value;

use super::chars::{Kinds, char_at};
use super::plain::{Plain, Run, run_end};
use super::rule::{Atoms, Automaton, MOST, NONE, Rule, SPACES};

/// The rule of the library's `ByteLevel`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Most rules of one tokenizer.
const MOST_LEVELS: usize = 4;
/// The kind of the bytes of a character beyond ASCII.
const WIDE: u8 = MOST as u8 - 1;
/// A character of a kind that was not foreseen.
const FOREIGN: u8 = MOST as u8 - 2;

/// A character of each category of Unicode, and those that fold into ASCII or differ between
/// definitions of white space.
const SAMPLES: &str = "éÉǅʰªا\u{301}\u{903}\u{20dd}٣Ⅳ½‿—«»‹›“”¡∑€^`˄©\u{a0}\u{2003}\u{2028}\u{2029}\
     \u{85}\u{ad}\u{200b}\u{feff}\u{e000}\u{378}\u{fffe}ſK中ぁア゠ー々한😀\u{1f3fb}\u{3000}ⓐ゛ˆㆍ𐀀𝟘\u{e0100}\u{180e}";

struct Level {
    rule: Automaton,
    /// Which ASCII characters do not change a state.
    runs: Vec<Run>,
    /// Kinds with which a match can begin.
    begins: u64,
    /// Whether text between matches is dropped.
    drops: bool,
    plain: Plain,
}

/// The rules of a tokenizer.
pub(super) struct Splitter {
    levels: Vec<Level>,
    atoms: Atoms,
    /// The atoms of each kind.
    signatures: Vec<u64>,
    ascii: [u8; 256],
    kinds: Kinds,
    /// Kinds of the characters behind which text may be cut: before a space and a line end.
    cuts: [u64; 2],
}

/// Where the words of one text are.
pub(super) struct Words {
    ends: [usize; MOST_LEVELS],
    /// Whether a character was met whose kind was not foreseen.
    pub(super) foreign: bool,
}

impl Splitter {
    /// From the `pre_tokenizer` of a byte-level model; or why it is not known.
    pub(super) fn new(pre: &Value) -> Result<Self, &'static str> {
        let alone = std::slice::from_ref(pre);
        let parts = match pre["type"].as_str() {
            Some("Sequence") => pre["pretokenizers"].as_array().map_or(alone, Vec::as_slice),
            _ => alone,
        };
        let (last, before) = parts.split_last().ok_or("it has no rule for words")?;
        if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
            return Err("its pre-tokenizer does not end with plain bytes");
        }
        let mut atoms = Atoms::default();
        let mut rules = Vec::new();
        for part in before {
            rules.push(match part["type"].as_str() {
                Some("Split") => {
                    let pattern = part["pattern"]["Regex"].as_str();
                    let drops = match (part["behavior"].as_str(), part["invert"].as_bool()) {
                        (Some("Isolated"), Some(false)) => false,
                        (Some("Removed"), Some(true)) => true,
                        _ => return Err("it splits text in a way that is not known here"),
                    };
                    let pattern = pattern.ok_or("it splits text at a fixed string")?;
                    (Rule::parse(pattern, &mut atoms)?, drops)
                }
                Some("Digits") => {
                    let individual = part["individual_digits"] == true;
                    (Rule::digits(individual, &mut atoms)?, false)
                }
                _ => return Err("it splits text in a way that is not known here"),
            });
        }
        if last["use_regex"] != false {
            rules.push((Rule::parse(GPT2, &mut atoms)?, false));
        }
        if rules.is_empty() || rules.len() > MOST_LEVELS {
            return Err("it has no rule for words, or too many");
        }
        let mut splitter = Splitter {
            levels: Vec::new(),
            atoms,
            signatures: Vec::new(),
            ascii: [WIDE; 256],
            kinds: Kinds::new(),
            cuts: [0; 2],
        };
        splitter.sample()?;
        for (rule, drops) in rules {
            let rule = rule.automaton(&splitter.signatures)?;
            let kinds = 0..splitter.signatures.len();
            let begins = kinds.filter(|kind| rule.next[1][*kind] != 0);
            let runs = rule.stays.iter().map(|stays| splitter.run(*stays));
            let runs: Vec<Run> = runs.collect();
            let level = Level {
                begins: begins.fold(0, |all, kind| all | 1 << kind),
                plain: Plain::new(&rule, &runs, &splitter.ascii),
                runs,
                rule,
                drops,
            };
            splitter.levels.push(level);
        }
        splitter.cuts = [b' ', b'\n'].map(|next| splitter.cuts_before(next));
        Ok(splitter)
    }

    fn run(&self, stays: u64) -> Run {
        let is = |wanted: fn(&u8) -> bool| {
            (0..128u8).all(|byte| wanted(&byte) == (stays >> self.ascii[byte as usize] & 1 == 1))
        };
        if is(u8::is_ascii_alphabetic) {
            Run::Letters
        } else if is(u8::is_ascii_lowercase) {
            Run::Lower
        } else {
            Run::Other
        }
    }

    /// Numbers the kinds that there are.
    fn sample(&mut self) -> Result<(), &'static str> {
        let mut numbers = HashMap::new();
        let ascii = (0..128).map(|byte| byte as u8 as char);
        let edges: Vec<char> = self.atoms.edges().collect();
        for c in ascii.chain(SAMPLES.chars()).chain(edges) {
            let signature = self.atoms.of(c);
            let number = *numbers.entry(signature).or_insert_with(|| {
                self.signatures.push(signature);
                self.signatures.len() - 1
            });
            if number >= FOREIGN as usize {
                return Err("its rule for words distinguishes too many kinds of characters");
            }
            if c.is_ascii() {
                self.ascii[c as usize] = number as u8;
            }
        }
        Ok(())
    }

    /// Kinds of characters behind which every word ends where `next` follows, and a word begins
    /// with `next`.
    fn cuts_before(&self, next: u8) -> u64 {
        let next = self.ascii[next as usize] as usize;
        let last = &self.levels[self.levels.len() - 1].rule;
        if last.matched[last.next[1][next] as usize] == NONE {
            return 0;
        }
        let ends = |kind: &usize| {
            self.levels.iter().all(|level| {
                let behind = level.rule.next.iter().map(|row| row[*kind]);
                let mut behind = behind.filter(|state| *state != 0);
                behind.all(|state| level.rule.next[state as usize][next] == 0)
            })
        };
        let kinds = (0..self.signatures.len()).filter(ends);
        kinds.fold(0, |all, kind| all | 1 << kind)
    }

    /// The first place at or after `from` where cutting the text changes no word.
    pub(super) fn cut(&self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        (from.max(1)..bytes.len()).find(|&i| {
            let cuts = match bytes[i] {
                b' ' => self.cuts[0],
                b'\n' => self.cuts[1],
                _ => return false,
            };
            let before = text[..i]
                .chars()
                .next_back()
                .expect("a character ends here");
            cuts >> self.kind_of(before) & 1 == 1
        })
    }

    fn kind_of(&self, c: char) -> u8 {
        if c.is_ascii() {
            return self.ascii[c as usize];
        }
        self.kinds.of(c, |c| {
            let signature = self.atoms.of(c);
            let number = self.signatures.iter().position(|known| *known == signature);
            number.map_or(FOREIGN, |number| number as u8)
        })
    }

    /// The kind of the character at `at`, and where it ends.
    #[inline(always)]
    fn kind(&self, text: &str, at: usize) -> (u8, usize) {
        match self.ascii[text.as_bytes()[at] as usize] {
            WIDE => {
                let (c, length) = char_at(text, at);
                (self.kind_of(c), at + length)
            }
            kind => (kind, at + 1),
        }
    }

    /// The word of `text` that begins at `at`, which is not its end.
    #[inline]
    pub(super) fn word_end(&self, text: &str, at: usize, words: &mut Words) -> usize {
        let last = self.levels.len() - 1;
        let mut limit = if last == 0 {
            text.len()
        } else {
            words.ends[last - 1]
        };
        if limit <= at {
            limit = self.limit(text, at, words);
        }
        match self.levels[last].plain.end(&text.as_bytes()[..limit], at) {
            Some(end) => end,
            None => self.piece_end(last, &text[..limit], at, words),
        }
    }

    /// The end of the piece in which the last rule looks for a word, by all rules before it.
    #[cold]
    fn limit(&self, text: &str, at: usize, words: &mut Words) -> usize {
        let last = self.levels.len() - 1;
        let mut level = last;
        while level > 0 && words.ends[level - 1] <= at {
            level -= 1;
        }
        let mut limit = text.len();
        for level in level..last {
            if level > 0 {
                limit = words.ends[level - 1];
            }
            limit = self.piece_end(level, &text[..limit], at, words);
            words.ends[level] = limit;
        }
        limit
    }

    /// The end of the match, or of the text between matches, that begins at `at`.
    #[inline(always)]
    fn piece_end(&self, level: usize, text: &str, at: usize, words: &mut Words) -> usize {
        let level = &self.levels[level];
        match self.find(level, text, at, words) {
            Some(end) => end,
            None => self.gap_end(level, text, at, words),
        }
    }

    #[cold]
    fn gap_end(&self, level: &Level, text: &str, at: usize, words: &mut Words) -> usize {
        words.foreign |= level.drops;
        let bytes = text.as_bytes();
        let (_, mut end) = self.kind(text, at);
        while end < bytes.len() {
            let (kind, after) = self.kind(text, end);
            words.foreign |= kind == FOREIGN;
            if level.begins >> kind & 1 == 1 && self.find(level, text, end, words).is_some() {
                break;
            }
            end = after;
        }
        end
    }

    /// The end of the match of a rule that begins at `at`.
    #[inline(always)]
    fn find(&self, level: &Level, text: &str, at: usize, words: &mut Words) -> Option<usize> {
        let (rule, runs) = (&level.rule, &level.runs);
        let bytes = text.as_bytes();
        let (mut state, mut end) = (1, at);
        let (mut found, mut how) = (None, NONE);
        while end < bytes.len() {
            let (kind, after) = self.kind(text, end);
            if kind == FOREIGN {
                words.foreign = true;
                return Some(after);
            }
            state = rule.next[state][kind as usize] as usize;
            if state == 0 {
                break;
            }
            end = after;
            match runs[state] {
                Run::Letters => end = run_end::<0x20>(bytes, end),
                Run::Lower => end = run_end::<0>(bytes, end),
                Run::Other => {
                    let stays = rule.stays[state];
                    while end < bytes.len() && stays >> self.ascii[bytes[end] as usize] & 1 == 1 {
                        end += 1;
                    }
                }
            }
            if rule.matched[state] != NONE {
                (found, how) = (Some(end), rule.matched[state]);
            }
        }
        let end = found?;
        if how == SPACES && end < bytes.len() {
            let last = text[at..end].chars().next_back().expect("it matched");
            if end - last.len_utf8() > at {
                return Some(end - last.len_utf8());
            }
        }
        Some(end)
    }
}

impl Words {
    pub(super) fn new() -> Self {
        Words {
            ends: [0; MOST_LEVELS],
            foreign: false,
        }
    }
}
