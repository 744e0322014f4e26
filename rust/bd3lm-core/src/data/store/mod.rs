//! Token files: `tokens.bin`/`tokens.idx` in the Megatron IndexedDataset v1 layout, one sequence a
//! document, and a `manifest.json` that says what they hold and how to tell whether they still do.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cpu::multiversion::multiversion;
use crate::cpu::prefetch::prefetch;
use crate::error::{Error, Result};

/// First bytes of an `.idx` file.
const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const DTYPE_I32: u8 = 4;
const DTYPE_U16: u8 = 8;
const FORMAT: &str = "bd3lm-tokens";
const VERSION: u32 = 1;

/// Token ids in file order.
pub const BIN: &str = "tokens.bin";
/// Lengths and positions of the documents.
pub const IDX: &str = "tokens.idx";
/// What the files hold.
pub const MANIFEST: &str = "manifest.json";
/// The tokenizer that made them.
pub const TOKENIZER: &str = "tokenizer.json";

/// A borrowed flat array of token ids, in the width the file holds.
#[derive(Clone, Copy, Debug)]
pub enum Tokens<'a> {
    /// Every id fits 16 bits.
    U16(&'a [u16]),
    /// The wide form.
    I32(&'a [i32]),
}

impl Tokens<'_> {
    /// Number of ids.
    pub fn len(&self) -> usize {
        match self {
            Tokens::U16(x) => x.len(),
            Tokens::I32(x) => x.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Has ids `start..start + len`, which are soon read, on their way from memory.
    pub fn prefetch(&self, start: usize, len: usize) {
        match self {
            Tokens::U16(x) => prefetch(&x[start..start + len]),
            Tokens::I32(x) => prefetch(&x[start..start + len]),
        }
    }

    /// Copies ids `start..start + out.len()` into `out`, widened.
    #[inline]
    pub fn copy_to(&self, start: usize, out: &mut [i64]) {
        match self {
            Tokens::U16(x) => widen_u16(&x[start..start + out.len()], out),
            Tokens::I32(x) => widen_i32(&x[start..start + out.len()], out),
        }
    }
}

multiversion! {
    fn widen_u16(from: &[u16], to: &mut [i64]) {
        for (a, b) in to.iter_mut().zip(from) {
            *a = i64::from(*b);
        }
    }
}

multiversion! {
    fn widen_i32(from: &[i32], to: &mut [i64]) {
        for (a, b) in to.iter_mut().zip(from) {
            *a = i64::from(*b);
        }
    }
}

/// Special ids and size of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vocab {
    /// Number of ids, the mask id included.
    pub vocab_size: u32,
    /// Stands at position 0 of every row.
    pub bos_id: u32,
    /// Ends every document.
    pub eos_id: u32,
    /// The noise; never in a text.
    pub mask_id: u32,
}

/// Size and digest of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Length in bytes.
    pub bytes: u64,
    /// SHA-256, in hexadecimal.
    pub sha256: String,
}

/// Content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `bd3lm-tokens`.
    pub format: String,
    /// Version of the layout.
    pub version: u32,
    /// SHA-256 of the tokenizer's JSON.
    pub tokenizer_sha256: String,
    /// Special ids.
    #[serde(flatten)]
    pub vocab: Vocab,
    /// Documents, empty ones left out.
    pub num_documents: u64,
    /// Tokens, the EOS of every document included.
    pub num_tokens: u64,
    /// UTF-8 bytes of the documents' text.
    pub num_bytes: u64,
    /// `uint16` or `int32`.
    pub dtype: String,
    /// The files beside the manifest.
    pub files: BTreeMap<String, FileRecord>,
    /// Names of what was read.
    pub source: Vec<String>,
    /// Rules by which the text was put back before it was tokenized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detokenizer: Option<String>,
    /// Documents do not end with EOS: they run into each other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_eos: bool,
    /// SHA-256 of this file as it is with nothing here.
    pub sha256: String,
}

/// An open data set: documents of token ids, memory-mapped from disk or held in memory.
#[derive(Debug)]
pub struct TokenStore {
    data: Data,
    offsets: Vec<u64>,
    vocab: Vocab,
    manifest: Option<Manifest>,
}

#[derive(Debug)]
enum Data {
    Mapped { map: Option<Mmap>, wide: bool },
    Narrow(Vec<u16>),
    Wide(Vec<i32>),
}

