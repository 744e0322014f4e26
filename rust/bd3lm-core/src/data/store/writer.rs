//! Writes the files of a data set.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::digest::{HashingFile, PIECE, sha256};
use super::index::{DTYPE_I32, DTYPE_U16, MAGIC};
use super::manifest::{FORMAT, FileRecord, Manifest, Pieces, VERSION, Vocab};
use super::partial::{Partial, sync};
use super::{BIN, DIGESTS, IDX, MANIFEST, PROMPTS, TOKENIZER};
use crate::data::text::Records;
use crate::error::{Error, Result};

/// Tokens of the longest document.
const MAX_DOCUMENT_TOKENS: u64 = 1 << 30;

/// Settings with which a data set is made.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// Special ids.
    pub vocab: Vocab,
    /// JSON of the tokenizer.
    pub tokenizer: String,
    /// Name of the rules by which the text was put back before it was tokenized.
    pub detokenizer: Option<String>,
    /// Let documents run into each other, without an EOS between them.
    pub no_eos: bool,
}

/// Tokens and bytes of text of a part of a document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Size {
    tokens: u64,
    bytes: u64,
}

/// Writes a data set, a document at a time, in memory bounded by 4 bytes a document and 32
/// bytes for 16 KiB of tokens.
pub struct StoreWriter {
    dir: PathBuf,
    bin: HashingFile,
    buffer: Vec<u8>,
    lengths: Vec<i32>,
    current: Size,
    last: Size,
    total: Size,
    /// Places where the first document can be cut, while it is the only one.
    cuts: Vec<Size>,
    /// Tokens of the prompt of each closed document, and of the current one.
    prompts: Vec<u32>,
    prompt: u32,
    recipe: Recipe,
}

impl StoreWriter {
    /// Starts a data set in an empty directory.
    ///
    /// # Errors
    /// A failing disk.
    pub fn create(dir: &Path, recipe: Recipe) -> Result<Self> {
        Ok(StoreWriter {
            dir: dir.into(),
            bin: HashingFile::create_in_pieces(dir.join(BIN))?,
            buffer: Vec::new(),
            lengths: Vec::new(),
            current: Size::default(),
            last: Size::default(),
            total: Size::default(),
            cuts: Vec::new(),
            prompts: Vec::new(),
            prompt: 0,
            recipe,
        })
    }

    /// Appends ids to the current document, made from so many bytes of text. A document of more
    /// than 2³⁰ tokens continues as another, as the index counts in 32 bits.
    ///
    /// # Errors
    /// An id outside the vocabulary, or the mask id; a failing disk.
    pub fn push(&mut self, ids: &[u32], text_bytes: u64) -> Result<()> {
        let Vocab {
            vocab_size,
            mask_id,
            ..
        } = self.recipe.vocab;
        if let Some(&id) = ids.iter().find(|id| **id >= vocab_size || **id == mask_id) {
            return Err(self.refuse(id));
        }
        if self.current.tokens + ids.len() as u64 > MAX_DOCUMENT_TOKENS {
            self.end_document()?;
        }
        self.append(ids)?;
        self.current.bytes += text_bytes;
        if self.lengths.is_empty() && self.prompt == 0 {
            self.cuts.push(self.current);
        }
        Ok(())
    }

