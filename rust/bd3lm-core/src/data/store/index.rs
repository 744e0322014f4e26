//! The `.idx` file: lengths and positions of the documents.

use std::fs;
use std::path::Path;

use super::manifest::Manifest;
use crate::error::{Error, Result};

/// First bytes of an `.idx` file.
pub(super) const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
pub(super) const DTYPE_I32: u8 = 4;
pub(super) const DTYPE_U16: u8 = 8;

/// Document offsets in tokens, from an `.idx` whose every number is checked.
pub(super) fn read_index(path: &Path, wide: bool, manifest: &Manifest) -> Result<Vec<u64>> {
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