impl TokenStore {
    /// Opens a prepared directory.
    ///
    /// Sizes and structure are always checked; `verify` also checks the digests of the files and
    /// that every id lies in the vocabulary.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotADataset`], [`Error::Truncated`], [`Error::Corrupt`] or
    /// [`Error::TokenOutOfRange`].
    pub fn open(dir: &Path, verify: bool) -> Result<Self> {
        let manifest = read_manifest(dir)?;
        for (name, record) in &manifest.files {
            let path = dir.join(name);
            let actual = fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
            if actual != record.bytes {
                return Err(Error::Truncated {
                    path,
                    expected: record.bytes,
                    actual,
                });
            }
            if verify {
                let digest = digest_file(&path)?;
                if digest != record.sha256 {
                    return Err(Error::Corrupt {
                        path,
                        reason: "its SHA-256 is not the one in manifest.json".into(),
                    });
                }
            }
        }
        let wide = manifest.dtype == "int32";
        let offsets = read_index(&dir.join(IDX), wide, &manifest)?;
        let path = dir.join(BIN);
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let map = if manifest.num_tokens == 0 {
            None
        } else {
            // SAFETY: the map is read-only. A file that another process shortens meanwhile would
            // fault, as with any memory map; `replaced as a whole` is this layout's contract.
            Some(unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?)
        };
        let store = TokenStore {
            data: Data::Mapped { map, wide },
            offsets,
            vocab: manifest.vocab,
            manifest: Some(manifest),
        };
        if verify {
            store.check_range(&path)?;
        }
        Ok(store)
    }

