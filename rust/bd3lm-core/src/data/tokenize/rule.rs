//! Rules that split text into words: regular expressions as automata over kinds of characters.
//!
//! The structure of an expression is compiled here. Which characters a class such as `\p{L}` holds
//! is decided by the library's own engine, once for each character, so that tables of Unicode
//! never differ.

use std::collections::HashMap;

use regex_syntax::ast::{self, Ast, GroupKind, RepetitionKind, RepetitionRange};
use tokenizers::utils::SysRegex;

/// White space less its last character, where something follows: the one look-ahead that is known.
const GIVE_BACK: &str = r"|\s+(?!\S)|\s+";
/// Alternatives that ignore case. Others could match one character as two, such as `ß`.
const CASELESS: [&str; 2] = ["'s|'t|'re|'ve|'m|'ll|'d", "[sdmt]|ll|ve|re"];
/// Most kinds of characters, and most states.
pub(super) const MOST: usize = 64;
/// Most repetitions that are written out.
const MOST_COPIES: u32 = 8;

const UNKNOWN: &str = "its rule for words has parts that are not known here";

/// Sets of characters that rules distinguish.
#[derive(Default)]
pub(super) struct Atoms {
    texts: Vec<String>,
    regexes: Vec<Option<SysRegex>>,
}

impl Atoms {
    /// The characters that Rust takes for numbers, as the library's `Digits` does.
    const NUMERIC: &str = "char::is_numeric";

    fn add(&mut self, text: &str) -> Result<usize, &'static str> {
        if let Some(at) = self.texts.iter().position(|known| known == text) {
            return Ok(at);
        }
        self.regexes.push(if text == Self::NUMERIC {
            None
        } else {
            Some(SysRegex::new(text).map_err(|_| UNKNOWN)?)
        });
        self.texts.push(text.into());
        if self.texts.len() > 64 {
            return Err(UNKNOWN);
        }
        Ok(self.texts.len() - 1)
    }

    /// A bit for each atom that holds `c`.
    pub(super) fn of(&self, c: char) -> u64 {
        let mut utf8 = [0; 4];
        let text: &str = c.encode_utf8(&mut utf8);
        let holds = |regex: &Option<SysRegex>| match regex {
            None => c.is_numeric(),
            Some(regex) => regex.find_iter(text).next() == Some((0, text.len())),
        };
        let bits = self.regexes.iter().enumerate();
        bits.fold(0, |all, (i, regex)| all | u64::from(holds(regex)) << i)
    }

    /// Characters at the edges of the ranges that are written out.
    pub(super) fn edges(&self) -> impl Iterator<Item = char> {
        let written = self.texts.iter().flat_map(|text| text.chars());
        written.flat_map(|c| {
            let near = (c as u32).saturating_sub(1)..=c as u32 + 1;
            near.filter_map(char::from_u32)
        })
    }
}

/// A program of a matcher: threads in the order of their preference.
enum Step {
    Char(usize, usize),
    Either(usize, usize),
    Match(u8),
}

/// A rule as a program over atoms.
pub(super) struct Rule {
    steps: Vec<Step>,
    start: usize,
}

/// No match, a match, and a match of white space that gives back its last character.
pub(super) const NONE: u8 = 0;
pub(super) const MATCH: u8 = 1;
pub(super) const SPACES: u8 = 2;