    /// Appends ids of a prompt, with which the current document begins. Their text is not counted:
    /// only what follows is scored.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_prompt(&mut self, ids: &[u32]) -> Result<()> {
        self.push(ids, 0)?;
        self.cuts = Vec::new(); // a document with a prompt stays whole
        self.prompt = self.current.tokens as u32;
        Ok(())
    }

    fn append(&mut self, ids: &[u32]) -> Result<()> {
        self.buffer.clear();
        if self.is_wide() {
            self.buffer
                .extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        } else {
            self.buffer.resize(2 * ids.len(), 0);
            for (two, id) in self.buffer.as_chunks_mut::<2>().0.iter_mut().zip(ids) {
                *two = (*id as u16).to_le_bytes();
            }
        }
        self.current.tokens += ids.len() as u64;
        self.bin.write(&self.buffer)
    }

    fn refuse(&self, id: u32) -> Error {
        let document = self.lengths.len() + 1;
        if id == self.recipe.vocab.mask_id {
            return Error::Tokenizer {
                name: "of this data set".into(),
                reason: format!(
                    "it makes the mask token out of document {document}, which no text may hold"
                ),
            };
        }
        Error::TokenOutOfRange {
            id: i64::from(id),
            place: format!("document {document}"),
            vocab_size: u64::from(self.recipe.vocab.vocab_size),
        }
    }

    /// Closes the current document, with EOS unless documents run into each other.
    ///
    /// # Errors
    /// A document of 2³¹ tokens or more; a failing disk.
    pub fn end_document(&mut self) -> Result<()> {
        if !self.recipe.no_eos {
            self.append(&[self.recipe.vocab.eos_id])?;
        } else if self.current.tokens == 0 {
            self.current = Size::default(); // its text made no token
            self.prompt = 0;
            return Ok(());
        }
        if !self.lengths.is_empty() {
            self.cuts = Vec::new();
        }
        self.lengths.push(length(self.current.tokens)?);
        self.prompts.push(std::mem::take(&mut self.prompt));
        self.total.tokens += self.current.tokens;
        self.total.bytes += self.current.bytes;
        self.last = std::mem::take(&mut self.current);
        Ok(())
    }

    /// Tokens of the closed documents.
    pub fn num_tokens(&self) -> u64 {
        self.total.tokens
    }

    /// Closed documents.
    pub fn num_documents(&self) -> usize {
        self.lengths.len()
    }

    /// Moves the last document to another data set.
    ///
    /// # Errors
    /// A failing disk.
    pub fn move_last(&mut self, to: &mut StoreWriter) -> Result<()> {
        if self.lengths.pop().is_some() {
            let last = self.last;
            self.move_tail(last, to)?;
            to.lengths.push(length(last.tokens)?);
            to.prompts.extend(self.prompts.pop());
        }
        Ok(())
    }

    /// Moves the tail of the only document to another data set: about the given fraction of its
    /// tokens. False where there is no place to cut it.
    ///
    /// # Errors
    /// A failing disk.
    pub fn split_only(&mut self, fraction: f64, to: &mut StoreWriter) -> Result<bool> {
        let (all, eos) = (self.total, u64::from(!self.recipe.no_eos));
        let text = all.tokens - eos;
        let wanted = (text as f64 * (1.0 - fraction)) as u64;
        let possible = self
            .cuts
            .iter()
            .filter(|cut| (1..text).contains(&cut.tokens));
        let Some(head) = possible
            .min_by_key(|cut| cut.tokens.abs_diff(wanted))
            .copied()
        else {
            return Ok(false);
        };
        let tail = Size {
            tokens: all.tokens - head.tokens,
            bytes: all.bytes - head.bytes,
        };
        self.lengths.clear();
        self.prompts.clear();
        self.move_tail(tail, to)?;
        to.lengths.push(length(tail.tokens)?);
        to.prompts.push(0);
        self.total = Size::default();
        self.current = head;
        self.end_document()?;
        Ok(true)
    }

    fn move_tail(&mut self, tail: Size, to: &mut StoreWriter) -> Result<()> {
        let width = self.width();
        let from = (self.total.tokens - tail.tokens) * width;
        self.bin.cut(from, &mut |bytes| to.bin.write(bytes))?;
        self.total.tokens -= tail.tokens;
        self.total.bytes -= tail.bytes;
        to.total.tokens += tail.tokens;
        to.total.bytes += tail.bytes;
        to.last = tail;
        Ok(())
    }

    /// Writes index, tokenizer and manifest, and waits until they are on the disk.
    ///
    /// # Errors
    /// [`Error::EmptyCorpus`] when no document was closed; a failing disk.
    pub fn finish(mut self, source: Vec<String>, records: Option<Records>) -> Result<Manifest> {
        if self.lengths.is_empty() {
            return Err(Error::empty(&source, "an empty corpus cannot be used"));
        }
        let mut files = BTreeMap::new();
        files.insert(BIN.to_string(), self.bin.finish()?);
        files.insert(IDX.to_string(), self.write_index()?);
        let mut digests = HashingFile::create(self.dir.join(DIGESTS))?;
        digests.write(self.bin.take_pieces().as_flattened())?;
        let pieces = Pieces {
            bytes: PIECE,
            digests: digests.finish()?,
        };
        let prompt_tokens = self.prompts.iter().map(|n| u64::from(*n)).sum();
        if prompt_tokens > 0 {
            let mut file = HashingFile::create(self.dir.join(PROMPTS))?;
            for prompt in &self.prompts {
                file.write(&prompt.to_le_bytes())?;
            }
            files.insert(PROMPTS.to_string(), file.finish()?);
        }
        let mut tokenizer = HashingFile::create(self.dir.join(TOKENIZER))?;
        tokenizer.write(self.recipe.tokenizer.as_bytes())?;
        files.insert(TOKENIZER.to_string(), tokenizer.finish()?);
        let mut manifest = Manifest {
            format: FORMAT.into(),
            version: VERSION,
            tokenizer_sha256: sha256(self.recipe.tokenizer.as_bytes()),
            vocab: self.recipe.vocab,
            num_documents: self.lengths.len() as u64,
            num_tokens: self.total.tokens,
            num_prompt_tokens: prompt_tokens,
            num_bytes: self.total.bytes,
            dtype: if self.is_wide() { "int32" } else { "uint16" }.into(),
            files,
            pieces: Some(pieces),
            source,
            detokenizer: self.recipe.detokenizer.clone(),
            no_eos: self.recipe.no_eos,
            records,
            shards: Vec::new(),
            sha256: String::new(),
        };
        write_manifest(&self.dir, MANIFEST, &mut manifest)?;
        Ok(manifest)
    }

    fn is_wide(&self) -> bool {
        self.recipe.vocab.vocab_size > 1 << 16
    }

    fn width(&self) -> u64 {
        if self.is_wide() { 4 } else { 2 }
    }

    fn write_index(&self) -> Result<FileRecord> {
        let mut file = HashingFile::create(self.dir.join(IDX))?;
        let n = self.lengths.len() as u64;
        let code = if self.is_wide() { DTYPE_I32 } else { DTYPE_U16 };
        file.write(MAGIC)?;
        file.write(&1u64.to_le_bytes())?;
        file.write(&[code])?;
        file.write(&n.to_le_bytes())?;
        file.write(&(n + 1).to_le_bytes())?;
        for length in &self.lengths {
            file.write(&length.to_le_bytes())?;
        }
        let mut at = 0u64;
        for length in &self.lengths {
            file.write(&at.to_le_bytes())?;
            at += *length as u64 * self.width();
        }
        for document in 0..=n {
            file.write(&document.to_le_bytes())?;
        }
        file.finish()
    }
}

