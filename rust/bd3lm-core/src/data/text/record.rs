//! The text of one JSON object, without building the object.

use std::borrow::Cow;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::options::ReadOptions;

/// Names that an error lists, and the length of each.
const LISTED: usize = 20;
const LISTED_CHARS: usize = 60;

/// The text field of a JSON object.
#[derive(Debug, PartialEq)]
pub(super) enum Record<'a> {
    Text(Cow<'a, str>),
    Null,
    /// The filter leaves the record out.
    Filtered,
    /// An array or object, which the options' renderer reads.
    Chat,
}

/// Reads one JSON object; the error is the reason for which it cannot be read.
pub(super) fn read_record<'a>(json: &'a [u8], options: &ReadOptions) -> Result<Record<'a>, String> {
    let first = json.iter().find(|b| !b.is_ascii_whitespace());
    if first != Some(&b'{') {
        return Err(match serde_json::from_slice::<IgnoredAny>(json) {
            Ok(_) => "not a JSON object".into(),
            Err(e) => invalid(json, &e),
        });
    }
    let mut fields = vec![Field::new(&options.text_field)];
    fields.extend(options.filter.as_ref().map(|(name, _)| Field::new(name)));
    let visit = Visit {
        fields: &mut fields,
        places: [Place::Above(0); 2],
    };
    let mut parser = serde_json::Deserializer::from_slice(json);
    visit
        .deserialize(&mut parser)
        .and_then(|()| parser.end())
        .map_err(|e| invalid(json, &e))?;
    if let Some((_, value)) = &options.filter {
        let found = fields.pop().and_then(Field::value);
        if !found.is_some_and(|found| found.is(value)) {
            return Ok(Record::Filtered);
        }
    }
    let text = fields.pop().expect("the first field");
    let name = &options.text_field;
    if text.twice {
        return Err(format!("it has its field {name} twice"));
    }
    match text.value() {
        Some(Value::Text(text)) => Ok(Record::Text(text)),
        Some(Value::Null) => Ok(Record::Null),
        Some(Value::Other) if options.chat.is_some() => Ok(Record::Chat),
        Some(Value::Other) => Err(format!(
            "its field {name} is not a string; a list of messages needs a tokenizer with a chat \
             template"
        )),
        Some(_) => Err(format!("its field {name} is not a string")),
        None => Err(format!(
            "it has no field {name}, only {}; name another with --text-field",
            names_of(json)
        )),
    }
}

fn invalid(json: &[u8], e: &serde_json::Error) -> String {
    match str::from_utf8(json) {
        Err(utf8) => format!("not valid UTF-8 (byte {} of it)", utf8.valid_up_to()),
        Ok(_) => format!("not valid JSON ({e})"),
    }
}

/// Names of the fields of an object, as many as fit a sentence.
fn names_of(json: &[u8]) -> String {
    let mut names = Names::default();
    let mut parser = serde_json::Deserializer::from_slice(json);
    let listed = parser.deserialize_map(&mut names);
    debug_assert!(listed.is_ok(), "it was parsed before");
    list(names.first.into_iter(), names.count)
}

/// Joins the first names of `count`.
pub(super) fn list(names: impl Iterator<Item = String>, count: usize) -> String {
    let mut names: Vec<String> = names
        .take(LISTED)
        .map(|name| match name.char_indices().nth(LISTED_CHARS) {
            Some((end, _)) => name[..end].to_owned() + "…",
            None => name,
        })
        .collect();
    if count > names.len() {
        names.push(format!("{} more", count - names.len()));
    }
    names.join(", ")
}

#[derive(Default)]
struct Names {
    first: Vec<String>,
    count: usize,
}

