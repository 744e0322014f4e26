//! Opening inputs: folders, standard input, pipes, compressed files, byte order marks.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::options::{Format, ReadOptions};
use crate::error::{Error, Result};

/// The name of standard input.
pub const STDIN: &str = "-";

const KINDS: &str = "must be .txt, .jsonl, .ndjson, .json or .parquet, all but the last also as \
                     .gz, .xz or .zst; name another one's format with --format";

/// Bytes from which the format of a file is guessed.
const HEAD: usize = 4096;

/// One file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    /// Path of the file; `-` is standard input.
    pub path: PathBuf,
    /// Named by the user, and not found in a folder.
    pub named: bool,
}

/// Replaces folders by the text files below them, in the order of their names.
///
/// Hidden files and files of other kinds are passed over; where a format is given, every file
/// counts.
///
/// # Errors
/// [`Error::Missing`] for a path that does not exist, [`Error::Format`] for a folder without text.
pub fn expand(paths: &[PathBuf], options: &ReadOptions) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for path in paths {
        if path.as_os_str() == STDIN || !path.is_dir() {
            if path.as_os_str() != STDIN {
                fs::metadata(path).map_err(|e| Error::io(path, e))?;
            }
            inputs.push(Input {
                path: path.clone(),
                named: true,
            });
            continue;
        }
        let before = inputs.len();
        walk(
            path,
            options.format.is_some(),
            &mut BTreeSet::new(),
            &mut inputs,
        )?;
        if inputs.len() == before {
            return Err(Error::Format {
                path: path.clone(),
                reason: format!("the folder holds no text file; a text file {KINDS}"),
            });
        }
    }
    Ok(inputs)
}

fn walk(
    folder: &Path,
    any_kind: bool,
    seen: &mut BTreeSet<PathBuf>,
    inputs: &mut Vec<Input>,
) -> Result<()> {
    let real = folder.canonicalize().map_err(|e| Error::io(folder, e))?;
    if !seen.insert(real) {
        return Ok(()); // a link back to a folder above
    }
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            entries.push(entry.path());
        }
    }
    entries.sort();
    for path in entries {
        if path.is_dir() {
            walk(&path, any_kind, seen, inputs)?;
        } else if path.is_file() && (any_kind || matches!(by_name(&path).0, ByName::Known(_))) {
            inputs.push(Input { path, named: false });
        }
    }
    Ok(())
}

/// The format of a file by its name.
enum ByName {
    Known(Format),
    /// No extension: its first bytes tell.
    Nothing,
    Unknown,
}

/// Compression by the name of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packed {
    No,
    Gzip,
    Xz,
    Zstd,
}

fn by_name(path: &Path) -> (ByName, Packed) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_lowercase();
    let (stem, packed) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Packed::Gzip),
        Some((stem, "xz")) => (stem, Packed::Xz),
        Some((stem, "zst")) => (stem, Packed::Zstd),
        _ => (name.as_str(), Packed::No),
    };
    let format = match stem.rsplit_once('.').map(|(_, kind)| kind) {
        Some("txt" | "text") => ByName::Known(Format::Text),
        Some("jsonl" | "ndjson") => ByName::Known(Format::JsonLines),
        Some("json") => ByName::Known(Format::Json),
        Some("parquet") if packed == Packed::No => ByName::Known(Format::Parquet),
        Some(_) => ByName::Unknown,
        None => ByName::Nothing,
    };
    (format, packed)
}

/// Returns whether a file has to be read by its path, as parquet is.
pub(super) fn is_parquet(path: &Path, options: &ReadOptions) -> Result<bool> {
    if let Some(format) = options.format {
        return Ok(format == Format::Parquet);
    }
    match by_name(path).0 {
        ByName::Known(format) => Ok(format == Format::Parquet),
        ByName::Nothing if path.is_file() => {
            let mut magic = [0; 4];
            let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
            Ok(file.read_exact(&mut magic).is_ok() && &magic == b"PAR1")
        }
        _ => Ok(false),
    }
}

/// An opened file that is not parquet: its format, and its text in UTF-8 without a byte order mark.
pub(super) struct Opened {
    pub(super) format: Format,
    pub(super) reader: BufReader<Box<dyn Read + Send>>,
}