/// Puts its digest into a manifest, and writes it to a file, which is on the disk afterwards.
pub(super) fn write_manifest(dir: &Path, name: &str, manifest: &mut Manifest) -> Result<()> {
    let text =
        |m: &Manifest| serde_json::to_string_pretty(m).expect("a manifest is plain JSON") + "\n";
    manifest.sha256 = sha256(text(manifest).as_bytes());
    let mut file = HashingFile::create(dir.join(name))?;
    file.write(text(manifest).as_bytes())?;
    file.finish()?;
    sync(dir)
}

fn length(tokens: u64) -> Result<i32> {
    i32::try_from(tokens).map_err(|_| Error::config("document", tokens, "fewer than 2^31 tokens"))
}

/// Writes whole documents of ids to a new data set at `target`.
///
/// # Errors
/// As [`Partial::create`] and [`StoreWriter`].
pub fn write_documents<'a>(
    target: &Path,
    recipe: Recipe,
    documents: impl IntoIterator<Item = &'a [u32]>,
) -> Result<Manifest> {
    let partial = Partial::create(target)?;
    let mut writer = StoreWriter::create(partial.path(), recipe)?;
    for ids in documents {
        writer.push(ids, ids.len() as u64)?;
        writer.end_document()?;
    }
    let manifest = writer.finish(vec!["ids".into()], None)?;
    partial.commit()?;
    Ok(manifest)
}
