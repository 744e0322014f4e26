//! Undoes the tokenization that benchmark texts were published with, by the rules that the paper's
//! code applies before it tokenizes them again: perplexities compare only on the same text.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::{Captures, Regex};

use crate::error::{Result, named};

/// Whose conventions a text follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detokenizer {
    /// One Billion Words.
    Lm1b,
    /// Wikitext.
    Wikitext,
    /// Penn Treebank.
    Ptb,
    /// Lambada.
    Lambada,
    /// Scientific papers: Wikitext's rules, then One Billion Words'.
    ScientificPapers,
}

/// Names and values.
const ALL: [(&str, Detokenizer); 5] = [
    ("lm1b", Detokenizer::Lm1b),
    ("wikitext", Detokenizer::Wikitext),
    ("ptb", Detokenizer::Ptb),
    ("lambada", Detokenizer::Lambada),
    ("scientific_papers", Detokenizer::ScientificPapers),
];

impl Detokenizer {
    /// Names of all detokenizers, as the command line spells them.
    pub fn names() -> [&'static str; ALL.len()] {
        ALL.map(|(name, _)| name)
    }

    /// The detokenizer of this name.
    ///
    /// # Errors
    /// [`crate::Error::Config`] that lists the names.
    pub fn named(name: &str) -> Result<Self> {
        named("detokenizer", name, &ALL)
    }

    /// Name of the rules.
    pub fn name(self) -> &'static str {
        let found = ALL.iter().find(|(_, value)| *value == self);
        found.map_or("", |(name, _)| name)
    }

    /// The text as it was written.
    pub fn apply(self, text: &str) -> String {
        let mut text = Text(Cow::Borrowed(text));
        match self {
            Detokenizer::Lm1b => text.lm1b(),
            Detokenizer::Wikitext => text.wikitext(),
            Detokenizer::Ptb => text.ptb(),
            Detokenizer::Lambada => {
                text.all(&[("“", "\""), ("”", "\"")]);
                text.0 = format!("\n{}", text.0.trim_matches(is_space)).into();
            }
            Detokenizer::ScientificPapers => {
                text.wikitext();
                text.lm1b();
            }
        }
        text.0.into_owned()
    }
}

/// A text between two rules.
struct Text<'a>(Cow<'a, str>);

/// A pattern in which `\w` and `\s` mean what they do in the rules' language: letters, numbers of
/// every kind and the underscore, but no marks; white space and the four separators U+001C to
/// U+001F.
macro_rules! pattern {
    ($regex:literal) => {{
        static PATTERN: LazyLock<Regex> = LazyLock::new(|| {
            let regex = $regex.replace(r"\w", r"[\p{L}\p{N}_]");
            let regex = regex.replace(r"\s", r"[\s\x1C-\x1F]");
            Regex::new(&regex).expect("a pattern of ours")
        });
        &*PATTERN
    }};
}

fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1C}'..='\u{1F}').contains(&c)
}

impl Text<'_> {
    /// Literal replacements, one after the other; most of them find nothing.
    fn all(&mut self, rules: &[(&str, &str)]) {
        for (from, to) in rules {
            if self.0.contains(from) {
                self.0 = self.0.replace(from, to).into();
            }
        }
    }

    fn sub(&mut self, pattern: &Regex, to: &str) {
        if let Cow::Owned(changed) = pattern.replace_all(&self.0, to) {
            self.0 = changed.into();
        }
    }

    fn wikitext(&mut self) {
        self.all(&[("s '", "s'")]);
        // Their replacement is these characters, not a number.
        let literal = |_: &Captures<'_>| "/'[0-9]/".to_owned();
        if let Cow::Owned(x) = pattern!("/' [0-9]/").replace_all(&self.0, literal) {
            self.0 = x.into();
        }
        self.all(&[
            (" @-@ ", "-"),
            (" @,@ ", ","),
            (" @.@ ", "."),
            (" : ", ": "),
            (" ; ", "; "),
            (" . ", ". "),
            (" ! ", "! "),
            (" ? ", "? "),
            (" , ", ", "),
        ]);
        self.sub(pattern!(r"\(\s*([^)]*?)\s*\)"), "($1)");
        self.sub(pattern!(r"\[\s*([^\]]*?)\s*\]"), "[$1]");
        self.sub(pattern!(r"\{\s*([^}]*?)\s*\}"), "{$1}");
        self.sub(pattern!(r#""\s*([^"]*?)\s*""#), "\"$1\"");
        self.sub(pattern!(r"'\s*([^']*?)\s*'"), "'$1'");
        self.all(&[
            ("= = = =", "===="),
            ("= = =", "==="),
            ("= =", "=="),
            (" ° ", "°"),
            (" \n", "\n"),
            ("\n ", "\n"),
            (" N ", " 1 "),
            (" 's", "'s"),
        ]);
    }

    fn ptb(&mut self) {
        self.all(&[
            (" 's", "'s"),
            ("s ' ", "s' "),
            (" n't", "n't"),
            (" \n ", "\n"),
            ("\\/", "/"),
        ]);
        for _ in 0..10 {
            self.all(&[(" N ", " 1 ")]); // neighbours share a space
        }
        self.all(&[("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")]);
    }

    fn lm1b(&mut self) {
        self.all(&[("http : / / ", "http://"), ("https : / / ", "https://")]);
        self.sub(pattern!(r" '(\w+)"), "'$1");
        self.sub(pattern!(r" (\w+) \. "), " $1. ");
        // `$` of the rules' language also matches before a last line feed.
        self.sub(pattern!(r" (\w+) \.(\n?)\z"), " $1.$2");
        self.all(&[(" ? ", "? ")]);
        self.sub(pattern!(r" \?(\n?)\z"), "?$1");
        self.all(&[(" ! ", "! ")]);
        self.sub(pattern!(r" !(\n?)\z"), "!$1");
        self.all(&[(" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")]);
        self.sub(pattern!(r#"" ([^"]+) ""#), "\"$1\"");
        self.sub(pattern!(r"' ([^']+) '"), "'$1'");
        self.sub(pattern!(r"\( ([^()]+) \)"), "($1)");
        self.sub(pattern!(r"\[ ([^\[\]]+) \]"), "[$1]");
        self.all(&[("$ ", "$"), ("£ ", "£")]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_or_listed() {
        for (name, value) in ALL {
            assert_eq!(Detokenizer::named(name).unwrap(), value);
        }
        let message = Detokenizer::named("moses").unwrap_err().to_string();
        assert!(message.contains("one of lm1b, wikitext, ptb, lambada, scientific_papers"));
    }

    #[test]
    fn each_by_an_example() {
        let cases = [
            (
                Detokenizer::Lm1b,
                "He said , \" it 's here . \" ( really )",
                "He said, \"it's here.\" (really)",
            ),
            (
                Detokenizer::Wikitext,
                " = Title = \n 1 @,@ 000 @-@ year ( old ) ; \" so \" . \n",
                " = Title =\n1,000-year (old); \"so\".\n",
            ),
            (Detokenizer::Ptb, "it 's N N N $ N <unk>", "it's 1 1 1 $1 ?"),
            (Detokenizer::Lambada, " “ so ” ", "\n\" so \""),
            (Detokenizer::Lm1b, "Up $ 3 , or not ?", "Up $3, or not?"),
        ];
        for (which, text, wanted) in cases {
            assert_eq!(which.apply(text), wanted, "{which:?}");
        }
    }
}