    /// A data set from ids in memory: `lengths` cut `ids` into documents.
    ///
    /// # Errors
    /// Lengths that do not add up to the ids, or an id outside the vocabulary.
    pub fn from_arrays(ids: Vec<i32>, lengths: &[u64], vocab: Vocab) -> Result<Self> {
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0u64);
        for length in lengths {
            offsets.push(offsets[offsets.len() - 1].saturating_add(*length));
        }
        let end = offsets[offsets.len() - 1];
        if end != ids.len() as u64 {
            return Err(Error::config(
                "lengths",
                format!("a sum of {end}"),
                format!("must add up to the {} ids", ids.len()),
            ));
        }
        let mut store = TokenStore {
            data: Data::Wide(ids),
            offsets,
            vocab,
            manifest: None,
        };
        store.check_range(Path::new("ids"))?;
        if let Data::Wide(ids) = &store.data
            && vocab.vocab_size <= 1 << 16
        {
            store.data = Data::Narrow(ids.iter().map(|id| *id as u16).collect());
        }
        Ok(store)
    }

    /// All ids, document after document.
    pub fn tokens(&self) -> Tokens<'_> {
        match &self.data {
            Data::Narrow(ids) => Tokens::U16(ids),
            Data::Wide(ids) => Tokens::I32(ids),
            Data::Mapped { map, wide } => {
                let bytes: &[u8] = map.as_deref().unwrap_or(&[]);
                // SAFETY: any bit pattern is a valid u16 or i32; `align_to` keeps to alignment,
                // and a map begins on a page, so nothing is cut off in front.
                unsafe {
                    if *wide {
                        Tokens::I32(bytes.align_to::<i32>().1)
                    } else {
                        Tokens::U16(bytes.align_to::<u16>().1)
                    }
                }
            }
        }
    }

    /// Asks the system to read these tokens from the disk, without waiting for it.
    pub fn will_need(&self, tokens: Range<usize>) {
        #[cfg(unix)]
        if let Data::Mapped {
            map: Some(map),
            wide,
        } = &self.data
        {
            let width = if *wide { 4 } else { 2 };
            let (start, len) = (tokens.start * width, tokens.len() * width);
            // A hint: where it is refused, pages come one by one, as they are touched.
            let _ = map.advise_range(memmap2::Advice::WillNeed, start, len);
        }
        #[cfg(not(unix))]
        let _ = tokens;
    }

    /// Where each document begins in [`Self::tokens`], and the end of the last.
    pub fn doc_offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Special ids.
    pub fn vocab(&self) -> Vocab {
        self.vocab
    }

    /// What the directory says of itself; `None` for arrays.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// How often each id occurs; as long as the vocabulary.
    pub fn token_counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.vocab.vocab_size as usize];
        match self.tokens() {
            Tokens::U16(x) => x.iter().for_each(|t| counts[usize::from(*t)] += 1),
            Tokens::I32(x) => x.iter().for_each(|t| counts[*t as usize] += 1),
        }
        counts
    }

    fn check_range(&self, path: &Path) -> Result<()> {
        let vocab_size = i64::from(self.vocab.vocab_size);
        let outside = |id: i64| !(0..vocab_size).contains(&id);
        let bad = match self.tokens() {
            Tokens::U16(x) => x
                .par_iter()
                .map(|t| i64::from(*t))
                .find_any(|t| outside(*t)),
            Tokens::I32(x) => x
                .par_iter()
                .map(|t| i64::from(*t))
                .find_any(|t| outside(*t)),
        };
        match bad {
            None => Ok(()),
            Some(id) => Err(Error::TokenOutOfRange {
                id,
                place: path.display().to_string(),
                vocab_size: vocab_size as u64,
            }),
        }
    }
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let not = |reason: String| Error::NotADataset {
        path: dir.into(),
        reason,
    };
    if !dir.exists() {
        return Err(Error::Missing { path: dir.into() });
    }
    let path = dir.join(MANIFEST);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound || !dir.is_dir() => {
            return Err(not(format!(
                "it holds no {MANIFEST}; make one with bd3lm-prepare"
            )));
        }
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            let reason = "it is not UTF-8".into();
            return Err(Error::Corrupt { path, reason });
        }
        Err(e) => return Err(Error::io(path, e)),
    };
    let manifest: Manifest = serde_json::from_str(&text).map_err(|e| {
        if e.is_data() {
            not(format!("its {MANIFEST} does not describe one ({e})"))
        } else {
            let reason = format!("it is not JSON ({e})");
            Error::Corrupt {
                path: path.clone(),
                reason,
            }
        }
    })?;
    if manifest.format != FORMAT || manifest.version != VERSION {
        return Err(not(format!(
            "its format is {} version {}; this release reads {FORMAT} version {VERSION}",
            manifest.format, manifest.version
        )));
    }
    if sha256(text.replacen(&manifest.sha256, "", 1).as_bytes()) != manifest.sha256 {
        return Err(Error::Corrupt {
            path,
            reason: "its SHA-256 is not the one it holds".into(),
        });
    }
    if !(manifest.files.contains_key(BIN) && manifest.files.contains_key(IDX)) {
        return Err(not(format!("its {MANIFEST} does not name {BIN} and {IDX}")));
    }
    Ok(manifest)
}

/// Document offsets in tokens, from an `.idx` whose every number is checked.
fn read_index(path: &Path, wide: bool, manifest: &Manifest) -> Result<Vec<u64>> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let corrupt = |reason: &str| Error::Corrupt {
        path: path.into(),
        reason: reason.into(),
    };
    if bytes.len() < 34 || &bytes[..9] != MAGIC {
        return Err(corrupt("it does not begin as a Megatron index does"));
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let n = manifest.num_documents as usize;
    if word(9) != 1 || bytes[17] != if wide { DTYPE_I32 } else { DTYPE_U16 } {
        return Err(corrupt("its version or token width is not the manifest's"));
    }
    if word(18) != n as u64 || word(26) != n as u64 + 1 || bytes.len() != 34 + 12 * n + 8 * (n + 1)
    {
        return Err(corrupt("its number of documents is not the manifest's"));
    }
    let width: u64 = if wide { 4 } else { 2 };
    let mut offsets = Vec::with_capacity(n + 1);
    let mut at = 0u64;
    for i in 0..n {
        let length = i32::from_le_bytes(bytes[34 + 4 * i..38 + 4 * i].try_into().expect("4 bytes"));
        if length < 0 || word(34 + 4 * n + 8 * i) != at * width {
            return Err(corrupt("its lengths and positions disagree"));
        }
        offsets.push(at);
        at += length as u64;
    }
    offsets.push(at);
    if at != manifest.num_tokens {
        return Err(corrupt(
            "its lengths do not add up to the manifest's tokens",
        ));
    }
    Ok(offsets)
}

