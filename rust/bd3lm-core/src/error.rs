//! The one error type: a variant a cause, each with the sentence its user reads.

use std::path::PathBuf;

/// Result of everything fallible in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure, one variant a cause. Each has a class in `bd3lm.errors`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A parameter outside its range: `field = value: must be allowed`.
    #[error("{field} = {value}: must be {allowed}")]
    Config {
        /// Name of the parameter as its user knows it.
        field: &'static str,
        /// The refused value.
        value: String,
        /// The rest of a sentence that begins with "must be".
        allowed: String,
    },
    /// A file or directory that was named does not exist.
    #[error("{path}: no such file or directory")]
    Missing {
        /// The path that was named.
        path: PathBuf,
    },
    /// An output that would be overwritten.
    #[error("{path} already exists; choose another output or remove it first")]
    Exists {
        /// The path in the way.
        path: PathBuf,
    },
    /// A text file of an unknown kind, or whose content is not of the kind its name says.
    #[error("{path}: {reason}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The fault, and the kinds that are read.
        reason: String,
    },
    /// A record of a text file that cannot be parsed.
    #[error("{path}, record {record}: {reason}")]
    Record {
        /// The file.
        path: PathBuf,
        /// Number of the line or row, from 1.
        record: u64,
        /// The fault.
        reason: String,
    },
    /// Input that holds no token at all.
    #[error("no text was found in {inputs}: {reason}")]
    EmptyCorpus {
        /// The inputs, joined by commas.
        inputs: String,
        /// Outcome of the records that were read.
        reason: String,
    },
    /// A split of a corpus of which one side would be empty.
    #[error("validation would hold 0 of {documents} documents of {inputs}: {reason}")]
    EmptySplit {
        /// The inputs, joined by commas.
        inputs: String,
        /// Documents in all.
        documents: usize,
        /// Why none can be held out, and the way out.
        reason: String,
    },
    /// An output that another process is making.
    #[error("{path} is being made by another process; wait for it or choose another output")]
    Busy {
        /// The output.
        path: PathBuf,
    },
    /// A tokenizer definition that cannot be loaded or applied.
    #[error("tokenizer {name}: {reason}")]
    Tokenizer {
        /// Name or path.
        name: String,
        /// The fault.
        reason: String,
    },
    /// A directory that is not a prepared data set.
    #[error("{path} is not a prepared data set: {reason}")]
    NotADataset {
        /// The directory.
        path: PathBuf,
        /// The missing part.
        reason: String,
    },
    /// A file of a data set that is shorter or longer than its manifest says.
    #[error(
        "{path} holds {actual} bytes where its manifest says {expected}: the file is truncated or was replaced"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes expected.
        expected: u64,
        /// Bytes found.
        actual: u64,
    },
    /// A file whose content does not match its recorded digest or its own structure.
    #[error("{path} is corrupt: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The check that failed.
        reason: String,
    },
    /// A token id that the vocabulary does not hold.
    #[error("token id {id} in {place} is outside the vocabulary of {vocab_size} ids")]
    TokenOutOfRange {
        /// The offending id.
        id: i64,
        /// The place of the id.
        place: String,
        /// Ids allowed are `0..vocab_size`.
        vocab_size: u64,
    },
    /// The disk filled up while writing.
    #[error("{path}: no space left on the device; nothing was kept")]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// Any other failure of the operating system, with the path it concerns.
    #[error("{path}: {source}")]
    Io {
        /// The path being read or written.
        path: PathBuf,
        /// The system's own error.
        source: std::io::Error,
    },
}

impl Error {
    /// Wraps an I/O error, giving a missing file and a full disk their own variants.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { path },
            std::io::ErrorKind::StorageFull => Error::DiskFull { path },
            _ => Error::Io { path, source },
        }
    }

    /// Inputs without any text.
    pub fn empty(inputs: &[String], reason: impl Into<String>) -> Self {
        Error::EmptyCorpus {
            inputs: first_of(inputs),
            reason: reason.into(),
        }
    }

    /// A parameter outside its range; `allowed` ends a sentence that begins with "must be".
    pub fn config(field: &'static str, value: impl ToString, allowed: impl Into<String>) -> Self {
        Error::Config {
            field,
            value: value.to_string(),
            allowed: allowed.into(),
        }
    }

    /// A buffer of `len` elements where another number is needed.
    pub fn length(field: &'static str, len: usize, needed: usize) -> Self {
        Error::config(
            field,
            format!("{len} elements"),
            format!("{needed} elements long"),
        )
    }
}

/// The value of a name in a table of all of them.
///
/// # Errors
/// A name that is not in the table; the error lists those that are.
pub fn named<T: Copy>(field: &'static str, name: &str, table: &[(&'static str, T)]) -> Result<T> {
    let found = table.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = table.iter().map(|(name, _)| *name).collect();
        Error::config(field, name, format!("one of {}", names.join(", ")))
    })
}

/// The first inputs, and the number of the others.
pub(crate) fn first_of(inputs: &[String]) -> String {
    const LISTED: usize = 5;
    let first = inputs[..inputs.len().min(LISTED)].join(", ");
    match inputs.len().saturating_sub(LISTED) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}
