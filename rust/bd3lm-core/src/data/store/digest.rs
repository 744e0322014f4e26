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

/// Bytes of a piece of the token file, each of which has a digest of its own: the least that is read
/// from a data set that is elsewhere. A row is a few kilobytes.
pub(super) const PIECE: u64 = 16 << 10;

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
        [] => sha256(b""),
        [one] => hex(one),
        _ => hex(&Sha256::digest(chunks.as_flattened())),
    }
}

/// Hashes bytes as they come, in chunks of one size.
struct Chunks {
    size: u64,
    done: Vec<[u8; 32]>,
    current: Sha256,
    /// Bytes of the current chunk.
    held: u64,
}

impl Chunks {
    fn new(size: u64) -> Self {
        Chunks {
            size,
            done: Vec::new(),
            current: Sha256::new(),
            held: 0,
        }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.held == self.size {
                self.close();
            }
            let room = (self.size - self.held).min(bytes.len() as u64) as usize;
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

    /// Forgets the bytes from `from` on; returns where the chunk begins that must be hashed again.
    fn cut(&mut self, from: u64) -> u64 {
        let whole = from / self.size;
        self.done.truncate(whole as usize);
        (self.current, self.held) = (Sha256::new(), 0);
        whole * self.size
    }

    /// Digests of all chunks; none where there are no bytes.
    fn finish(mut self) -> Vec<[u8; 32]> {
        if self.held > 0 {
            self.close();
        }
        self.done
    }
}

/// A file that is hashed while it is written.
pub(super) struct HashingFile {
    path: PathBuf,
    file: BufWriter<File>,
    chunks: Chunks,
    pieces: Option<Chunks>,
    bytes: u64,
}

impl HashingFile {
    /// A file whose pieces have digests of their own as well: 32 bytes of memory each.
    pub(super) fn create_in_pieces(path: PathBuf) -> Result<Self> {
        let pieces = Some(Chunks::new(PIECE));
        Ok(HashingFile {
            pieces,
            ..Self::create(path)?
        })
    }

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
            chunks: Chunks::new(CHUNK),
            pieces: None,
            bytes: 0,
        })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.chunks.update(bytes);
        if let Some(pieces) = &mut self.pieces {
            pieces.update(bytes);
        }
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
        for chunks in [Some(&mut self.chunks), self.pieces.as_mut()]
            .into_iter()
            .flatten()
        {
            let start = chunks.cut(from);
            let mut hash = |bytes: &[u8]| {
                chunks.update(bytes);
                Ok(())
            };
            copy(self.file.get_ref(), &self.path, start, from, &mut hash)?;
        }
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
        let chunks = std::mem::replace(&mut self.chunks, Chunks::new(CHUNK)).finish();
        Ok(FileRecord {
            bytes: self.bytes,
            sha256: joined(&chunks),
            chunk_bytes: (self.bytes > CHUNK).then_some(CHUNK),
        })
    }

    /// Digests of the pieces, one after the other.
    pub(super) fn take_pieces(&mut self) -> Vec<[u8; 32]> {
        self.pieces.take().map_or_else(Vec::new, Chunks::finish)
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
            let mut file = HashingFile::create_in_pieces(dir.path().join("x")).unwrap();
            file.write(bytes).unwrap();
            (file.finish().unwrap(), file.take_pieces())
        };
        for end in [0, 7, PIECE, CHUNK - 1, CHUNK, CHUNK + 1] {
            let mut file = HashingFile::create_in_pieces(dir.path().join("y")).unwrap();
            file.write(&bytes).unwrap();
            let mut tail = Vec::new();
            let mut keep = |part: &[u8]| {
                tail.extend_from_slice(part);
                Ok(())
            };
            file.cut(end, &mut keep).unwrap();
            assert_eq!(tail, bytes[end as usize..]);
            let found = (file.finish().unwrap(), file.take_pieces());
            assert_eq!(found, digest(&bytes[..end as usize]));
            assert_eq!(found.1.len() as u64, end.div_ceil(PIECE));
            file.write(b"more").unwrap();
        }
        assert_eq!(digest(b"abc").0.sha256, sha256(b"abc"));
    }
}
