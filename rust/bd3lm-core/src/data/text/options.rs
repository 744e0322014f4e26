//! Options of reading text files.

use std::fmt;
use std::sync::Arc;

use super::detokenize::Detokenizer;
use crate::error::{Result, named};

/// Format of a file of documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Plain text: one document, or several with lines of `<|endoftext|>` between them.
    Text,
    /// A JSON object a line.
    JsonLines,
    /// A JSON array of objects, or objects one after the other.
    Json,
    /// Apache Parquet.
    Parquet,
}

impl Format {
    /// Finds a format by its name.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) that lists the names.
    pub fn named(name: &str) -> Result<Self> {
        let table = [
            ("txt", Format::Text),
            ("jsonl", Format::JsonLines),
            ("json", Format::Json),
            ("parquet", Format::Parquet),
        ];
        named("format", name, &table)
    }
}

/// Text of a prompt and of the response to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Clean context, which is never noised; may be empty.
    pub prompt: String,
    /// The text behind it.
    pub response: String,
}

/// Renders a JSON record whose text field is no string; the error is the reason for which it
/// cannot.
type Render = dyn Fn(&str) -> std::result::Result<Vec<Exchange>, String> + Send + Sync;

/// The documents of records that hold chats.
#[derive(Clone)]
pub struct Chat(pub Arc<Render>);

impl fmt::Debug for Chat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chat")
    }
}

/// Format of files, and the documents to keep.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Field of JSON and parquet records that holds the text; `a.b` is field `b` of field `a`.
    pub text_field: String,
    /// Keep only records whose field has this value.
    pub filter: Option<(String, String)>,
    /// txt: a document a line.
    pub lines: bool,
    /// Rules that put a tokenized benchmark text back as it was written.
    pub detokenizer: Option<Detokenizer>,
    /// Let documents run into each other, without an EOS between them.
    pub no_eos: bool,
    /// Format of all files; `None`: by the name of each, or by its first bytes.
    pub format: Option<Format>,
    /// The first record that cannot be read is an error, instead of being skipped and counted.
    pub strict: bool,
    /// Rows of the concatenated files to read; `None`: all.
    pub rows: Option<(u64, u64)>,
    /// Name of the source in the manifest, for pipes; `None`: the paths.
    pub source: Option<String>,
    /// JSON: renders records whose text field is an array or object; `None`: these are bad.
    pub chat: Option<Chat>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        ReadOptions {
            text_field: "text".into(),
            filter: None,
            lines: false,
            detokenizer: None,
            no_eos: false,
            format: None,
            strict: false,
            rows: None,
            source: None,
            chat: None,
        }
    }
}
