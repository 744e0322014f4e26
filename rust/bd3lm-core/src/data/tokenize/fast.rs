//! Exact ids without the library where its pipeline is known: words are looked up, new ones made.

use serde_json::Value;

use super::byte_level::ByteLevel;
use super::cache::WordCache;
use super::word_piece::{Word, WordPiece};

/// Texts on which a pipeline has to agree with the library before it is used.
const PROBES: [&str; 4] = [
    "The old house's 3rd door isn't  OPEN;\tthey'LL say \"we've\" -- (1,024.50)!\r\n\n  Ünïted, naïve.",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # ok\n\n\n",
    "日本語のテキスト、中文字符。한국어 العربية हिन्दी ไทย e\u{301}\u{323} ﬁ ½ Ⅳ 👩\u{200d}👩 \u{a0}\u{3000}\u{2028}.",
    "\u{0}\u{1}\u{b}\u{7f}\u{85}\u{feff}\u{fffd}\u{302e}\u{1d165}“q”—x…y  ",
];

/// A pipeline that is known here.
pub(super) enum Fast {
    ByteLevel(Box<ByteLevel>),
    WordPiece(Box<WordPiece>),
}

impl Fast {
    /// From a `tokenizer.json`; or why the library has to do all of it.
    pub(super) fn new(definition: &Value) -> Result<Self, &'static str> {
        for token in definition["added_tokens"].as_array().into_iter().flatten() {
            if token["rstrip"] == true || token["single_word"] == true {
                return Err("its added tokens depend on what stands around them");
            }
            if token["normalized"] == true && !definition["normalizer"].is_null() {
                return Err("its added tokens are looked for in normalized text");
            }
        }
        match definition["model"]["type"].as_str() {
            Some("BPE") => ByteLevel::new(definition).map(|m| Fast::ByteLevel(Box::new(m))),
            Some("WordPiece") => WordPiece::new(definition).map(|m| Fast::WordPiece(Box::new(m))),
            _ => Err("its model is neither BPE nor WordPiece"),
        }
    }

    /// Itself if it agrees with the library; or why it does not.
    pub(super) fn agreeing(self, oracle: &tokenizers::Tokenizer) -> Result<Self, &'static str> {
        let mut cache = WordCache::new(usize::MAX);
        for text in PROBES {
            let mut ids = Vec::new();
            let known = oracle.encode_fast(text, false);
            let same = self.encode(text, oracle, &mut cache, &mut ids).is_ok()
                && known.is_ok_and(|known| known.get_ids() == ids);
            if !same {
                return Err("its ids are not those of its definition as it is read here");
            }
        }
        Ok(self)
    }

    /// Appends the ids of a text that spells out no added token.
    pub(super) fn encode(
        &self,
        text: &str,
        oracle: &tokenizers::Tokenizer,
        cache: &mut WordCache,
        out: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let bytes = text.as_bytes();
        match self {
            Fast::ByteLevel(model) => {
                let mut at = 0;
                let next = || {
                    (at < bytes.len()).then(|| {
                        let start = at;
                        at = model.word_end(text, start);
                        (start, at, ())
                    })
                };
                cache.words(bytes, out, next, |word, (), out| {
                    model.merge(&bytes[word], out);
                    Ok(())
                })
            }
            Fast::WordPiece(model) => {
                let mut end = 0;
                let next = || {
                    let start = model.skip(bytes, end);
                    (start < bytes.len()).then(|| {
                        let plain;
                        (plain, end) = match model.word(text, start, oracle) {
                            Word::Plain(end) => (true, end),
                            Word::Single(end) | Word::Odd(end) => (false, end),
                        };
                        (start, end, plain)
                    })
                };
                cache.words(bytes, out, next, |word, plain, out| {
                    if plain {
                        model.pieces(&bytes[word], out);
                    } else {
                        let made = oracle.encode_fast(&text[word], false)?;
                        out.extend_from_slice(made.get_ids());
                    }
                    Ok(())
                })
            }
        }
    }
}