impl Rule {
    /// From an expression in the library's syntax; or why it is not known.
    pub(super) fn parse(pattern: &str, atoms: &mut Atoms) -> Result<Self, &'static str> {
        let (body, gives_back) = match pattern.strip_suffix(GIVE_BACK) {
            Some(body) => (body, true),
            None => (pattern, false),
        };
        let tree = ast::parse::Parser::new().parse(body).map_err(|_| UNKNOWN)?;
        let mut rule = Rule {
            steps: vec![Step::Match(MATCH)],
            start: 0,
        };
        let mut compiler = Compiler {
            pattern: body,
            atoms,
            steps: &mut rule.steps,
        };
        rule.start = compiler.compile(&tree, 0, false)?;
        if gives_back {
            rule.steps.push(Step::Match(SPACES));
            let last = rule.steps.len() - 1;
            let run = rule.run(atoms.add(r"\s")?, last);
            rule.start = rule.push(Step::Either(rule.start, run));
        }
        Ok(rule)
    }

    /// Numbers, one by one or in runs.
    pub(super) fn digits(individual: bool, atoms: &mut Atoms) -> Result<Self, &'static str> {
        let atom = atoms.add(Atoms::NUMERIC)?;
        let mut rule = Rule {
            steps: vec![Step::Match(MATCH)],
            start: 0,
        };
        rule.start = if individual {
            rule.push(Step::Char(atom, 0))
        } else {
            rule.run(atom, 0)
        };
        Ok(rule)
    }

    fn push(&mut self, step: Step) -> usize {
        self.steps.push(step);
        self.steps.len() - 1
    }

    /// One or more of an atom, then `next`.
    fn run(&mut self, atom: usize, next: usize) -> usize {
        let first = self.steps.len();
        self.steps.push(Step::Char(atom, first + 1));
        self.steps.push(Step::Either(first, next));
        first
    }

    /// The threads from `at`, those that are preferred first, up to a match.
    fn follow(&self, at: usize, seen: &mut Vec<usize>, threads: &mut Vec<usize>) {
        if seen.contains(&at) {
            return;
        }
        seen.push(at);
        match self.steps[at] {
            Step::Either(first, second) => {
                self.follow(first, seen, threads);
                self.follow(second, seen, threads);
            }
            _ => threads.push(at),
        }
    }

    /// The threads behind a match are never run.
    fn cut(&self, threads: &mut Vec<usize>) {
        let matched = |at: &usize| matches!(self.steps[*at], Step::Match(_));
        if let Some(at) = threads.iter().position(matched) {
            threads.truncate(at + 1);
        }
    }

    /// The automaton over kinds, each of which is a set of atoms.
    pub(super) fn automaton(&self, kinds: &[u64]) -> Result<Automaton, &'static str> {
        let mut start = Vec::new();
        self.follow(self.start, &mut Vec::new(), &mut start);
        self.cut(&mut start);
        // State 0 is dead.
        let mut states = vec![Vec::new(), start];
        let mut numbers = HashMap::from([(states[0].clone(), 0u8), (states[1].clone(), 1u8)]);
        let mut made = Automaton {
            next: vec![[0; MOST]],
            matched: Vec::new(),
            stays: Vec::new(),
        };
        let mut at = 1;
        while at < states.len() {
            let mut row = [0; MOST];
            for (kind, atoms) in kinds.iter().enumerate() {
                let (mut seen, mut threads) = (Vec::new(), Vec::new());
                for thread in &states[at] {
                    if let Step::Char(atom, next) = self.steps[*thread]
                        && atoms >> atom & 1 == 1
                    {
                        self.follow(next, &mut seen, &mut threads);
                    }
                }
                self.cut(&mut threads);
                row[kind] = *numbers.entry(threads.clone()).or_insert_with(|| {
                    states.push(threads);
                    states.len() as u8 - 1
                });
                if states.len() > MOST {
                    return Err(UNKNOWN);
                }
            }
            made.next.push(row);
            at += 1;
        }
        for (number, threads) in states.iter().enumerate() {
            made.matched
                .push(match threads.last().map(|at| &self.steps[*at]) {
                    Some(Step::Match(which)) => *which,
                    _ => NONE,
                });
            let stays = |kind: &usize| number > 0 && made.next[number][*kind] == number as u8;
            made.stays.push(
                (0..kinds.len())
                    .filter(stays)
                    .fold(0, |all, kind| all | 1 << kind),
            );
        }
        if made.matched[1] != NONE {
            return Err(UNKNOWN); // it matches nothing
        }
        Ok(made)
    }
}

struct Compiler<'a> {
    pattern: &'a str,
    atoms: &'a mut Atoms,
    steps: &'a mut Vec<Step>,
}

