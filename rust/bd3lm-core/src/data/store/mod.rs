//! Token files: `tokens.bin` and `tokens.idx` in the Megatron IndexedDataset v1 layout, one
//! sequence per document, and a `manifest.json` with the digests of the files.

mod digest;
mod index;
mod manifest;
mod partial;
mod shards;
mod staged;
#[cfg(test)]
mod tests;
mod verify;
mod writer;

pub use digest::sha256;
pub use manifest::{FileRecord, MAX_VOCAB, Manifest, Pieces, Shard, Vocab};
pub use partial::Partial;
pub use shards::join;
pub use staged::Staged;
pub use verify::Verify;
pub use writer::{Recipe, StoreWriter, write_documents};

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;

use crate::cpu::multiversion::multiversion;
use crate::cpu::prefetch::prefetch;
use crate::data::text::stopped;
use crate::error::{Error, Result};
use index::{read_index, read_prompts};
use manifest::check_regular;
pub use manifest::read_manifest;
use shards::Shards;

/// Tokens that are counted between two looks at whether to stop.
const COUNTED_TOGETHER: usize = 1 << 20;

/// Token ids in file order.
pub const BIN: &str = "tokens.bin";
/// Lengths and positions of the documents.
pub const IDX: &str = "tokens.idx";
/// Tokens of each document's prompt, of 32 bits each; only where a document has one.
pub const PROMPTS: &str = "prompts.bin";
/// Digests of the pieces of the token ids.
pub const DIGESTS: &str = "digests.bin";
/// Description and digests of the files.
pub const MANIFEST: &str = "manifest.json";
/// The tokenizer that made them.
pub const TOKENIZER: &str = "tokenizer.json";

