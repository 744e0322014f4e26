//! Writes a data set aside, and puts it in its place as a whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::index::{DTYPE_I32, DTYPE_U16, MAGIC};
use super::manifest::{FORMAT, FileRecord, Manifest, VERSION, Vocab, hex, sha256};
use super::{BIN, IDX, MANIFEST, TOKENIZER};
use crate::error::{Error, Result};

/// Writes a data set, a document at a time, in memory bounded by 4 bytes a document.
///
/// Everything goes to a hidden sibling directory, which takes its name in [`Self::finish`]. A
/// writer that is dropped before that takes its files with it.
pub struct StoreWriter {
    target: PathBuf,
    partial: PathBuf,
    bin: HashingFile,
    buffer: Vec<u8>,
    lengths: Vec<i32>,
    current: u64,
    num_tokens: u64,
    num_bytes: u64,
    vocab: Vocab,
    tokenizer: String,
    detokenizer: Option<String>,
    no_eos: bool,
}

impl StoreWriter {
    /// Starts a data set at `target`, made with the tokenizer whose JSON is given.
    ///
    /// # Errors
    /// [`Error::Exists`] when something is there already.
    pub fn create(target: &Path, vocab: Vocab, tokenizer: &str) -> Result<Self> {
        if target.exists() {
            return Err(Error::Exists {
                path: target.into(),
            });
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = target.with_file_name(format!(".{name}.partial"));
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
        }
        fs::create_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
        let bin = HashingFile::create(partial.join(BIN))?;
        Ok(StoreWriter {
            target: target.into(),
            partial,
            bin,
            buffer: Vec::new(),
            lengths: Vec::new(),
            current: 0,
            num_tokens: 0,
            num_bytes: 0,
            vocab,
            tokenizer: tokenizer.into(),
            detokenizer: None,
            no_eos: false,
        })
    }

    /// Notes by which rules the text was put back, and whether documents run into each other.
    pub fn made_from(mut self, detokenizer: Option<&str>, no_eos: bool) -> Self {
        self.detokenizer = detokenizer.map(Into::into);
        self.no_eos = no_eos;
        self
    }