impl<'de> Visitor<'de> for &mut Names {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            if self.count < LISTED {
                self.first.push(name.into_owned());
            }
            self.count += 1;
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

/// A value that is looked for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value<'a> {
    Text(Cow<'a, str>),
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Null,
    /// An array or object.
    Other,
}

impl Value<'_> {
    /// Returns whether it is the value that a user wrote as `wanted`.
    pub(super) fn is(&self, wanted: &str) -> bool {
        match self {
            Value::Text(text) => text == wanted,
            Value::Bool(value) => {
                wanted.eq_ignore_ascii_case(if *value { "true" } else { "false" })
            }
            Value::Unsigned(value) => {
                wanted.parse() == Ok(*value) || wanted.parse() == Ok(*value as f64)
            }
            Value::Signed(value) => {
                wanted.parse() == Ok(*value) || wanted.parse() == Ok(*value as f64)
            }
            Value::Float(value) => wanted.parse() == Ok(*value),
            Value::Null => wanted == "null",
            Value::Other => false,
        }
    }
}

/// Way in which a field was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    InOtherCase,
    Exact,
}

/// A field that is looked for by its dotted name. One whose name differs in case is taken where
/// none has the exact name.
struct Field<'n, 'de> {
    name: &'n str,
    found: Option<(Match, Value<'de>)>,
    twice: bool,
}

impl<'n, 'de> Field<'n, 'de> {
    fn new(name: &'n str) -> Self {
        Field {
            name,
            found: None,
            twice: false,
        }
    }

    fn value(self) -> Option<Value<'de>> {
        self.found.map(|(_, value)| value)
    }

    fn keep(&mut self, how: Match, value: Value<'de>) {
        match &self.found {
            Some((known, _)) if *known > how => {}
            Some((known, _)) if *known == how => self.twice |= how == Match::Exact,
            _ => self.found = Some((how, value)),
        }
    }
}

/// Position of a value of the object, as seen from a field that is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Elsewhere.
    Aside,
    /// Value that contains the field; the rest of the field's name begins at this byte.
    Above(usize),
    /// Value of the field.
    At(Match),
}

impl Place {
    /// The place of the value under `key`, inside of a value at `self`.
    fn below(self, key: &str, name: &str) -> Self {
        let Place::Above(from) = self else {
            return Place::Aside;
        };
        let rest = &name[from..];
        if key == rest {
            return Place::At(Match::Exact);
        }
        if key.eq_ignore_ascii_case(rest) {
            return Place::At(Match::InOtherCase);
        }
        match rest.strip_prefix(key) {
            Some(after) if after.starts_with('.') => Place::Above(from + key.len() + 1),
            _ => Place::Aside,
        }
    }
}

/// Visits a value, and keeps it for the fields that it is.
struct Visit<'a, 'n, 'de> {
    fields: &'a mut [Field<'n, 'de>],
    /// One for each field; there are at most two.
    places: [Place; 2],
}

impl<'de> Visit<'_, '_, 'de> {
    fn keep(self, value: Value<'de>) {
        for (field, place) in self.fields.iter_mut().zip(self.places) {
            if let Place::At(how) = place {
                field.keep(how, value.clone());
            }
        }
    }

    /// Keeps like [`Self::keep`], without a copy of the text where one field wants it.
    fn keep_text(self, text: Cow<'de, str>) {
        let mut text = Some(text);
        let mut wanting = self.fields.iter_mut().zip(self.places);
        if let Some((field, Place::At(how))) = wanting.find(|(_, p)| matches!(p, Place::At(_))) {
            let rest = wanting.find(|(_, p)| matches!(p, Place::At(_)));
            if let Some((second, Place::At(how))) = rest {
                second.keep(how, Value::Text(text.clone().unwrap_or_default()));
            }
            field.keep(how, Value::Text(text.take().unwrap_or_default()));
        }
    }
}

