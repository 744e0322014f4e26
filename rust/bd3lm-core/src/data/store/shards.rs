//! Data sets that were made apart, read as one without a rewrite.

use std::fs;
use std::path::Path;

use super::digest::HashingFile;
use super::manifest::{FORMAT, Shard, VERSION_OF_SHARDS, is_name, read_manifest};
use super::partial::sync;
use super::writer::write_manifest;
use super::{MANIFEST, Manifest, TOKENIZER, TokenStore, Tokens};
use crate::error::{Error, Result};

/// The parts of a data set.
#[derive(Debug)]
pub(super) struct Shards {
    stores: Vec<TokenStore>,
    /// Where the tokens of each begin, and the end of the last.
    starts: Vec<usize>,
}

impl Shards {
    /// Opens the shards of a manifest; returns the offsets and prompts of their documents as well.
    pub(super) fn open(
        dir: &Path,
        manifest: &Manifest,
        open: impl Fn(&Path) -> Result<TokenStore>,
    ) -> Result<(Self, Vec<u64>, Vec<u32>)> {
        let corrupt = |reason: String| Error::Corrupt {
            path: dir.join(MANIFEST),
            reason,
        };
        let (mut stores, mut starts, mut offsets) = (Vec::new(), vec![0], vec![0]);
        let mut prompts = Vec::new();
        for shard in &manifest.shards {
            let path = dir.join(&shard.name);
            let its = read_manifest(&path)?;
            if its.sha256 != shard.sha256 || !its.shards.is_empty() || !agree(manifest, &its) {
                return Err(corrupt(format!(
                    "its shard {} is not the one that was joined",
                    shard.name
                )));
            }
            let store = open(&path)?;
            let start = starts[starts.len() - 1];
            offsets.extend(store.offsets[1..].iter().map(|end| start as u64 + end));
            starts.push(start + store.num_tokens());
            if manifest.num_prompt_tokens > 0 {
                prompts.extend_from_slice(store.prompts());
                prompts.resize(offsets.len() - 1, 0);
            }
            stores.push(store);
        }
        let tokens = starts[starts.len() - 1] as u64;
        let in_prompts: u64 = prompts.iter().map(|n| u64::from(*n)).sum();
        let found = (offsets.len() as u64 - 1, tokens, in_prompts);
        let m = manifest;
        if found != (m.num_documents, m.num_tokens, m.num_prompt_tokens) {
            return Err(corrupt("its counts are not those of its shards".into()));
        }
        Ok((Shards { stores, starts }, offsets, prompts))
    }

    pub(super) fn len(&self) -> usize {
        self.starts[self.stores.len()]
    }

    pub(super) fn stores(&self) -> &[TokenStore] {
        &self.stores
    }

    /// Calls `each` with the parts of `start..start + len`: tokens of a shard, where the part begins
    /// in these, where in the range, and its length.
    #[inline]
    pub(super) fn parts(
        &self,
        start: usize,
        len: usize,
        mut each: impl FnMut(&TokenStore, usize, usize, usize),
    ) {
        assert!(start + len <= self.len(), "beyond the tokens");
        let mut shard = self.starts.partition_point(|first| *first <= start) - 1;
        let mut done = 0;
        while done < len {
            let at = start + done - self.starts[shard];
            let room = self.starts[shard + 1] - self.starts[shard] - at;
            let count = room.min(len - done);
            each(&self.stores[shard], at, done, count);
            done += count;
            shard += 1;
        }
    }

    pub(super) fn copy_to(&self, start: usize, out: &mut [i64]) {
        let len = out.len();
        self.parts(start, len, |store, at, done, count| {
            store.tokens().copy_to(at, &mut out[done..done + count]);
        });
    }

    pub(super) fn prefetch(&self, start: usize, len: usize) {
        self.parts(start, len, |store, at, _, count| {
            if let Tokens::U16(_) | Tokens::I32(_) = store.tokens() {
                store.tokens().prefetch(at, count);
            }
        });
    }
}

/// Whether a shard was made in the way of the others.
fn agree(a: &Manifest, b: &Manifest) -> bool {
    (
        &a.tokenizer_sha256,
        a.vocab,
        &a.dtype,
        &a.detokenizer,
        a.no_eos,
    ) == (
        &b.tokenizer_sha256,
        b.vocab,
        &b.dtype,
        &b.detokenizer,
        b.no_eos,
    )
}

/// Joins data sets, which are directories inside `dir`, by a manifest in `dir`; no token is copied.
///
/// # Errors
/// [`Error::Exists`] where `dir` has a manifest already; data sets that were made with different
/// tokenizers or in different ways; those of reading and writing.
pub fn join(dir: &Path, names: &[String]) -> Result<Manifest> {
    if dir.join(MANIFEST).exists() {
        return Err(Error::Exists { path: dir.into() });
    }
    let mut joined: Option<Manifest> = None;
    let mut shards = Vec::new();
    for name in names {
        if !is_name(name) {
            return Err(Error::config(
                "shard",
                name,
                "a directory inside the data set",
            ));
        }
        let manifest = read_manifest(&dir.join(name))?;
        shards.push(Shard {
            name: name.clone(),
            sha256: manifest.sha256.clone(),
        });
        if !manifest.shards.is_empty() {
            return Err(Error::config("shard", name, "a data set without shards"));
        }
        match &mut joined {
            None => joined = Some(manifest),
            Some(all) if agree(all, &manifest) => {
                all.num_documents += manifest.num_documents;
                all.num_tokens += manifest.num_tokens;
                all.num_prompt_tokens += manifest.num_prompt_tokens;
                all.num_bytes += manifest.num_bytes;
                for source in manifest.source {
                    if !all.source.contains(&source) {
                        all.source.push(source);
                    }
                }
                all.records = match (all.records.take(), manifest.records) {
                    (Some(a), Some(b)) => Some(a.joined(&b)),
                    _ => None,
                };
            }
            Some(_) => {
                let allowed = format!("made with the tokenizer and settings of {}", names[0]);
                return Err(Error::config("shard", name, allowed));
            }
        }
    }
    let mut joined = joined.ok_or_else(|| Error::config("shards", 0, "at least one"))?;
    let tokenizer = dir.join(&names[0]).join(TOKENIZER);
    let text = fs::read(&tokenizer).map_err(|e| Error::io(&tokenizer, e))?;
    let mut file = HashingFile::create(dir.join(TOKENIZER))?;
    file.write(&text)?;
    joined.files.clear();
    joined.pieces = None; // each shard has its own
    joined.files.insert(TOKENIZER.into(), file.finish()?);
    (joined.format, joined.version, joined.shards) = (FORMAT.into(), VERSION_OF_SHARDS, shards);
    joined.sha256.clear();
    let aside = format!(".{MANIFEST}.partial");
    write_manifest(dir, &aside, &mut joined)?;
    let target = dir.join(MANIFEST);
    fs::rename(dir.join(aside), &target).map_err(|e| Error::io(&target, e))?;
    sync(dir)?;
    Ok(joined)
}
