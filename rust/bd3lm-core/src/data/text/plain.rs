//! Plain text: the documents between separators, in memory bounded by one part of a document.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use memchr::memmem::Finder;

use super::MAX_DOCUMENT;
use super::input::damaged;
use super::sink::Sink;
use crate::error::Result;

/// A line of its own between two documents, as in the TinyStories files.
pub const SEPARATOR: &str = "<|endoftext|>";

/// Bytes that are read at a time.
const STEP: usize = 1 << 18;

/// Reads the documents of a text: its lines, or the texts between separators.
pub(super) fn read_text<R: Read>(
    path: &Path,
    source: &mut BufReader<R>,
    lines: bool,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let mut text = Text {
        separator: Finder::new(if lines { "\n" } else { SEPARATOR }),
        lines,
        bytes: Vec::new(),
        start: 0,
        searched: 0,
        long: false,
        separated: false,
    };
    loop {
        while let Some(at) = text.find() {
            let end = text.start + at;
            text.emit(end, Ending::Separator, sink)?;
            text.start = end + text.separator.needle().len();
            text.searched = text.start;
        }
        if text.bytes.len() - text.start >= MAX_DOCUMENT {
            let end = text.cut();
            text.emit(end, Ending::Cut, sink)?;
            text.start = end;
        }
        if !text.fill(source).map_err(|e| damaged(path, e))? {
            break;
        }
    }
    text.emit(text.bytes.len(), Ending::File, sink)
}

struct Text<'a> {
    separator: Finder<'a>,
    lines: bool,
    bytes: Vec<u8>,
    /// Begin of the current document, or of its rest.
    start: usize,
    /// No separator begins before this.
    searched: usize,
    /// A part of the current document was emitted.
    long: bool,
    /// A separator precedes the current document.
    separated: bool,
}

impl Text<'_> {
    /// Begin of the next separator, counted from the start of the document.
    fn find(&mut self) -> Option<usize> {
        let from = self.searched.max(self.start);
        let found = self.separator.find(&self.bytes[from..]);
        let overlap = self.separator.needle().len() - 1;
        self.searched = self.bytes.len().saturating_sub(overlap).max(self.start);
        found.map(|at| from + at - self.start)
    }

    /// Reads on; false at the end.
    fn fill<R: Read>(&mut self, source: &mut BufReader<R>) -> std::io::Result<bool> {
        self.bytes.drain(..self.start);
        self.searched = self.searched.saturating_sub(self.start);
        self.start = 0;
        if self.bytes.capacity() > 4 * STEP && self.bytes.len() < STEP {
            self.bytes.shrink_to(2 * STEP); // the memory of a far longer document
        }
        let next = source.fill_buf()?;
        let taken = next.len().min(STEP);
        self.bytes.extend_from_slice(&next[..taken]);
        source.consume(taken);
        Ok(taken > 0)
    }

    /// Place where a document that is too long is cut: before the last space between a letter or digit
    /// and a letter, where byte-level BPE and WordPiece give the same ids; else between characters.
    fn cut(&self) -> usize {
        let bytes = &self.bytes;
        let from = self.start + 1;
        let exact = (from..bytes.len() - 1).rev().find(|&i| {
            bytes[i] == b' '
                && bytes[i - 1].is_ascii_alphanumeric()
                && bytes[i + 1].is_ascii_alphabetic()
        });
        let line = || (from..bytes.len()).rev().find(|&i| bytes[i] == b'\n');
        let character = || {
            let last = bytes.len() - 4..bytes.len();
            last.rev().find(|&i| !(0x80..0xC0).contains(&bytes[i]))
        };
        exact
            .or_else(line)
            .or_else(character)
            .unwrap_or(bytes.len())
    }

    /// Emits the bytes before `end`.
    fn emit(&mut self, end: usize, ending: Ending, sink: &mut Sink<'_>) -> Result<()> {
        let last = ending != Ending::Cut;
        let mut bytes = &self.bytes[self.start..end];
        if self.lines {
            if last {
                bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
            }
        } else {
            // The line ends around a separator belong to it.
            if self.separated {
                bytes = bytes.strip_prefix(b"\r").unwrap_or(bytes);
                bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
            }
            if ending == Ending::Separator {
                bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
                bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
            }
        }
        let between = self.separated || ending == Ending::Separator;
        self.separated = ending == Ending::Separator;
        let first = !std::mem::replace(&mut self.long, !last);
        if first && (bytes.is_empty() || between && bytes.trim_ascii().is_empty()) {
            return Ok(());
        }
        if first && !sink.begin()? {
            return Ok(());
        }
        match str::from_utf8(bytes) {
            Ok(text) => sink.piece(text, last),
            Err(e) => {
                let reason = format!("not valid UTF-8 (byte {} of it)", e.valid_up_to());
                sink.bad_piece(reason, last)
            }
        }
    }
}

/// Why a piece of text ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Separator,
    File,
    /// The document is longer than a part.
    Cut,
}
