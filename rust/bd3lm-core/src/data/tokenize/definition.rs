//! A `tokenizer.json`, whose two long tables are read without a value for each of their entries.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use rustc_hash::{FxBuildHasher, FxHashMap};
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Content of the mask token while texts are encoded: characters that no text holds.
pub(super) const NO_TEXT: &str = "\u{fdd0}\u{fdd1}bd3lm mask\u{fdd1}\u{fdd0}";

/// Entries that a vocabulary has room for before it grows.
const ROOM: usize = 1 << 15;

/// The definition of a tokenizer.
pub(super) struct Definition<'a> {
    /// All of it but the two tables.
    pub(super) rest: Value,
    /// Ids by token; none where the model has a list of pieces, which is in the rest.
    pub(super) vocab: Option<Ids<'a>>,
    /// Merges of a BPE, the first first.
    pub(super) merges: Option<Vec<Merge<'a>>>,
}

/// Ids by token.
pub(super) type Ids<'a> = HashMap<Cow<'a, str>, u32, FxBuildHasher>;

/// Two tokens that become one.
#[derive(Serialize)]
pub(super) struct Merge<'a>(pub(super) Cow<'a, str>, pub(super) Cow<'a, str>);

impl<'a> Definition<'a> {
    /// Parses the text of a `tokenizer.json`; or the reason to refuse it.
    pub(super) fn parse(json: &'a str) -> Result<Self, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    /// Id of a token of the model.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.vocab.as_ref()?.get(token).copied()
    }

    /// The largest id of the model's vocabulary and of the added tokens.
    pub(super) fn largest_id(&self) -> Option<u64> {
        let by_name = self.vocab.iter().flat_map(Ids::values);
        let pieces = self.rest["model"]["vocab"].as_array();
        let by_place = pieces.and_then(|pieces| pieces.len().checked_sub(1));
        let added = self.added().filter_map(|token| token["id"].as_u64());
        let ids = by_name.map(|id| u64::from(*id)).chain(added);
        ids.chain(by_place.map(|id| id as u64)).max()
    }

    /// The entries of the added tokens.
    pub(super) fn added(&self) -> impl Iterator<Item = &Value> {
        self.rest["added_tokens"].as_array().into_iter().flatten()
    }

    /// Ids that the library gives to the contents of the added tokens: those of the model, else the
    /// next behind its size. It does not read the ids that are written there.
    pub(super) fn added_ids(&self) -> Result<FxHashMap<&str, u32>, &'static str> {
        let mut next = self.vocab.as_ref().map_or(0, HashMap::len) as u32;
        let mut ids = FxHashMap::default();
        let mut contents = HashMap::new();
        for token in self.added() {
            let content = token["content"].as_str().unwrap_or_default();
            if content.is_empty() {
                continue;
            }
            let id = self.id(content).unwrap_or_else(|| {
                next += 1;
                next - 1
            });
            if ids.insert(content, id).is_some() || contents.insert(id, content).is_some() {
                return Err("two of its added tokens are one");
            }
        }
        Ok(ids)
    }

    /// Whether both sides of every merge, and the two together, are tokens of the model.
    pub(super) fn merges_are_tokens(&self) -> bool {
        let mut both = String::new();
        self.merges.iter().flatten().all(|Merge(left, right)| {
            both.clear();
            both.extend([&**left, &**right]);
            [&**left, &**right, &both]
                .iter()
                .all(|token| self.id(token).is_some())
        })
    }

    /// Turns BPE-dropout off; returns whether it was on. It is for training a model on several
    /// tokenizations of a text, by another at each epoch. In a data set it would be frozen, and in
    /// a prompt it would be random.
    pub(super) fn drop_dropout(&mut self) -> bool {
        let dropout = self.rest["model"].get_mut("dropout");
        dropout.is_some_and(|dropout| !std::mem::take(dropout).is_null())
    }

    /// Gives the mask token a content that no text holds, so that a text that spells it out is
    /// encoded as ordinary characters; returns whether there is such a token. It is not removed:
    /// the ids of the added tokens after it would move.
    pub(super) fn hide_mask(&mut self, mask_id: u32) -> bool {
        let added = self.rest["added_tokens"].as_array_mut();
        let mut content = None;
        for token in added.into_iter().flatten() {
            if token["id"] == mask_id {
                content = Some(std::mem::replace(&mut token["content"], NO_TEXT.into()));
                for rule in ["normalized", "lstrip", "rstrip", "single_word"] {
                    token[rule] = false.into();
                }
            }
        }
        let Some(Value::String(content)) = content else {
            return false;
        };
        let made = |Merge(left, right): &Merge<'_>| {
            content.strip_prefix(&**left) == Some(right) // the model makes it out of characters
        };
        if self.merges.iter().flatten().any(made) {
            return true;
        }
        if let Some(ids) = &mut self.vocab {
            if let Some(id) = ids.remove(&*content) {
                ids.insert(NO_TEXT.into(), id);
            }
        } else if let Some(piece) = self.rest["model"]["vocab"].get_mut(mask_id as usize)
            && piece[0] == content
        {
            piece[0] = NO_TEXT.into();
        }
        true
    }

    /// The text of the definition; with `keep`, less the tokens of the model that it does not take
    /// and the merges that make them. Added tokens keep their ids: they become tokens of the model.
    pub(super) fn text(&self, keep: Option<&dyn Fn(&str) -> bool>) -> String {
        let mut whole = self.rest.clone();
        let ids = self.vocab.iter().flatten();
        let ids = ids.filter(|(token, _)| keep.is_none_or(|keep| keep(token)));
        let mut kept: FxHashMap<&str, u32> = ids.map(|(token, id)| (&**token, *id)).collect();
        if let Some(merges) = &self.merges {
            let mut both = String::new();
            let mut made = |Merge(left, right): &&Merge<'_>| {
                let has = |token: &str| kept.contains_key(token);
                keep.is_none()
                    || has(left) && has(right) && {
                        both.clear();
                        both.extend([&**left, &**right]);
                        has(&both)
                    }
            };
            let merges: Vec<&Merge<'_>> = merges.iter().filter(|merge| made(merge)).collect();
            whole["model"]["merges"] = serde_json::to_value(merges).expect("pairs of strings");
        }
        if self.vocab.is_some() {
            if keep.is_some() {
                kept.extend(self.added_ids().unwrap_or_default());
            }
            let ids = kept
                .into_iter()
                .map(|(token, id)| (token.into(), id.into()));
            whole["model"]["vocab"] = ids.collect::<Map<_, _>>().into();
        }
        whole.to_string()
    }
}

