//! The text of one JSON object, without building the object.

use std::borrow::Cow;

use serde::Deserializer;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::options::ReadOptions;
use crate::error::{Error, Result};

/// Why a record gave no text.
pub(crate) enum RecordError {
    /// What is wrong with the record.
    Bad(String),
    /// What became of its text.
    Other(Error),
}

/// Hands on the text of one JSON object, as the parser meets it: no copy of it is kept.
pub(crate) fn read_record(
    line: &[u8],
    options: &ReadOptions,
    each: &mut dyn FnMut(&str) -> Result<()>,
) -> std::result::Result<(), RecordError> {
    let invalid = |e: &dyn std::fmt::Display| RecordError::Bad(format!("not valid JSON ({e})"));
    let first = line.iter().find(|b| !b.is_ascii_whitespace());
    if first != Some(&b'{') {
        let value: std::result::Result<serde_json::Value, _> = serde_json::from_slice(line);
        return Err(match value {
            Ok(_) => RecordError::Bad("not a JSON object".into()),
            Err(e) => invalid(&e),
        });
    }
    let find = |name: &str, each: &mut dyn FnMut(&str) -> Result<()>| {
        let mut field = TextOf {
            name,
            found: Found::No,
            each,
        };
        let mut parser = serde_json::Deserializer::from_slice(line);
        let parsed = (&mut field)
            .deserialize(&mut parser)
            .and_then(|()| parser.end());
        match (field.found, parsed) {
            (Found::Failed(e), _) => Err(RecordError::Other(e)),
            (_, Err(e)) => Err(invalid(&e)),
            (found, Ok(())) => Ok(found),
        }
    };
    if let Some((name, wanted)) = &options.filter {
        let mut is_wanted = false;
        find(name, &mut |value| {
            is_wanted = value == wanted;
            Ok(())
        })?;
        if !is_wanted {
            return Ok(());
        }
    }
    let name = &options.text_field;
    match find(name, each)? {
        Found::Text => Ok(()),
        Found::Twice => Err(RecordError::Bad(format!("it has its field {name} twice"))),
        Found::Failed(e) => Err(RecordError::Other(e)),
        Found::OtherKind => Err(RecordError::Bad(format!(
            "its field {name} is not a string"
        ))),
        Found::No => {
            let record: serde_json::Map<String, serde_json::Value> =
                serde_json::from_slice(line).map_err(|e| invalid(&e))?;
            let fields = record.keys().cloned().collect::<Vec<_>>().join(", ");
            Err(RecordError::Bad(format!(
                "it has no field {name}, only {fields}"
            )))
        }
    }
}

/// What an object holds under a name.
enum Found {
    No,
    Text,
    Twice,
    OtherKind,
    Failed(Error),
}

/// Visits an object, and gives the string under `name` to `each` unless it is empty.
struct TextOf<'a> {
    name: &'a str,
    found: Found,
    each: &'a mut dyn FnMut(&str) -> Result<()>,
}

impl<'de> DeserializeSeed<'de> for &mut TextOf<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> std::result::Result<(), D::Error> {
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut TextOf<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            if key == self.name {
                map.next_value_seed(TextValue(self))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

/// The value under the name.
struct TextValue<'a, 'b>(&'a mut TextOf<'b>);

impl<'de> DeserializeSeed<'de> for TextValue<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> std::result::Result<(), D::Error> {
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TextValue<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> std::result::Result<(), E> {
        if !matches!(self.0.found, Found::No) {
            self.0.found = Found::Twice;
            return Ok(());
        }
        self.0.found = Found::Text;
        if text.is_empty() {
            return Ok(());
        }
        (self.0.each)(text).map_err(|e| {
            self.0.found = Found::Failed(e);
            E::custom("stopped")
        })
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<(), E> {
        self.0.found = Found::OtherKind;
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<(), E> {
        self.0.found = Found::OtherKind;
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<(), E> {
        self.0.found = Found::OtherKind;
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<(), E> {
        self.0.found = Found::OtherKind;
        Ok(())
    }

    fn visit_unit<E>(self) -> std::result::Result<(), E> {
        self.0.found = Found::OtherKind;
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        self.0.found = Found::OtherKind;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        self.0.found = Found::OtherKind;
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(())
    }
}
