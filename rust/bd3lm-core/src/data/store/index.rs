//! The `.idx` file: lengths and positions of the documents. And their prompts.

use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::PROMPTS;
use super::manifest::Manifest;
use crate::error::{Error, Result};

/// First bytes of an `.idx` file.
pub(super) const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
pub(super) const DTYPE_I32: u8 = 4;
pub(super) const DTYPE_U16: u8 = 8;

/// Bytes of the header.
const HEADER: u64 = 34;

/// Document offsets in tokens, from an `.idx` whose every number is checked. Its length is the one
/// in the manifest, which agrees with the number of documents.
pub(super) fn read_index(path: &Path, manifest: &Manifest) -> Result<Vec<u64>> {
    let corrupt = |reason: &str| Error::Corrupt {
        path: path.into(),
        reason: reason.into(),
    };
    let fail = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => corrupt("it ends early"),
        _ => Error::io(path, e),
    };
    let open = |at: u64| {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(at))?;
        Ok(BufReader::with_capacity(1 << 18, file))
    };
    let n = manifest.num_documents;
    let mut lengths = open(0).map_err(fail)?;
    let mut header = [0; HEADER as usize];
    lengths.read_exact(&mut header).map_err(fail)?;
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    if &header[..9] != MAGIC {
        return Err(corrupt("it does not begin as a Megatron index does"));
    }
    let dtype = if manifest.is_wide() {
        DTYPE_I32
    } else {
        DTYPE_U16
    };
    if word(9) != 1 || header[17] != dtype {
        return Err(corrupt("its version or token width is not the manifest's"));
    }
    if word(18) != n || word(26) != n + 1 {
        return Err(corrupt("its number of documents is not the manifest's"));
    }
    let mut positions = open(HEADER + 4 * n).map_err(fail)?;
    let mut offsets = Vec::new();
    let count = usize::try_from(n + 1).map_err(|_| corrupt("it has too many documents"))?;
    offsets
        .try_reserve_exact(count)
        .map_err(|_| corrupt("its documents do not fit the memory"))?;
    let mut at = 0u64;
    let (mut length, mut position) = ([0; 4], [0; 8]);
    for _ in 0..n {
        lengths.read_exact(&mut length).map_err(fail)?;
        positions.read_exact(&mut position).map_err(fail)?;
        let length = i32::from_le_bytes(length);
        // No overflow: `at` is at most the number of tokens, whose bytes are the length of a file.
        if length < 0 || u64::from_le_bytes(position) != at * manifest.width() {
            return Err(corrupt("its lengths and positions disagree"));
        }
        offsets.push(at);
        at += length as u64;
        if at > manifest.num_tokens {
            break;
        }
    }
    offsets.push(at);
    if at != manifest.num_tokens {
        return Err(corrupt(
            "its lengths do not add up to the manifest's tokens",
        ));
    }
    Ok(offsets)
}

/// Number of tokens of each document's prompt, each at most those of its document; empty where the
/// manifest lists no such file.
pub(super) fn read_prompts(path: &Path, manifest: &Manifest, offsets: &[u64]) -> Result<Vec<u32>> {
    if !manifest.files.contains_key(PROMPTS) {
        return Ok(Vec::new());
    }
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let words = bytes.as_chunks::<4>().0;
    let prompts: Vec<u32> = words.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let fits = |(w, prompt): (&[u64], &u32)| u64::from(*prompt) <= w[1] - w[0];
    let sum: u64 = prompts.iter().map(|n| u64::from(*n)).sum();
    let whole = prompts.len() + 1 == offsets.len() && sum == manifest.num_prompt_tokens;
    if whole && offsets.windows(2).zip(&prompts).all(fits) {
        return Ok(prompts);
    }
    Err(Error::Corrupt {
        path: path.into(),
        reason: "its prompts are not those of the documents".into(),
    })
}
