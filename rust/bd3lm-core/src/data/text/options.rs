//! What to take from text files.

use super::detokenize::Detokenizer;

/// What to take from the files.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Field of jsonl and parquet records that holds the text.
    pub text_field: String,
    /// Keep only records whose string field has this value.
    pub filter: Option<(String, String)>,
    /// txt: a document a line, instead of one a file.
    pub lines: bool,
    /// Rules that put a tokenized benchmark text back as it was written.
    pub detokenizer: Option<Detokenizer>,
    /// Let documents run into each other, without an EOS between them.
    pub no_eos: bool,
}

impl Default for ReadOptions {
    fn default() -> Self {
        ReadOptions {
            text_field: "text".into(),
            filter: None,
            lines: false,
            detokenizer: None,
            no_eos: false,
        }
    }
}