/// Opens a file; `read` counts the bytes taken from it, compressed as they are, and `stop` ends a
/// read that waits for a pipe.
pub(super) fn open(
    path: &Path,
    options: &ReadOptions,
    read: &Arc<AtomicU64>,
    stop: &Arc<AtomicBool>,
) -> Result<Opened> {
    let (named, packed) = by_name(path);
    // The name of a pipe or device, such as /dev/stdin, says nothing.
    let pipe = path.as_os_str() == STDIN || !path.is_file();
    if options.format.is_none() && matches!(named, ByName::Unknown) && !pipe {
        return Err(Error::Format {
            path: path.into(),
            reason: format!("this kind of file is not read; it {KINDS}"),
        });
    }
    let fail = |e| Error::io(path, e);
    let mut source = Counting {
        inner: Interruptible::open(path, stop).map_err(fail)?,
        count: read.clone(),
    };
    let head = peek(&mut source, 6).map_err(fail)?;
    let packed = match packed {
        Packed::No if !matches!(named, ByName::Known(_)) || pipe => packed_by_content(&head),
        packed => packed,
    };
    let bytes = Cursor::new(head).chain(source);
    let mut plain: Box<dyn Read + Send> = match packed {
        Packed::No => Box::new(bytes),
        Packed::Gzip => Box::new(Gzip::new(bytes)),
        Packed::Xz => Box::new(liblzma::read::XzDecoder::new_multi_decoder(bytes)),
        Packed::Zstd => Box::new(zstd::Decoder::new(bytes).map_err(fail)?),
    };
    let head = peek(&mut plain, HEAD).map_err(|e| damaged(path, e))?;
    let (head, plain): (Vec<u8>, Box<dyn Read + Send>) = match head.as_slice() {
        [0xEF, 0xBB, 0xBF, rest @ ..] => (rest.to_vec(), plain),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => {
            let little = head[0] == 0xFF;
            let mut decoded = Utf16::new(Cursor::new(head[2..].to_vec()).chain(plain), little);
            (
                peek(&mut decoded, HEAD).map_err(|e| damaged(path, e))?,
                Box::new(decoded),
            )
        }
        _ => (head, plain),
    };
    let format = match (options.format, named) {
        (Some(format), _) | (None, ByName::Known(format)) => by_content(format, &head),
        _ if head.starts_with(b"PAR1") => Format::Parquet,
        _ => by_content(guess(&head), &head),
    };
    if format == Format::Parquet {
        return Err(Error::Format {
            path: path.into(),
            reason: "parquet is read from a file: it cannot come through a pipe".into(),
        });
    }
    Ok(Opened {
        format,
        reader: BufReader::with_capacity(1 << 18, Box::new(Cursor::new(head).chain(plain))),
    })
}

fn packed_by_content(head: &[u8]) -> Packed {
    match head {
        [0x1F, 0x8B, ..] => Packed::Gzip,
        [0xFD, b'7', b'z', b'X', b'Z', 0] => Packed::Xz,
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Packed::Zstd,
        _ => Packed::No,
    }
}

/// The format of bytes without a name.
fn guess(head: &[u8]) -> Format {
    let text = head.trim_ascii_start();
    let begins = |open: u8, next: &[u8]| {
        text.first() == Some(&open)
            && next.contains(text[1..].trim_ascii_start().first().unwrap_or(&b' '))
    };
    if begins(b'{', b"\"}") || begins(b'[', b"{") {
        Format::Json
    } else {
        Format::Text
    }
}

/// Distinguishes the two JSON formats, whose names are used for each other.
fn by_content(format: Format, head: &[u8]) -> Format {
    if !matches!(format, Format::Json | Format::JsonLines) {
        return format;
    }
    let text = head.trim_ascii_start();
    if text.first() == Some(&b'[') {
        return Format::Json;
    }
    if format == Format::JsonLines {
        return format;
    }
    // An object that ends with its line: a bad one then costs no other.
    let end = memchr::memchr(b'\n', text).unwrap_or(0);
    match serde_json::from_slice::<serde::de::IgnoredAny>(&text[..end]) {
        Ok(_) => Format::JsonLines,
        Err(_) => Format::Json,
    }
}

/// Up to `wanted` bytes, fewer only at the end.
fn peek(source: &mut impl Read, wanted: usize) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(wanted);
    source.take(wanted as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// The error of a file that cannot be decompressed, or that the system does not give.
pub(super) fn damaged(path: &Path, e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::Other => Error::Format {
            path: path.into(),
            reason: format!("cannot be decompressed: it is truncated or damaged ({e})"),
        },
        _ => Error::io(path, e),
    }
}

/// A file, pipe or device whose reads end when `stop` is set.
struct Interruptible {
    file: File,
    /// Reads of regular files do not wait for another process.
    waits: bool,
    stop: Arc<AtomicBool>,
}

