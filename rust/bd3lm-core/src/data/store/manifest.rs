//! The manifest of a data set, and the digests in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::digest::{CHUNK, sha256};
use super::{BIN, DIGESTS, IDX, MANIFEST, PROMPTS, TOKENIZER};
use crate::data::text::Records;
use crate::error::{Error, Result};

pub(super) const FORMAT: &str = "bd3lm-tokens";
/// Version 2 hashes files of more than one chunk by their chunks; version 1 is read as well.
pub(super) const VERSION: u32 = 2;
/// Version of a data set that consists of shards.
pub(super) const VERSION_OF_SHARDS: u32 = 3;

/// Largest vocabulary.
pub const MAX_VOCAB: u32 = 1 << 24;

/// Longest manifest that is read; the names of a million sources fit.
const MAX_MANIFEST: u64 = 256 << 20;

/// Special ids and size of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vocab {
    /// Number of ids, the mask id included.
    pub vocab_size: u32,
    /// First token of every row.
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
    /// SHA-256 in hexadecimal: of the file, or of the digests of its chunks one after the other.
    pub sha256: String,
    /// Bytes of such a chunk; `None`: the digest is that of the whole file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_bytes: Option<u64>,
}

/// Digests of the pieces of the token file, which are read and verified one by one where the data set
/// is elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces {
    /// Bytes of a piece; the last one may be shorter.
    pub bytes: u64,
    /// The file of their SHA-256 digests, 32 bytes each.
    pub digests: FileRecord,
}

/// A data set that is a part of another, in a directory inside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Name of the directory.
    pub name: String,
    /// Digest of its manifest, which holds the digests of its files.
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
    /// Tokens of them that are prompts: clean, and never scored.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub num_prompt_tokens: u64,
    /// UTF-8 bytes of the documents' text, prompts left out. Nothing else in the set depends on it, so it cannot be
    /// checked against the tokens.
    pub num_bytes: u64,
    /// `uint16` or `int32`.
    pub dtype: String,
    /// The other files of the directory.
    pub files: BTreeMap<String, FileRecord>,
    /// Digests of the token file's pieces; `None` in data sets made before there were any. Their file
    /// is none of `files`: a data set that is here is whole without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pieces: Option<Pieces>,
    /// Names of the files that were read.
    pub source: Vec<String>,
    /// Rules by which the text was put back before it was tokenized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detokenizer: Option<String>,
    /// Documents do not end with EOS: they run into each other.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_eos: bool,
    /// Counts of the records that were read, those of both sides of a split together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<Records>,
    /// The data sets that this one consists of, in order; its own files then hold no tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<Shard>,
    /// SHA-256 of this manifest with this field empty.
    pub sha256: String,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// Reads the manifest of a directory, and checks it against its digest and itself.
///
/// # Errors
/// [`Error::Missing`], [`Error::NotADataset`] or [`Error::Corrupt`].
pub fn read_manifest(dir: &Path) -> Result<Manifest> {
    let not = |reason: String| Error::NotADataset {
        path: dir.into(),
        reason,
    };
    if !dir.exists() {
        return Err(Error::Missing { path: dir.into() });
    }
    let path = dir.join(MANIFEST);
    let meta = match fs::metadata(&path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound || !dir.is_dir() => {
            return Err(not(missing(dir)));
        }
        Err(e) => return Err(Error::io(path, e)),
    };
    check_regular(dir, MANIFEST, &meta)?;
    if meta.len() > MAX_MANIFEST {
        return Err(not(format!("its {MANIFEST} has {} bytes", meta.len())));
    }
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
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
    if manifest.format != FORMAT || !(1..=VERSION_OF_SHARDS).contains(&manifest.version) {
        return Err(not(format!(
            "its format is {} version {}; this release reads {FORMAT} versions 1 to \
             {VERSION_OF_SHARDS}",
            manifest.format, manifest.version
        )));
    }
    if sha256(text.replacen(&manifest.sha256, "", 1).as_bytes()) != manifest.sha256 {
        return Err(Error::Corrupt {
            path,
            reason: "its SHA-256 is not the one it holds".into(),
        });
    }
    manifest.check().map_err(|reason| Error::Corrupt {
        path: dir.join(MANIFEST),
        reason,
    })?;
    Ok(manifest)
}

/// Why a directory without a manifest is no data set, with the way out.
fn missing(dir: &Path) -> String {
    let has = |name: &str| dir.join(name).join(MANIFEST).is_file();
    match (has("train"), has("valid")) {
        (true, true) => "it holds the data sets train and valid; name one of them".into(),
        (true, false) => "it holds the data set train; name that".into(),
        (false, true) => "it holds the data set valid; name that".into(),
        _ => format!("it holds no {MANIFEST}; make one with bd3lm-prepare"),
    }
}

