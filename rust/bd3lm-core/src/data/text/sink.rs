//! Records to documents: counts the records by outcome, and skips the bad ones.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::options::ReadOptions;
use super::records::Records;
use crate::error::{Error, Result};

/// A file whose first so many records are all bad is not read any further.
const HOPELESS: u64 = 1000;

/// A document, or a part of one that is longer than [`super::MAX_DOCUMENT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Text; empty only where the last part of a document was lost.
    pub text: &'a str,
    /// True if the document ends here.
    pub last: bool,
    /// True for a prompt, which the rest of the document follows.
    pub prompt: bool,
    /// True if another document of the same record follows this one.
    pub more: bool,
}

impl<'a> Piece<'a> {
    fn plain(text: &'a str, last: bool) -> Self {
        Piece {
            text,
            last,
            prompt: false,
            more: false,
        }
    }
}

/// Takes the records of one file.
pub(super) struct Sink<'a> {
    pub(super) options: &'a ReadOptions,
    pub(super) path: &'a Path,
    pub(super) records: &'a mut Records,
    /// Records of all files so far, those outside of the wanted rows included.
    pub(super) seen: &'a mut u64,
    pub(super) each: &'a mut dyn FnMut(Piece<'_>) -> Result<()>,
    pub(super) stop: &'a AtomicBool,
    /// Number of the record in its file, from 1.
    pub(super) number: u64,
    good: u64,
    first_bad: Option<Error>,
    bad: u64,
    /// A document was begun that has not ended.
    open: bool,
}

impl<'a> Sink<'a> {
    pub(super) fn new(
        options: &'a ReadOptions,
        path: &'a Path,
        records: &'a mut Records,
        seen: &'a mut u64,
        each: &'a mut dyn FnMut(Piece<'_>) -> Result<()>,
        stop: &'a AtomicBool,
    ) -> Self {
        Sink {
            options,
            path,
            records,
            seen,
            each,
            stop,
            number: 0,
            good: 0,
            first_bad: None,
            bad: 0,
            open: false,
        }
    }

    /// Counts a record; false where it lies outside of the wanted rows.
    pub(super) fn begin(&mut self) -> Result<bool> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(stopped());
        }
        self.number += 1;
        let index = *self.seen;
        *self.seen += 1;
        let wanted = self
            .options
            .rows
            .is_none_or(|(from, to)| (from..to).contains(&index));
        self.records.read += u64::from(wanted);
        Ok(wanted)
    }

    /// Returns whether all of the wanted rows were read.
    pub(super) fn is_done(&self) -> bool {
        self.options.rows.is_some_and(|(_, to)| *self.seen >= to)
    }

    /// Passes over so many records if none of them is wanted.
    pub(super) fn skip(&mut self, records: u64) -> bool {
        let Some((from, to)) = self.options.rows else {
            return false;
        };
        let after = self.seen.saturating_add(records);
        let unwanted = after <= from || *self.seen >= to;
        if unwanted {
            *self.seen = after;
            self.number += records;
        }
        unwanted
    }

    /// The record is left out by the filter.
    pub(super) fn filtered(&mut self) {
        self.records.filtered += 1;
        self.good += 1;
    }

    /// The text of the record is null.
    pub(super) fn null(&mut self) {
        self.records.null += 1;
        self.good += 1;
    }

    /// The text of the record.
    pub(super) fn text(&mut self, text: &str) -> Result<()> {
        if text.is_empty() {
            self.records.empty += 1;
            self.good += 1;
            return Ok(());
        }
        self.piece(text, true)
    }

    /// The text of the record, or a part of it.
    pub(super) fn piece(&mut self, text: &str, last: bool) -> Result<()> {
        if !last && !self.open {
            self.records.long += 1;
        }
        self.good += u64::from(last);
        self.open = !last;
        match self.options.detokenizer {
            Some(rules) => {
                let text = rules.apply(text);
                (self.each)(Piece::plain(&text, last))
            }
            None => (self.each)(Piece::plain(text, last)),
        }
    }

    /// A record that the options' renderer reads.
    pub(super) fn chat(&mut self, record: &str) -> Result<()> {
        let chat = self
            .options
            .chat
            .as_ref()
            .expect("the record is read by it");
        let exchanges = match (chat.0)(record) {
            Ok(exchanges) => exchanges,
            Err(reason) => return self.bad(reason),
        };
        self.good += 1;
        for (index, exchange) in exchanges.iter().enumerate() {
            let response = Piece {
                more: index + 1 < exchanges.len(),
                ..Piece::plain(&exchange.response, true)
            };
            if !exchange.prompt.is_empty() {
                (self.each)(Piece {
                    prompt: true,
                    ..Piece::plain(&exchange.prompt, false)
                })?;
            }
            (self.each)(response)?;
        }
        Ok(())
    }

    /// A part of the record cannot be read.
    pub(super) fn bad_piece(&mut self, reason: String, last: bool) -> Result<()> {
        self.bad(reason)?;
        if last && self.open {
            self.open = false;
            return (self.each)(Piece::plain("", last));
        }
        Ok(())
    }

    /// The record cannot be read: it is skipped, or an error.
    pub(super) fn bad(&mut self, reason: String) -> Result<()> {
        let error = Error::Record {
            path: self.path.into(),
            record: self.number,
            reason,
        };
        if self.options.strict {
            return Err(error);
        }
        self.records.bad += 1;
        self.bad += 1;
        if self.records.first_bad.is_none() {
            self.records.first_bad = Some(error.to_string());
        }
        let first = self.first_bad.get_or_insert(error);
        if self.good == 0 && self.bad >= HOPELESS {
            let reason = std::mem::replace(first, stopped());
            return Err(reason);
        }
        Ok(())
    }

    /// The file has ended. A file that the user named, and in which every record is bad, is an
    /// error.
    pub(super) fn finish(self, named: bool) -> Result<()> {
        match self.first_bad {
            Some(error) if named && self.good == 0 => Err(error),
            _ => Ok(()),
        }
    }
}

/// The error of a reader that was stopped; nobody sees it.
pub(crate) fn stopped() -> Error {
    Error::config("reader", "", "stopped")
}
