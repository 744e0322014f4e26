//! The manifest of a data set, and the digests in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BIN, IDX, MANIFEST};
use crate::error::{Error, Result};

pub(super) const FORMAT: &str = "bd3lm-tokens";
pub(super) const VERSION: u32 = 1;

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

pub(super) fn read_manifest(dir: &Path) -> Result<Manifest> {
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

pub(super) fn digest_file(path: &Path) -> Result<String> {
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

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
