//! Verification of a data set's files: once, and remembered until a file changes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::digest::{STEP, joined, sha256};
use super::manifest::{FileRecord, Manifest};
use super::{BIN, MANIFEST};
use crate::cpu::threads::available_threads;
use crate::data::text::stopped;
use crate::error::{Error, Result};

/// Time at which the files are compared with their digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Unless they were, and have not changed since by size, times and inode.
    Once,
    /// Also where nothing changed.
    Always,
    /// Sizes and structure alone are checked.
    Never,
}

/// Data sets of fewer bytes are verified each time: it takes no longer than to remember it.
const SMALL: u64 = 64 << 20;
/// A file that changed so shortly before it was verified might change again unnoticed, within the
/// resolution of its times.
const SETTLED: Duration = Duration::from_secs(2);
/// Name of the record in the directory of the data set.
const REMEMBERED: &str = ".verified.json";
/// More threads wait for the disk.
const MAX_THREADS: usize = 8;

/// Verifies the files of a data set, or finds that they were verified before.
///
/// # Errors
/// [`Error::Corrupt`] for a file whose digest is not the manifest's, [`Error::TokenOutOfRange`]
/// for an id outside the vocabulary, and [`stopped`] soon after `stop` was set.
pub(super) fn verify(
    dir: &Path,
    manifest: &Manifest,
    verify: Verify,
    stop: &AtomicBool,
) -> Result<()> {
    if verify == Verify::Never {
        return Ok(());
    }
    let bytes: u64 = manifest.files.values().map(|f| f.bytes).sum();
    let stamp = Stamp::of(dir, manifest)?;
    if verify == Verify::Once && bytes >= SMALL && stamp.is_remembered(dir) {
        return Ok(());
    }
    let started = SystemTime::now();
    for (name, record) in &manifest.files {
        let ids = (name == BIN).then_some(manifest);
        check_file(&dir.join(name), record, ids, stop)?;
    }
    if bytes >= SMALL && stamp.is_settled(started) && Stamp::of(dir, manifest)? == stamp {
        stamp.remember(dir);
    }
    Ok(())
}

/// Size, modification time, status change time (nanoseconds) and inode of a file.
type FileStamp = (u64, i128, i128, u64);

/// State of the files of a verified data set.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    manifest: String,
    files: BTreeMap<String, FileStamp>,
}

impl Stamp {
    fn of(dir: &Path, manifest: &Manifest) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in manifest.files.keys().map(String::as_str).chain([MANIFEST]) {
            let path = dir.join(name);
            let meta = fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            files.insert(name.to_owned(), file_stamp(&meta));
        }
        Ok(Stamp {
            manifest: manifest.sha256.clone(),
            files,
        })
    }

    /// Returns whether all files are older than the resolution of their times.
    fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(now) = now.duration_since(SystemTime::UNIX_EPOCH) else {
            return false;
        };
        let newest = (now.saturating_sub(SETTLED)).as_nanos() as i128;
        let old = |(_, modified, changed, _): &FileStamp| *modified < newest && *changed < newest;
        self.files.values().all(old)
    }

    fn is_remembered(&self, dir: &Path) -> bool {
        places(dir).iter().any(|place| {
            let known =
                fs::metadata(place).is_ok_and(|meta| meta.is_file() && meta.len() < 1 << 16);
            let text = known.then(|| fs::read(place).ok()).flatten();
            text.and_then(|text| serde_json::from_slice::<Stamp>(&text).ok())
                .is_some_and(|stamp| stamp == *self)
        })
    }

    /// Writes it down where that is possible. Where it is not, the next open verifies again.
    fn remember(&self, dir: &Path) {
        let text = serde_json::to_vec(self).expect("a stamp is plain JSON");
        for place in places(dir) {
            let aside = place.with_extension(format!("{}.partial", std::process::id()));
            let written = fs::write(&aside, &text).and_then(|()| fs::rename(&aside, &place));
            if written.is_ok() {
                return;
            }
            let _ = fs::remove_file(&aside);
            if let Some(above) = place.parent().filter(|above| *above != dir) {
                // The cache may not exist yet.
                let made = fs::create_dir_all(above).and_then(|()| fs::write(&place, &text));
                if made.is_ok() {
                    return;
                }
            }
        }
    }
}

/// Files that remember a verification: with the files, or in the user's cache.
fn places(dir: &Path) -> Vec<PathBuf> {
    let mut places = vec![dir.join(REMEMBERED)];
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    if let (Some(cache), Ok(real)) = (cache, dir.canonicalize()) {
        let name = sha256(real.as_os_str().as_encoded_bytes());
        places.push(cache.join("bd3lm").join("verified").join(name + ".json"));
    }
    places
}