    /// Appends ids to the current document.
    ///
    /// # Errors
    /// An id outside the vocabulary, or the mask id; a failing disk.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        let Vocab {
            vocab_size,
            mask_id,
            ..
        } = self.vocab;
        if let Some(&id) = ids.iter().find(|id| **id >= vocab_size || **id == mask_id) {
            return Err(self.refuse(id));
        }
        self.buffer.clear();
        if self.wide() {
            self.buffer
                .extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        } else {
            self.buffer.resize(2 * ids.len(), 0);
            for (two, id) in self.buffer.as_chunks_mut::<2>().0.iter_mut().zip(ids) {
                *two = (*id as u16).to_le_bytes();
            }
        }
        self.current += ids.len() as u64;
        self.bin.write(&self.buffer)
    }

    fn refuse(&self, id: u32) -> Error {
        let document = self.lengths.len() + 1;
        if id < self.vocab.vocab_size {
            return Error::Tokenizer {
                name: "of this data set".into(),
                reason: format!(
                    "document {document} spells out the mask token, which texts may not hold"
                ),
            };
        }
        Error::TokenOutOfRange {
            id: i64::from(id),
            place: format!("document {document}"),
            vocab_size: u64::from(self.vocab.vocab_size),
        }
    }

    /// Closes the current document, `text_bytes` long before tokenization, with EOS unless
    /// documents run into each other.
    ///
    /// # Errors
    /// A document of 2³¹ tokens or more; a failing disk.
    pub fn end_document(&mut self, text_bytes: u64) -> Result<()> {
        if !self.no_eos {
            self.push(&[self.vocab.eos_id])?;
        } else if self.current == 0 {
            return Ok(()); // nothing is left out: there was no token
        }
        let length = i32::try_from(self.current)
            .map_err(|_| Error::config("document", self.current, "fewer than 2^31 tokens"))?;
        self.lengths.push(length);
        self.num_tokens += self.current;
        self.num_bytes += text_bytes;
        self.current = 0;
        Ok(())
    }

    /// Tokens of the closed documents.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// Writes index, tokenizer and manifest, and puts the directory in its place.
    ///
    /// # Errors
    /// [`Error::EmptyCorpus`] when no document was closed; a failing disk.
    pub fn finish(mut self, source: Vec<String>) -> Result<Manifest> {
        if self.lengths.is_empty() {
            return Err(Error::EmptyCorpus {
                inputs: source.join(", "),
            });
        }
        let mut files = BTreeMap::new();
        files.insert(BIN.to_string(), self.bin.finish()?);
        files.insert(IDX.to_string(), self.write_index()?);
        let mut tokenizer = HashingFile::create(self.partial.join(TOKENIZER))?;
        tokenizer.write(self.tokenizer.as_bytes())?;
        files.insert(TOKENIZER.to_string(), tokenizer.finish()?);
        let mut manifest = Manifest {
            format: FORMAT.into(),
            version: VERSION,
            tokenizer_sha256: sha256(self.tokenizer.as_bytes()),
            vocab: self.vocab,
            num_documents: self.lengths.len() as u64,
            num_tokens: self.num_tokens,
            num_bytes: self.num_bytes,
            dtype: if self.wide() { "int32" } else { "uint16" }.into(),
            files,
            source,
            detokenizer: self.detokenizer.clone(),
            no_eos: self.no_eos,
            sha256: String::new(),
        };
        let text = |m: &Manifest| {
            serde_json::to_string_pretty(m).expect("a manifest is plain JSON") + "\n"
        };
        manifest.sha256 = sha256(text(&manifest).as_bytes());
        let mut file = HashingFile::create(self.partial.join(MANIFEST))?;
        file.write(text(&manifest).as_bytes())?;
        file.finish()?;
        fs::rename(&self.partial, &self.target).map_err(|e| Error::io(&self.target, e))?;
        Ok(manifest)
    }

    fn wide(&self) -> bool {
        self.vocab.vocab_size > 1 << 16
    }

    fn write_index(&self) -> Result<FileRecord> {
        let mut file = HashingFile::create(self.partial.join(IDX))?;
        let n = self.lengths.len() as u64;
        let (code, width) = if self.wide() {
            (DTYPE_I32, 4)
        } else {
            (DTYPE_U16, 2)
        };
        file.write(MAGIC)?;
        file.write(&1u64.to_le_bytes())?;
        file.write(&[code])?;
        file.write(&n.to_le_bytes())?;
        file.write(&(n + 1).to_le_bytes())?;
        for length in &self.lengths {
            file.write(&length.to_le_bytes())?;
        }
        let mut at = 0i64;
        for length in &self.lengths {
            file.write(&at.to_le_bytes())?;
            at += i64::from(*length) * width;
        }
        for document in 0..=n {
            file.write(&document.to_le_bytes())?;
        }
        file.finish()
    }
}

impl Drop for StoreWriter {
    fn drop(&mut self) {
        // After `finish` there is nothing left under this name.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// A file whose digest is known when it is closed.
struct HashingFile {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    bytes: u64,
}

impl HashingFile {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
        Ok(HashingFile {
            path,
            file: BufWriter::with_capacity(1 << 18, file),
            hasher: Sha256::new(),
            bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file
            .write_all(bytes)
            .map_err(|e| Error::io(&self.path, e))
    }

    fn finish(&mut self) -> Result<FileRecord> {
        self.file.flush().map_err(|e| Error::io(&self.path, e))?;
        self.file
            .get_ref()
            .sync_all()
            .map_err(|e| Error::io(&self.path, e))?;
        Ok(FileRecord {
            bytes: self.bytes,
            sha256: hex(&std::mem::take(&mut self.hasher).finalize()),
        })
    }
}