fn digest_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let n = file.read(&mut buffer).map_err(|e| Error::io(path, e))?;
        if n == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
    }
}

/// SHA-256 of bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

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
        let length = i32::try_from(self.current).map_err(|_| {
            Error::config(
                "document",
                self.current,
                "a document holds fewer than 2^31 tokens",
            )
        })?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOCAB: Vocab = Vocab {
        vocab_size: 100,
        bos_id: 0,
        eos_id: 0,
        mask_id: 99,
    };

    fn written(dir: &Path, documents: &[Vec<u32>], vocab: Vocab) -> PathBuf {
        let target = dir.join("set");
        let mut writer = StoreWriter::create(&target, vocab, "{}").unwrap();
        for document in documents {
            writer.push(document).unwrap();
            writer.end_document(document.len() as u64).unwrap();
        }
        writer.finish(vec!["test".into()]).unwrap();
        target
    }

    fn documents(store: &TokenStore) -> Vec<Vec<i64>> {
        let tokens = store.tokens();
        store
            .doc_offsets()
            .windows(2)
            .map(|w| {
                let mut ids = vec![0; (w[1] - w[0]) as usize];
                tokens.copy_to(w[0] as usize, &mut ids);
                ids
            })
            .collect()
    }

    #[test]
    fn wide_and_narrow_round_trip() {
        for vocab_size in [100, 70_000] {
            let dir = tempfile::tempdir().unwrap();
            let vocab = Vocab {
                vocab_size,
                mask_id: vocab_size - 1,
                ..VOCAB
            };
            let target = written(dir.path(), &[vec![1, 2, 3], vec![], vec![98]], vocab);
            let store = TokenStore::open(&target, true).unwrap();
            assert_eq!(documents(&store), [vec![1, 2, 3, 0], vec![0], vec![98, 0]]);
            assert_eq!(store.manifest().unwrap().num_bytes, 4);
        }
    }

    #[test]
    fn nothing_is_left_of_an_unfinished_set() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("set");
        let mut writer = StoreWriter::create(&target, VOCAB, "{}").unwrap();
        writer.push(&[1]).unwrap();
        assert!(matches!(
            writer.push(&[100]),
            Err(Error::TokenOutOfRange { id: 100, .. })
        ));
        assert!(
            writer
                .push(&[99])
                .unwrap_err()
                .to_string()
                .contains("mask token")
        );
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn occupied_and_empty_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let made = StoreWriter::create(dir.path(), VOCAB, "{}");
        assert!(matches!(made, Err(Error::Exists { .. })));
        let writer = StoreWriter::create(&dir.path().join("x"), VOCAB, "{}").unwrap();
        assert!(matches!(
            writer.finish(vec![]),
            Err(Error::EmptyCorpus { .. })
        ));
        assert!(matches!(
            TokenStore::open(dir.path(), true),
            Err(Error::NotADataset { .. })
        ));
        let missing = TokenStore::open(&dir.path().join("y"), true);
        assert!(matches!(missing, Err(Error::Missing { .. })));
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_named() {
        let made = TokenStore::from_arrays(vec![1, 100], &[2], VOCAB);
        assert!(matches!(made, Err(Error::TokenOutOfRange { id: 100, .. })));
        assert!(TokenStore::from_arrays(vec![1, 2], &[3], VOCAB).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_damage_is_noticed(
            documents in proptest::collection::vec(
                proptest::collection::vec(0u32..99, 0..20), 1..6),
            which in 0usize..4,
            at: proptest::sample::Index,
            bit in 0u8..8,
            cut: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let target = written(dir.path(), &documents, VOCAB);
            prop_assert!(TokenStore::open(&target, true).is_ok());
            let path = target.join([BIN, IDX, TOKENIZER, MANIFEST][which]);
            let mut bytes = fs::read(&path).unwrap();
            let at = at.index(bytes.len());
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= 1 << bit;
            }
            fs::write(&path, bytes).unwrap();
            let opened = TokenStore::open(&target, true);
            let named = match opened.unwrap_err() {
                Error::Truncated { .. } => cut && which < 3,
                Error::Corrupt { .. } => !cut || which == 3,
                // A field of the manifest has another name, or a value of another kind.
                Error::NotADataset { .. } => which == 3,
                _ => false,
            };
            prop_assert!(named);
        }
    }
}