/// Borrowed token ids, in the width the file holds.
#[derive(Clone, Copy, Debug)]
pub enum Tokens<'a> {
    /// Every id fits 16 bits.
    U16(&'a [u16]),
    /// The wide form.
    I32(&'a [i32]),
    /// Those of several data sets.
    #[allow(private_interfaces)]
    Joined(&'a Shards),
    /// Copies of those that a batch reads.
    Staged(&'a Staged<'a>),
}

impl Tokens<'_> {
    /// Number of ids.
    pub fn len(&self) -> usize {
        match self {
            Tokens::U16(x) => x.len(),
            Tokens::I32(x) => x.len(),
            Tokens::Joined(shards) => shards.len(),
            Tokens::Staged(staged) => staged.len(),
        }
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Prefetches ids `start..start + len`.
    pub fn prefetch(&self, start: usize, len: usize) {
        match self {
            Tokens::U16(x) => prefetch(&x[start..start + len]),
            Tokens::I32(x) => prefetch(&x[start..start + len]),
            Tokens::Joined(shards) => shards.prefetch(start, len),
            Tokens::Staged(_) => {} // just written
        }
    }

    /// Copies ids `start..start + out.len()` into `out`, widened.
    #[inline]
    pub fn copy_to(&self, start: usize, out: &mut [i64]) {
        match self {
            Tokens::U16(x) => widen_u16(&x[start..start + out.len()], out),
            Tokens::I32(x) => widen_i32(&x[start..start + out.len()], out),
            Tokens::Joined(shards) => shards.copy_to(start, out),
            Tokens::Staged(staged) => staged.copy_to(start, out),
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
    prompts: Vec<u32>,
    vocab: Vocab,
    manifest: Option<Manifest>,
    opened: Option<Opened>,
}

/// The token file of a directory, as it was when it was opened.
#[derive(Debug)]
struct Opened {
    file: File,
    path: PathBuf,
    stamp: (u64, i128, i128, u64),
}

#[derive(Debug)]
enum Data {
    Mapped {
        map: Option<Mmap>,
        wide: bool,
    },
    Narrow(Vec<u16>),
    Wide(Vec<i32>),
    Joined(Shards),
    /// Elsewhere: so many, of which the caller brings [`Staged`] copies.
    Absent(usize),
}

impl TokenStore {
    /// Opens a prepared directory. Sizes and structure are always checked.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotADataset`], [`Error::Truncated`], [`Error::Corrupt`] or
    /// [`Error::TokenOutOfRange`].
    pub fn open(dir: &Path, verify: Verify) -> Result<Self> {
        Self::open_unless(dir, verify, &AtomicBool::new(false))
    }

    /// [`Self::open`], unless `stop` is set: verifying many gigabytes takes a while.
    ///
    /// # Errors
    /// The same, and one that nobody sees where it was stopped.
    pub fn open_unless(dir: &Path, verify: Verify, stop: &AtomicBool) -> Result<Self> {
        Self::open_parts(dir, verify, stop, true)
    }

    /// [`Self::open_unless`] for a directory that lacks `tokens.bin`, which is elsewhere.
    ///
    /// # Errors
    /// The same, for the other files.
    pub fn open_absent(dir: &Path, verify: Verify, stop: &AtomicBool) -> Result<Self> {
        Self::open_parts(dir, verify, stop, false)
    }

    fn open_parts(dir: &Path, verify: Verify, stop: &AtomicBool, present: bool) -> Result<Self> {
        let manifest = read_manifest(dir)?;
        let mut here = manifest.clone();
        if !present {
            here.files.remove(BIN);
        }
        for (name, record) in &here.files {
            let path = dir.join(name);
            let meta = fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            check_regular(dir, name, &meta)?;
            if meta.len() != record.bytes {
                return Err(Error::Truncated {
                    path,
                    expected: record.bytes,
                    actual: meta.len(),
                });
            }
        }
        verify::verify(dir, &here, verify, stop)?;
        if !manifest.shards.is_empty() {
            let open = |path: &Path| Self::open_parts(path, verify, stop, present);
            let (shards, offsets, prompts) = Shards::open(dir, &manifest, open)?;
            return Ok(TokenStore {
                data: Data::Joined(shards),
                offsets,
                prompts,
                vocab: manifest.vocab,
                manifest: Some(manifest),
                opened: None,
            });
        }
        let offsets = read_index(&dir.join(IDX), &manifest)?;
        let prompts = read_prompts(&dir.join(PROMPTS), &manifest, &offsets)?;
        if !present {
            return Ok(TokenStore {
                data: Data::Absent(manifest.num_tokens as usize),
                offsets,
                prompts,
                vocab: manifest.vocab,
                manifest: Some(manifest),
                opened: None,
            });
        }
        let path = dir.join(BIN);
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        let meta = file.metadata().map_err(|e| Error::io(&path, e))?;
        let map = if manifest.num_tokens == 0 {
            None
        } else {
            // SAFETY: the map is read-only. A file that another process shortens meanwhile would
            // fault, as with any memory map; `replaced as a whole` is this layout's contract.
            Some(unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?)
        };
        let actual = map.as_ref().map_or(0, |map| map.len() as u64);
        if actual != manifest.files[BIN].bytes {
            return Err(Error::Truncated {
                path,
                expected: manifest.files[BIN].bytes,
                actual,
            });
        }
        Ok(TokenStore {
            data: Data::Mapped {
                map,
                wide: manifest.is_wide(),
            },
            offsets,
            prompts,
            vocab: manifest.vocab,
            manifest: Some(manifest),
            opened: Some(Opened {
                stamp: verify::file_stamp(&meta),
                file,
                path,
            }),
        })
    }

    /// Checks that the token file is still the one that was opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`] where another process wrote to it.
    pub fn check_unchanged(&self) -> Result<()> {
        if let Data::Joined(shards) = &self.data {
            return shards.stores().iter().try_for_each(Self::check_unchanged);
        }
        let Some(opened) = &self.opened else {
            return Ok(());
        };
        let path = &opened.path;
        let meta = opened.file.metadata().map_err(|e| Error::io(path, e))?;
        // Links to the file, or its removal, change its status and not its content.
        let (now, then) = (verify::file_stamp(&meta), opened.stamp);
        if (now.0, now.1) == (then.0, then.1) {
            return Ok(());
        }
        Err(Error::Corrupt {
            path: path.clone(),
            reason: "it was written to while it was in use".into(),
        })
    }

    /// A data set from ids in memory: `lengths` cut `ids` into documents.
    ///
    /// # Errors
    /// Lengths that do not add up to the ids, or an id outside the vocabulary.
    pub fn from_arrays(ids: Vec<i32>, lengths: &[u64], vocab: Vocab) -> Result<Self> {
        if vocab.vocab_size > MAX_VOCAB {
            let allowed = format!("at most {MAX_VOCAB}");
            return Err(Error::config("vocab_size", vocab.vocab_size, allowed));
        }
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
            prompts: Vec::new(),
            vocab,
            manifest: None,
            opened: None,
        };
        if let Data::Wide(ids) = &store.data {
            let size = i64::from(vocab.vocab_size);
            let outside = ids.iter().find(|id| !(0..size).contains(&i64::from(**id)));
            if let Some(id) = outside {
                return Err(store.out_of_range(i64::from(*id)));
            }
            if vocab.vocab_size <= 1 << 16 {
                store.data = Data::Narrow(ids.iter().map(|id| *id as u16).collect());
            }
        }
        Ok(store)
    }

    /// Number of ids.
    pub fn num_tokens(&self) -> usize {
        match &self.data {
            Data::Absent(count) => *count,
            Data::Joined(shards) => shards.len(),
            _ => self.tokens().len(),
        }
    }

    /// All ids, document after document.
    ///
    /// # Panics
    /// In a data set whose tokens are elsewhere ([`Self::open_absent`]).
    pub fn tokens(&self) -> Tokens<'_> {
        match &self.data {
            Data::Narrow(ids) => Tokens::U16(ids),
            Data::Wide(ids) => Tokens::I32(ids),
            Data::Joined(shards) => Tokens::Joined(shards),
            Data::Absent(_) => panic!("the tokens of this data set are elsewhere"),
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
        if let Data::Joined(shards) = &self.data {
            shards.parts(tokens.start, tokens.len(), |store, at, _, count| {
                store.will_need(at..at + count);
            });
            return;
        }
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

    /// Begin of each document in [`Self::tokens`], and the end of the last.
    pub fn doc_offsets(&self) -> &[u64] {
        &self.offsets
    }

    /// Number of leading tokens of each document that are its prompt: clean, and never scored.
    /// Empty where no document has one.
    pub fn prompts(&self) -> &[u32] {
        &self.prompts
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Special ids.
    pub fn vocab(&self) -> Vocab {
        self.vocab
    }

    /// The manifest; `None` for arrays.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// Number of occurrences of each id; as long as the vocabulary.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] in a data set that was opened without verification, and one that
    /// nobody sees soon after `stop` was set.
    pub fn token_counts(&self, stop: &AtomicBool) -> Result<Vec<u64>> {
        if let Data::Joined(shards) = &self.data {
            let mut sums = vec![0; self.vocab.vocab_size as usize];
            for store in shards.stores() {
                for (sum, count) in sums.iter_mut().zip(store.token_counts(stop)?) {
                    *sum += count;
                }
            }
            return Ok(sums);
        }
        let mut counts = vec![0u64; self.vocab.vocab_size as usize];
        let mut outside = None;
        let mut count = |id: i64| match usize::try_from(id).ok().and_then(|id| counts.get_mut(id)) {
            Some(count) => *count += 1,
            None => outside = Some(id),
        };
        let tokens = self.tokens();
        for start in (0..tokens.len()).step_by(COUNTED_TOGETHER) {
            if stop.load(Ordering::Relaxed) {
                return Err(stopped());
            }
            let part = start..tokens.len().min(start + COUNTED_TOGETHER);
            match tokens {
                Tokens::U16(x) => x[part].iter().for_each(|t| count(i64::from(*t))),
                Tokens::I32(x) => x[part].iter().for_each(|t| count(i64::from(*t))),
                Tokens::Joined(_) | Tokens::Staged(_) => unreachable!("counted above"),
            }
        }
        match outside {
            None => Ok(counts),
            Some(id) => Err(self.out_of_range(id)),
        }
    }

    /// The error of an id that the vocabulary does not hold.
    fn out_of_range(&self, id: i64) -> Error {
        let place = self.opened.as_ref().map(|o| o.path.display().to_string());
        Error::TokenOutOfRange {
            id,
            place: place.unwrap_or_else(|| "ids".into()),
            vocab_size: u64::from(self.vocab.vocab_size),
        }
    }
}
