//! Token files: `tokens.bin`/`tokens.idx` in the Megatron IndexedDataset v1 layout, one sequence a
//! document, and a `manifest.json` that says what they hold and how to tell whether they still do.

mod index;
mod manifest;
#[cfg(test)]
mod tests;
mod writer;

pub use manifest::{FileRecord, Manifest, Vocab, sha256};
pub use writer::StoreWriter;

use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use rayon::prelude::*;

use crate::cpu::multiversion::multiversion;
use crate::cpu::prefetch::prefetch;
use crate::error::{Error, Result};
use index::read_index;
use manifest::{digest_file, read_manifest};

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
                format!("{}, the number of ids", ids.len()),
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