#[cfg(unix)]
pub(super) fn file_stamp(meta: &fs::Metadata) -> FileStamp {
    use std::os::unix::fs::MetadataExt;

    let nanos = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
    (
        meta.len(),
        nanos(meta.mtime(), meta.mtime_nsec()),
        nanos(meta.ctime(), meta.ctime_nsec()),
        meta.ino(),
    )
}

#[cfg(not(unix))]
pub(super) fn file_stamp(meta: &fs::Metadata) -> FileStamp {
    let modified = meta.modified().ok();
    let since = modified.and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    (meta.len(), since.map_or(0, |t| t.as_nanos() as i128), 0, 0)
}

/// Compares a file with its digest and, where it holds ids, these with the vocabulary: in one pass
/// over the file, by several threads where its digest allows it.
fn check_file(
    path: &Path,
    record: &FileRecord,
    ids: Option<&Manifest>,
    stop: &AtomicBool,
) -> Result<()> {
    let size = record.chunk_bytes.unwrap_or(record.bytes).max(1);
    let count = record.bytes.div_ceil(size).max(1) as usize;
    let digests = Mutex::new(vec![[0; 32]; count]);
    let bad_id = Mutex::new(None);
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        let mut buffer = vec![0; STEP];
        loop {
            let chunk = next.fetch_add(1, Ordering::Relaxed);
            if chunk >= count {
                return Ok(());
            }
            let from = chunk as u64 * size;
            let mut digest = Sha256::new();
            read(
                path,
                from,
                size.min(record.bytes - from),
                &mut buffer,
                |bytes| {
                    digest.update(bytes);
                    let found = ids.and_then(|manifest| find_bad_id(bytes, manifest));
                    if found.is_some() {
                        *bad_id.lock().expect("no holder panics") = found;
                    }
                    if stop.load(Ordering::Relaxed) {
                        return Err(stopped());
                    }
                    Ok(())
                },
            )?;
            digests.lock().expect("no holder panics")[chunk] = digest.finalize().into();
        }
    };
    // Threads of its own: those of a pool do not survive a fork.
    let threads = available_threads().min(MAX_THREADS).min(count);
    std::thread::scope(|scope| {
        let spawn = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).map_while(spawn).collect();
        let mine = work();
        others.into_iter().fold(mine, |outcome, other| {
            outcome.and(other.join().expect("a verifying thread does not panic"))
        })
    })?;
    if joined(&digests.into_inner().expect("no holder panics")) != record.sha256 {
        return Err(Error::Corrupt {
            path: path.into(),
            reason: "its SHA-256 is not the one in manifest.json".into(),
        });
    }
    let Some((id, manifest)) = bad_id.into_inner().expect("no holder panics").zip(ids) else {
        return Ok(());
    };
    if id == i64::from(manifest.vocab.mask_id) {
        return Err(Error::Corrupt {
            path: path.into(),
            reason: format!("it holds the mask id {id}, which no text may hold"),
        });
    }
    Err(Error::TokenOutOfRange {
        id,
        place: path.display().to_string(),
        vocab_size: u64::from(manifest.vocab.vocab_size),
    })
}

/// Gives `bytes` bytes of a file to `each`, in parts of whole tokens.
fn read(
    path: &Path,
    from: u64,
    bytes: u64,
    buffer: &mut [u8],
    mut each: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let fail = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(fail)?;
    file.seek(SeekFrom::Start(from)).map_err(fail)?;
    let mut left = bytes;
    while left > 0 {
        let part = &mut buffer[..left.min(STEP as u64) as usize];
        file.read_exact(part).map_err(fail)?;
        each(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

/// An id that is none of the vocabulary's, or the mask id.
fn find_bad_id(bytes: &[u8], manifest: &Manifest) -> Option<i64> {
    let (size, mask) = (manifest.vocab.vocab_size, manifest.vocab.mask_id);
    let is_bad = |id: u32| id >= size || id == mask;
    if manifest.is_wide() {
        let ids = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b));
        // One pass that the compiler can vectorize; the id is looked for where there is one.
        let any = ids.clone().fold(false, |any, id| any | is_bad(id));
        return any.then(|| {
            ids.clone()
                .find(|id| is_bad(*id))
                .map(|id| i64::from(id as i32))
        })?;
    }
    let ids = bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|b| u32::from(u16::from_le_bytes(*b)));
    let any = ids.clone().fold(false, |any, id| any | is_bad(id));
    any.then(|| ids.clone().find(|id| is_bad(*id)).map(i64::from))?
}