/// Refuses pipes, devices and directories in place of a file.
pub(super) fn check_regular(dir: &Path, name: &str, meta: &fs::Metadata) -> Result<()> {
    if meta.is_file() {
        return Ok(());
    }
    Err(Error::NotADataset {
        path: dir.into(),
        reason: format!("its {name} is not a regular file"),
    })
}

/// Whether a text is the name of something in a directory.
pub(super) fn is_name(text: &str) -> bool {
    !matches!(text, "" | "." | "..") && !text.contains(['/', '\\', '\0'])
}

impl Manifest {
    /// Bytes of a token.
    pub(super) fn width(&self) -> u64 {
        if self.is_wide() { 4 } else { 2 }
    }

    pub(super) fn is_wide(&self) -> bool {
        self.dtype == "int32"
    }

    /// Checks the manifest against itself; the error is the first contradiction.
    fn check(&self) -> std::result::Result<(), String> {
        let names: Vec<&str> = self.files.keys().map(String::as_str).collect();
        let joined = !self.shards.is_empty();
        if joined != (self.version == VERSION_OF_SHARDS) {
            return Err(format!(
                "it must have shards if its version is {VERSION_OF_SHARDS}, and only then"
            ));
        }
        let own: &[&str] = match self.num_prompt_tokens {
            0 => &[TOKENIZER, BIN, IDX],
            _ => &[PROMPTS, TOKENIZER, BIN, IDX],
        };
        if !joined && names != own {
            return Err(format!("its files must be {}", own.join(", ")));
        }
        if joined && names != [TOKENIZER] {
            return Err(format!("its only file must be {TOKENIZER}"));
        }
        if let Some(shard) = self.shards.iter().find(|shard| !is_name(&shard.name)) {
            return Err(format!(
                "its shard {:?} must be a directory inside it",
                shard.name
            ));
        }
        if !matches!(self.dtype.as_str(), "uint16" | "int32") {
            return Err("its dtype must be uint16 or int32".into());
        }
        let vocab = self.vocab;
        if !(1..=MAX_VOCAB).contains(&vocab.vocab_size) {
            let size = vocab.vocab_size;
            return Err(format!("its vocab_size = {size} must be 1 to {MAX_VOCAB}"));
        }
        if !self.is_wide() && vocab.vocab_size > 1 << 16 {
            return Err("its vocab_size does not fit its dtype".into());
        }
        for (name, id) in [
            ("bos_id", vocab.bos_id),
            ("eos_id", vocab.eos_id),
            ("mask_id", vocab.mask_id),
        ] {
            if id >= vocab.vocab_size {
                let size = vocab.vocab_size;
                return Err(format!(
                    "its {name} = {id} must be below its vocab_size = {size}"
                ));
            }
        }
        if joined {
            return Ok(()); // sizes are compared with those of the shards
        }
        if self.num_tokens.checked_mul(self.width()) != Some(self.files[BIN].bytes) {
            return Err(format!(
                "its num_tokens = {} of {} bytes each are not the {} bytes of {BIN}",
                self.num_tokens,
                self.width(),
                self.files[BIN].bytes
            ));
        }
        let index = self
            .num_documents
            .checked_mul(20)
            .and_then(|n| n.checked_add(42));
        if index != Some(self.files[IDX].bytes) {
            return Err(format!(
                "its num_documents = {} do not fit the {} bytes of {IDX}",
                self.num_documents, self.files[IDX].bytes
            ));
        }
        let prompts = self.files.get(PROMPTS).map(|record| record.bytes);
        if prompts.is_some_and(|bytes| Some(bytes) != self.num_documents.checked_mul(4)) {
            return Err(format!(
                "its num_documents = {} do not fit its {PROMPTS}",
                self.num_documents
            ));
        }
        if let Some(Pieces { bytes, digests }) = &self.pieces {
            if !(512..=CHUNK).contains(bytes) || !bytes.is_power_of_two() {
                return Err(format!(
                    "its pieces of {bytes} bytes must be of a power of two from 512 to {CHUNK}"
                ));
            }
            if digests.bytes != 32 * self.files[BIN].bytes.div_ceil(*bytes) {
                return Err(format!(
                    "the {} bytes of {DIGESTS} are not 32 for each piece of {BIN}",
                    digests.bytes
                ));
            }
        }
        let chunked = |record: &FileRecord| match record.chunk_bytes {
            None => self.version == 1 || record.bytes <= CHUNK,
            Some(size) => size == CHUNK && record.bytes > CHUNK,
        };
        let digests = self.pieces.as_ref().map(|pieces| &pieces.digests);
        if !self.files.values().chain(digests).all(chunked) {
            return Err(format!(
                "its chunk_bytes must be {CHUNK} for files longer than that"
            ));
        }
        Ok(())
    }
}