/// A string that is borrowed where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Definition<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Whole)
    }
}

struct Whole;

impl<'de> Visitor<'de> for Whole {
    type Value = Definition<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the JSON of a tokenizer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut rest, mut model) = (Map::new(), None);
        while let Some(Text(key)) = map.next_key()? {
            if key == "model" {
                model = Some(map.next_value::<Model<'_>>()?);
            } else {
                rest.insert(key.into_owned(), map.next_value()?);
            }
        }
        let no_model = "it must be the JSON of a tokenizer: it has no model";
        let model = model.ok_or_else(|| A::Error::custom(no_model))?;
        rest.insert("model".into(), model.rest.into());
        Ok(Definition {
            rest: rest.into(),
            vocab: model.vocab,
            merges: model.merges,
        })
    }
}

struct Model<'a> {
    rest: Map<String, Value>,
    vocab: Option<Ids<'a>>,
    merges: Option<Vec<Merge<'a>>>,
}

impl<'de> Deserialize<'de> for Model<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(OfModel)
    }
}

struct OfModel;

impl<'de> Visitor<'de> for OfModel {
    type Value = Model<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the model of a tokenizer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut model = Model {
            rest: Map::new(),
            vocab: None,
            merges: None,
        };
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "vocab" => match map.next_value()? {
                    Some(Vocab::Ids(ids)) => model.vocab = Some(ids),
                    Some(Vocab::Pieces(pieces)) => {
                        model.rest.insert("vocab".into(), pieces.into());
                    }
                    None => {}
                },
                "merges" => {
                    let merges: Option<Merges<'_>> = map.next_value()?;
                    model.merges = merges.map(|merges| merges.0);
                }
                _ => {
                    model.rest.insert(key.into_owned(), map.next_value()?);
                }
            }
        }
        Ok(model)
    }
}

enum Vocab<'a> {
    Ids(Ids<'a>),
    Pieces(Vec<Value>),
}

impl<'de> Deserialize<'de> for Vocab<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OfVocab)
    }
}

struct OfVocab;

impl<'de> Visitor<'de> for OfVocab {
    type Value = Vocab<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the vocabulary of a tokenizer")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut ids = Ids::with_capacity_and_hasher(ROOM, FxBuildHasher);
        while let Some((Text(token), id)) = map.next_entry()? {
            ids.insert(token, id);
        }
        Ok(Vocab::Ids(ids))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut pieces = Vec::new();
        while let Some(piece) = seq.next_element()? {
            pieces.push(piece);
        }
        Ok(Vocab::Pieces(pieces))
    }
}

struct Merges<'a>(Vec<Merge<'a>>);

impl<'de> Deserialize<'de> for Merges<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(OfMerges)
    }
}

struct OfMerges;

impl<'de> Visitor<'de> for OfMerges {
    type Value = Merges<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the merges of a tokenizer")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut merges = Vec::new();
        let (mut pairs, mut lines) = (false, false);
        while let Some(written) = seq.next_element()? {
            match written {
                Written::Pair(Text(left), Text(right)) => {
                    pairs = true;
                    merges.push(Merge(left, right));
                }
                Written::Line(line) => {
                    lines = true;
                    if !line.starts_with("#version") {
                        merges.push(of_line(line).ok_or_else(|| A::Error::custom(NO_PAIR))?);
                    }
                }
            }
        }
        if pairs && lines {
            return Err(A::Error::custom(
                "its merges must be all pairs or all lines",
            ));
        }
        Ok(Merges(merges))
    }
}

const NO_PAIR: &str = "each of its merges must be two tokens";

/// A merge of the older form, in which a space is between the tokens.
fn of_line(line: Cow<'_, str>) -> Option<Merge<'_>> {
    let (left, right) = line
        .split_once(' ')
        .filter(|(_, right)| !right.contains(' '))?;
    let at = left.len();
    Some(match line {
        Cow::Borrowed(line) => Merge(line[..at].into(), line[at + 1..].into()),
        Cow::Owned(_) => Merge(left.to_owned().into(), right.to_owned().into()),
    })
}

enum Written<'a> {
    Pair(Text<'a>, Text<'a>),
    Line(Cow<'a, str>),
}

impl<'de> Deserialize<'de> for Written<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OfMerge)
    }
}

struct OfMerge;

impl<'de> Visitor<'de> for OfMerge {
    type Value = Written<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut next = || seq.next_element()?.ok_or_else(|| A::Error::custom(NO_PAIR));
        Ok(Written::Pair(next()?, next()?))
    }

    fn visit_borrowed_str<E: Error>(self, line: &'de str) -> Result<Self::Value, E> {
        Ok(Written::Line(line.into()))
    }

    fn visit_str<E: Error>(self, line: &str) -> Result<Self::Value, E> {
        Ok(Written::Line(line.to_owned().into()))
    }
}

#[cfg(test)]
mod tests;
