//! Documents out of text, JSON and parquet files, plain or compressed, one at a time.
//!
//! | module | subject |
//! | --- | --- |
//! | `input` | folders, pipes, compression, byte order marks, the format of a file |
//! | `plain` | plain text and its separators |
//! | `json`, `record` | JSON lines and arrays; one object |
//! | `parquet` | columns of parquet files |
//! | `sink`, `records` | bad records skipped and counted |

pub mod detokenize;
mod input;
mod json;
mod options;
mod parquet;
mod plain;
mod record;
mod records;
mod sink;
#[cfg(test)]
mod tests;

pub use detokenize::Detokenizer;
pub use input::{Input, STDIN, expand};
pub use options::{Chat, Exchange, Format, ReadOptions};
pub use parquet::num_rows as parquet_rows;
pub use plain::SEPARATOR;
pub use records::Records;
pub use sink::Piece;
pub(crate) use sink::stopped;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::data::guard::guarded;
use crate::error::{Error, Result};
use sink::Sink;

/// Largest record that is read whole, in bytes of UTF-8: memory is bounded by a few of these. A
/// longer plain text is read in parts; a longer record of JSON or parquet is skipped.
pub const MAX_DOCUMENT: usize = 64 << 20;

/// Reads files one after the other.
#[derive(Debug, Default)]
pub struct Reader {
    options: ReadOptions,
    /// Bytes taken from the files so far, compressed as they are.
    pub read: Arc<AtomicU64>,
    /// Set by another thread, it ends a read with an error, also one that waits for a pipe.
    pub stop: Arc<AtomicBool>,
    records: Records,
    seen: u64,
}

impl Reader {
    /// A reader of files.
    pub fn new(options: &ReadOptions) -> Self {
        Reader {
            options: options.clone(),
            ..Default::default()
        }
    }

    /// Calls `each` with every document of a file, in order, and in parts where it is very long.
    ///
    /// A record that cannot be read is skipped and counted, unless the options are strict, or all
    /// records of a file that the user named are bad.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Format`] for an
    /// unknown kind or a damaged file, [`Error::Record`] for a bad record,
    /// and those of `each`.
    pub fn read(
        &mut self,
        input: &Input,
        each: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        // A decompressor or the parquet reader might panic on a damaged file.
        guarded(|| self.read_file(input, each)).unwrap_or_else(|panic| {
            Err(Error::Format {
                path: input.path.clone(),
                reason: format!("it cannot be read ({panic})"),
            })
        })
    }

    fn read_file(
        &mut self,
        input: &Input,
        each: &mut dyn FnMut(Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        let path = input.path.as_path();
        let is_parquet = input::is_parquet(path, &self.options)?;
        let mut sink = Sink::new(
            &self.options,
            path,
            &mut self.records,
            &mut self.seen,
            each,
            &self.stop,
        );
        if is_parquet {
            parquet::read(path, &self.read, &mut sink)?;
        } else {
            let mut opened = input::open(path, &self.options, &self.read, &self.stop)?;
            match opened.format {
                Format::Text => {
                    let lines = self.options.lines;
                    plain::read_text(path, &mut opened.reader, lines, &mut sink)?;
                }
                Format::JsonLines => json::read_lines(path, &mut opened.reader, &mut sink)?,
                Format::Json => json::read_values(path, &mut opened.reader, &mut sink)?,
                Format::Parquet => unreachable!("refused where it was opened"),
            }
        }
        sink.finish(input.named)
    }

    /// Counts of the records so far.
    pub fn records(&self) -> &Records {
        &self.records
    }
}

/// Sizes of the inputs added up, for progress; a pipe has none.
pub fn total_bytes(inputs: &[Input]) -> u64 {
    let size = |input: &Input| input.path.metadata().map_or(0, |m| m.len());
    inputs.iter().map(size).sum()
}