impl<'de> DeserializeSeed<'de> for Visit<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, parser: D) -> Result<(), D::Error> {
        if self.places == [Place::Aside; 2] {
            return IgnoredAny::deserialize(parser).map(drop);
        }
        parser.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Visit<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<(), E> {
        self.keep_text(Cow::Borrowed(text));
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.keep_text(Cow::Owned(text.to_owned()));
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.keep(Value::Bool(value));
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.keep(Value::Signed(value));
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.keep(Value::Unsigned(value));
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.keep(Value::Float(value));
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.keep(Value::Null);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.keep(Value::Other);
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        for (field, place) in self.fields.iter_mut().zip(self.places) {
            if let Place::At(how) = place {
                field.keep(how, Value::Other);
            }
        }
        while let Some(key) = map.next_key::<Cow<'de, str>>()? {
            let mut places = [Place::Aside; 2];
            for ((inner, outer), field) in places.iter_mut().zip(self.places).zip(&*self.fields) {
                *inner = outer.below(&key, field.name);
            }
            map.next_value_seed(Visit {
                fields: self.fields,
                places,
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, field: &str, filter: Option<(&str, &str)>) -> String {
        let options = ReadOptions {
            text_field: field.into(),
            filter: filter.map(|(a, b)| (a.into(), b.into())),
            ..Default::default()
        };
        match read_record(json.as_bytes(), &options) {
            Ok(Record::Text(text)) => text.into_owned(),
            Ok(other) => format!("{other:?}"),
            Err(reason) => reason,
        }
    }

    #[test]
    fn fields_by_exact_dotted_and_other_names() {
        assert_eq!(read(r#"{"a": {"b": "x"}}"#, "a.b", None), "x");
        assert_eq!(
            read(r#"{"a": {"b": "x"}, "a.b": "y"}"#, "a.b", None),
            "it has its field a.b twice"
        );
        assert_eq!(read(r#"{"a.b": {"c": "y"}}"#, "a.b.c", None), "y");
        assert_eq!(read(r#"{"Text": "x"}"#, "text", None), "x");
        assert_eq!(
            read(r#"{"Text": "x", "text": "y", "TEXT": "z"}"#, "text", None),
            "y"
        );
        assert_eq!(read(r#"{"text": null}"#, "text", None), "Null");
        assert_eq!(
            read(r#"{"text": 1}"#, "text", None),
            "its field text is not a string"
        );
        assert_eq!(
            read(r#"{"text": ["a"]}"#, "text", None),
            "its field text is not a string; a list of messages needs a tokenizer with a chat \
             template"
        );
        assert_eq!(
            read(r#"{"a": {"b": 1}}"#, "a.c", None),
            "it has no field a.c, only a; name another with --text-field"
        );
        assert_eq!(
            read(r#"{"text": "a", "text": "b"}"#, "text", None),
            "it has its field text twice"
        );
    }

    #[test]
    fn filters_of_every_kind() {
        let json = r#"{"text": "x", "n": 1, "f": 1.0, "neg": -3, "b": true, "z": null, "o": [1],
                       "meta": {"lang": "en"}}"#;
        for (field, value) in [
            ("n", "1"),
            ("n", "1.0"),
            ("f", "1"),
            ("f", "1.0"),
            ("neg", "-3"),
            ("b", "true"),
            ("b", "True"),
            ("z", "null"),
            ("meta.lang", "en"),
            ("text", "x"),
        ] {
            assert_eq!(
                read(json, "text", Some((field, value))),
                "x",
                "{field}={value}"
            );
        }
        for (field, value) in [
            ("n", "2"),
            ("b", "false"),
            ("o", "1"),
            ("meta", "en"),
            ("gone", ""),
        ] {
            assert_eq!(
                read(json, "text", Some((field, value))),
                "Filtered",
                "{field}={value}"
            );
        }
    }

    #[test]
    fn an_error_of_many_fields_is_short() {
        let fields: Vec<_> = (0..100_000).map(|i| format!("\"field{i}\": 1")).collect();
        let json = format!("{{{}}}", fields.join(","));
        let reason = read(&json, "text", None);
        assert!(
            reason.contains("field19, 99980 more;") && reason.len() < 400,
            "{reason}"
        );
    }
}
