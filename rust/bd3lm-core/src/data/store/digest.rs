//! SHA-256 of files, in chunks that several threads can check.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::manifest::FileRecord;
use crate::error::{Error, Result};

/// Bytes of a chunk. A file of one chunk has its plain SHA-256; a longer one the SHA-256 of the
/// SHA-256 digests of its chunks.
pub(super) const CHUNK: u64 = 64 << 20;

/// Bytes that are read at a time.
pub(super) const STEP: usize = 1 << 18;

/// SHA-256 of bytes, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The digest of a file from those of its chunks.
pub(super) fn joined(chunks: &[[u8; 32]]) -> String {
    match chunks {
        [one] => hex(one),
        _ => hex(&Sha256::digest(chunks.as_flattened())),
    }
}

/// Hashes bytes as they come.
#[derive(Default)]
struct Chunks {
    done: Vec<[u8; 32]>,
    current: Sha256,
    /// Bytes of the current chunk.
    held: u64,
}

impl Chunks {
    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.held == CHUNK {
                self.close();
            }
            let room = (CHUNK - self.held).min(bytes.len() as u64) as usize;
            self.current.update(&bytes[..room]);
            self.held += room as u64;
            bytes = &bytes[room..];
        }
    }

    fn close(&mut self) {
        self.done
            .push(std::mem::take(&mut self.current).finalize().into());
        self.held = 0;
    }

    fn finish(mut self) -> String {
        if self.held > 0 || self.done.is_empty() {
            self.close();
        }
        joined(&self.done)
    }
}

/// A file that is hashed while it is written.
pub(super) struct HashingFile {
    path: PathBuf,
    file: BufWriter<File>,
    chunks: Chunks,
    bytes: u64,
}

impl HashingFile {
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        Ok(HashingFile {
            path,
            file: BufWriter::with_capacity(1 << 18, file),
            chunks: Chunks::default(),
            bytes: 0,
        })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.chunks.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file
            .write_all(bytes)
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Cuts the file at byte `from`, and gives the rest to `each`, in parts.
    pub(super) fn cut(
        &mut self,
        from: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.file.flush().map_err(|e| Error::io(&self.path, e))?;
        copy(self.file.get_ref(), &self.path, from, self.bytes, each)?;
        // The chunk in which the file now ends is hashed again.
        let whole = from / CHUNK;
        self.chunks.done.truncate(whole as usize);
        (self.chunks.current, self.chunks.held) = (Sha256::new(), 0);
        let chunks = &mut self.chunks;
        copy(
            self.file.get_ref(),
            &self.path,
            whole * CHUNK,
            from,
            &mut |b| {
                chunks.update(b);
                Ok(())
            },
        )?;
        self.bytes = from;
        let file = self.file.get_mut();
        file.set_len(from)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map(drop)
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Waits until the file is on the disk.
    pub(super) fn finish(&mut self) -> Result<FileRecord> {
        self.file.flush().map_err(|e| Error::io(&self.path, e))?;
        self.file
            .get_ref()
            .sync_all()
            .map_err(|e| Error::io(&self.path, e))?;
        Ok(FileRecord {
            bytes: self.bytes,
            sha256: std::mem::take(&mut self.chunks).finish(),
            chunk_bytes: (self.bytes > CHUNK).then_some(CHUNK),
        })
    }
}

/// Gives bytes `from..to` of a file to `each`, in parts.
fn copy(
    mut file: &File,
    path: &Path,
    from: u64,
    to: u64,
    each: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let fail = |e| Error::io(path, e);
    file.seek(SeekFrom::Start(from)).map_err(fail)?;
    let mut left = to - from;
    let mut buffer = vec![0; STEP];
    while left > 0 {
        let part = left.min(STEP as u64) as usize;
        file.read_exact(&mut buffer[..part]).map_err(fail)?;
        each(&buffer[..part])?;
        left -= part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_file_has_the_digest_of_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..CHUNK + 5000).map(|i| (i % 251) as u8).collect();
        let digest = |bytes: &[u8]| {
            let mut file = HashingFile::create(dir.path().join("x")).unwrap();
            file.write(bytes).unwrap();
            file.finish().unwrap()
        };
        for end in [0, 7, CHUNK - 1, CHUNK, CHUNK + 1] {
            let mut file = HashingFile::create(dir.path().join("y")).unwrap();
            file.write(&bytes).unwrap();
            let mut tail = Vec::new();
            let mut keep = |part: &[u8]| {
                tail.extend_from_slice(part);
                Ok(())
            };
            file.cut(end, &mut keep).unwrap();
            assert_eq!(tail, bytes[end as usize..]);
            assert_eq!(file.finish().unwrap(), digest(&bytes[..end as usize]));
            file.write(b"more").unwrap();
        }
        assert_eq!(digest(b"abc").sha256, sha256(b"abc"));
    }
}