impl Interruptible {
    #[cfg(unix)]
    fn open(path: &Path, stop: &Arc<AtomicBool>) -> io::Result<Self> {
        use std::os::fd::AsFd;
        use std::os::unix::fs::OpenOptionsExt;

        let file = if path.as_os_str() == STDIN {
            File::from(io::stdin().as_fd().try_clone_to_owned()?)
        } else {
            // Opening a pipe would otherwise wait for its writer.
            fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)?
        };
        let waits = !file.metadata()?.is_file();
        Ok(Interruptible {
            file,
            waits,
            stop: stop.clone(),
        })
    }

    #[cfg(not(unix))]
    fn open(path: &Path, stop: &Arc<AtomicBool>) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Interruptible {
            file,
            waits: false,
            stop: stop.clone(),
        })
    }

    /// Waits until there is something to read, or the end.
    #[cfg(unix)]
    fn wait(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;

        let mut poll = libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "stopped"));
            }
            // SAFETY: one valid pollfd, alive for the call.
            let ready = unsafe { libc::poll(&raw mut poll, 1, 100) };
            match ready {
                0 => {}
                n if n > 0 => return Ok(()),
                _ => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
            }
        }
    }

    #[cfg(not(unix))]
    fn wait(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Interruptible {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.waits {
                self.wait()?;
            }
            match self.file.read(buffer) {
                // Another reader of the same pipe was faster.
                Err(e) if self.waits && e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }
}

/// Counts the bytes that are read.
struct Counting<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Members of a gzip file one after the other; bytes after the last are ignored, as by gzip(1).
struct Gzip<R: Read> {
    /// Reads the next member; `None` after the last.
    member: Option<flate2::bufread::GzDecoder<PushBack<R>>>,
}

impl<R: Read> Gzip<R> {
    fn new(source: R) -> Self {
        let source = PushBack {
            back: Cursor::default(),
            inner: BufReader::with_capacity(1 << 16, source),
        };
        Gzip {
            member: Some(flate2::bufread::GzDecoder::new(source)),
        }
    }
}

impl<R: Read> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let n = member.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let mut rest = self.member.take().expect("it was there").into_inner();
            let begin = peek(&mut rest, 2)?;
            if begin == [0x1F, 0x8B] {
                rest.back = Cursor::new(begin);
                self.member = Some(flate2::bufread::GzDecoder::new(rest));
            }
        }
        Ok(0)
    }
}

/// A reader that can take back the bytes that were read last.
struct PushBack<R> {
    back: Cursor<Vec<u8>>,
    inner: BufReader<R>,
}

impl<R: Read> Read for PushBack<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.back.read(buffer)? {
            0 => self.inner.read(buffer),
            n => Ok(n),
        }
    }
}

impl<R: Read> BufRead for PushBack<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.back.position() < self.back.get_ref().len() as u64 {
            return self.back.fill_buf();
        }
        self.inner.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        if self.back.position() < self.back.get_ref().len() as u64 {
            self.back.consume(n);
        } else {
            self.inner.consume(n);
        }
    }
}

/// UTF-16 text as UTF-8; half a surrogate pair becomes U+FFFD.
struct Utf16<R> {
    source: BufReader<R>,
    little: bool,
    ready: Vec<u8>,
    at: usize,
    /// The first half of a pair.
    high: Option<u16>,
}

impl<R: Read> Utf16<R> {
    fn new(source: R, little: bool) -> Self {
        Utf16 {
            source: BufReader::with_capacity(1 << 16, source),
            little,
            ready: Vec::new(),
            at: 0,
            high: None,
        }
    }

    /// Decodes the buffered bytes of the source.
    fn refill(&mut self) -> io::Result<()> {
        self.ready.clear();
        self.at = 0;
        let mut units: Vec<u16> = self.high.take().into_iter().collect();
        let mut odd = None;
        let bytes = self.source.fill_buf()?;
        let unit = |two: [u8; 2]| {
            if self.little {
                u16::from_le_bytes(two)
            } else {
                u16::from_be_bytes(two)
            }
        };
        let (pairs, rest) = bytes.as_chunks::<2>();
        units.extend(pairs.iter().map(|two| unit(*two)));
        let at_end = bytes.is_empty();
        if let [first] = rest {
            odd = Some(*first);
        }
        let taken = bytes.len();
        self.source.consume(taken);
        if let Some(first) = odd {
            let mut second = [0];
            if self.source.read(&mut second)? == 1 {
                let two = [first, second[0]];
                units.push(if self.little {
                    u16::from_le_bytes(two)
                } else {
                    u16::from_be_bytes(two)
                });
            } else {
                units.push(0xFFFD); // half a unit
            }
        }
        if !at_end && units.last().is_some_and(|u| (0xD800..0xDC00).contains(u)) {
            self.high = units.pop();
        }
        for c in char::decode_utf16(units) {
            let c = c.unwrap_or(char::REPLACEMENT_CHARACTER);
            self.ready
                .extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        }
        Ok(())
    }
}

impl<R: Read> Read for Utf16<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.ready.len() {
            let pending = self.high.is_some();
            self.refill()?;
            if self.ready.is_empty() && !pending && self.high.is_none() {
                return Ok(0);
            }
        }
        let n = buffer.len().min(self.ready.len() - self.at);
        buffer[..n].copy_from_slice(&self.ready[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