impl Compiler<'_> {
    fn push(&mut self, step: Step) -> usize {
        self.steps.push(step);
        self.steps.len() - 1
    }

    /// The first step of `tree` followed by `next`.
    fn compile(&mut self, tree: &Ast, next: usize, caseless: bool) -> Result<usize, &'static str> {
        match tree {
            Ast::Empty(_) => Ok(next),
            Ast::Concat(parts) => {
                let mut parts = parts.asts.iter().rev();
                parts.try_fold(next, |next, part| self.compile(part, next, caseless))
            }
            Ast::Alternation(parts) => {
                let mut first = None;
                for part in parts.asts.iter().rev() {
                    let this = self.compile(part, next, caseless)?;
                    first = Some(match first {
                        None => this,
                        Some(others) => self.push(Step::Either(this, others)),
                    });
                }
                first.ok_or(UNKNOWN)
            }
            Ast::Group(group) => {
                let span = group.ast.span();
                let inside = &self.pattern[span.start.offset..span.end.offset];
                let caseless = match &group.kind {
                    GroupKind::NonCapturing(flags) if flags.items.is_empty() => caseless,
                    GroupKind::NonCapturing(flags) => {
                        let span = &flags.span;
                        let flags = &self.pattern[span.start.offset..span.end.offset];
                        if flags != "i" || !CASELESS.contains(&inside) {
                            return Err(UNKNOWN);
                        }
                        true
                    }
                    _ => caseless,
                };
                self.compile(&group.ast, next, caseless)
            }
            Ast::Repetition(repeated) => {
                // `a?+` does not repeat in the library's syntax.
                if !repeated.greedy || matches!(*repeated.ast, Ast::Repetition(_)) {
                    return Err(UNKNOWN);
                }
                self.repeat(&repeated.ast, &repeated.op.kind, next, caseless)
            }
            Ast::Literal(_) | Ast::ClassUnicode(_) | Ast::ClassPerl(_) | Ast::ClassBracketed(_) => {
                let span = tree.span();
                let text = &self.pattern[span.start.offset..span.end.offset];
                let text = if caseless {
                    format!("(?i:{text})")
                } else {
                    text.into()
                };
                let atom = self.atoms.add(&text)?;
                Ok(self.push(Step::Char(atom, next)))
            }
            _ => Err(UNKNOWN),
        }
    }

    fn repeat(
        &mut self,
        tree: &Ast,
        kind: &RepetitionKind,
        next: usize,
        caseless: bool,
    ) -> Result<usize, &'static str> {
        let (least, most) = match kind {
            RepetitionKind::ZeroOrOne => (0, Some(1)),
            RepetitionKind::ZeroOrMore => (0, None),
            RepetitionKind::OneOrMore => (1, None),
            RepetitionKind::Range(RepetitionRange::Exactly(n)) => (*n, Some(*n)),
            RepetitionKind::Range(RepetitionRange::AtLeast(n)) => (*n, None),
            RepetitionKind::Range(RepetitionRange::Bounded(least, most)) => (*least, Some(*most)),
        };
        if most.unwrap_or(least) > MOST_COPIES {
            return Err(UNKNOWN);
        }
        let mut first = next;
        match most {
            Some(most) => {
                for _ in least..most {
                    let this = self.compile(tree, first, caseless)?;
                    first = self.push(Step::Either(this, next));
                }
            }
            None => {
                let again = self.push(Step::Either(0, next));
                let this = self.compile(tree, again, caseless)?;
                self.steps[again] = Step::Either(this, next);
                first = again;
            }
        }
        for _ in 0..least {
            first = self.compile(tree, first, caseless)?;
        }
        Ok(first)
    }
}

/// A deterministic automaton: state 0 is dead, state 1 the start.
pub(super) struct Automaton {
    /// The state behind a kind.
    pub(super) next: Vec<[u8; MOST]>,
    /// What a state has matched.
    pub(super) matched: Vec<u8>,
    /// The kinds that do not change a state.
    pub(super) stays: Vec<u64>,
}
