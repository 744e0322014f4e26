//! Counts of the records that were read, by outcome.

use serde::{Deserialize, Serialize};

/// Counts of the records of the files, by outcome.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    /// Records in all: lines, JSON objects, rows, or plain-text documents.
    pub read: u64,
    /// Left out: another value in the field of the filter.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub filtered: u64,
    /// Left out: an empty text.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub empty: u64,
    /// Left out: a null text.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub null: u64,
    /// Left out: could not be read.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad: u64,
    /// The first of the records that could not be read, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_bad: Option<String>,
    /// Kept, with U+FFFD in place of half a surrogate pair.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repaired: u64,
    /// Kept, but read in parts of up to 64 MiB each.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub long: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Records {
    /// The sums of two counts; the first bad record is that of the first.
    pub(crate) fn joined(&self, other: &Records) -> Records {
        Records {
            read: self.read + other.read,
            filtered: self.filtered + other.filtered,
            empty: self.empty + other.empty,
            null: self.null + other.null,
            bad: self.bad + other.bad,
            first_bad: self.first_bad.clone().or_else(|| other.first_bad.clone()),
            repaired: self.repaired + other.repaired,
            long: self.long + other.long,
        }
    }

    /// Why none of the records gave a text, as the end of a sentence.
    pub(crate) fn why_empty(&self, filter: Option<&(String, String)>) -> String {
        if self.read == 0 {
            return "an empty corpus cannot be used".into();
        }
        if self.filtered == self.read
            && let Some((field, value)) = filter
        {
            return format!("none of the {} records has {field} = {value}", self.read);
        }
        let mut causes = Vec::new();
        for (count, cause) in [
            (self.filtered, "filtered out"),
            (self.empty, "empty"),
            (self.null, "null"),
            (self.bad, "not readable"),
        ] {
            if count > 0 {
                causes.push(format!("{count} {cause}"));
            }
        }
        let mut reason = format!("of {} records, {}", self.read, causes.join(", "));
        if let Some(first) = &self.first_bad {
            reason += &format!(" (the first: {first})");
        }
        reason
    }
}
