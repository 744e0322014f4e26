//! Documents out of txt, jsonl and parquet files, plain or compressed, one at a time.

pub mod detokenize;
mod options;
mod record;

pub use detokenize::Detokenizer;
pub use options::ReadOptions;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use crate::error::{Error, Result};
use record::{RecordError, read_record};

/// Largest document that is read, in bytes of UTF-8: memory is bounded by a few of these.
pub const MAX_DOCUMENT: usize = 64 << 20;

/// Memory of a line that is kept for the next, whatever its length.
const KEPT: usize = 1 << 20;

const KINDS: &str = "allowed are .txt, .jsonl and .parquet, the first two also as .gz, .xz or .zst";

/// Calls `each` with every non-empty document of a file, in order; `read` counts the bytes taken
/// from the file, compressed as they are.
///
/// # Errors
/// [`Error::Missing`], [`Error::Format`] for an unknown kind, [`Error::Record`] for a bad record,
/// and whatever `each` returns.
pub fn read_documents(
    path: &Path,
    options: &ReadOptions,
    read: &Arc<AtomicU64>,
    each: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    if let Some(rules) = options.detokenizer {
        let plain = ReadOptions {
            detokenizer: None,
            ..options.clone()
        };
        return read_documents(path, &plain, read, &mut |text| each(&rules.apply(text)));
    }
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let bytes = Counting {
        inner: file,
        count: read.clone(),
    };
    let (stem, source): (&str, Box<dyn Read + Send>) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Box::new(flate2::read::MultiGzDecoder::new(bytes))),
        Some((stem, "xz")) => (
            stem,
            Box::new(liblzma::read::XzDecoder::new_multi_decoder(bytes)),
        ),
        Some((stem, "zst")) => (
            stem,
            Box::new(zstd::Decoder::new(bytes).map_err(|e| Error::io(path, e))?),
        ),
        _ => (&name, Box::new(bytes)),
    };
    let mut source = Source {
        path,
        reader: BufReader::with_capacity(1 << 18, source),
        record: 0,
    };
    match stem.rsplit_once('.').map(|(_, kind)| kind) {
        Some("txt") if options.lines => source.lines(each),
        Some("txt") => source.whole(each),
        Some("jsonl") => source.jsonl(options, each),
        Some("parquet") if stem.len() == name.len() => read_parquet(path, options, read, each),
        _ => Err(Error::Format {
            path: path.into(),
            reason: format!("this kind of file is not read; {KINDS}"),
        }),
    }
}

struct Source<'a> {
    path: &'a Path,
    reader: BufReader<Box<dyn Read + Send>>,
    record: u64,
}

impl Source<'_> {
    fn whole(&mut self, each: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let mut bytes = Vec::new();
        let limit = MAX_DOCUMENT as u64 + 1;
        let taken = (&mut self.reader).take(limit).read_to_end(&mut bytes);
        self.record = 1;
        taken.map_err(|e| self.damaged(e))?;
        if bytes.len() > MAX_DOCUMENT {
            return Err(self.bad(too_long()));
        }
        let text = self.utf8(&bytes)?;
        if text.is_empty() { Ok(()) } else { each(text) }
    }

    fn lines(&mut self, each: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let mut line = Vec::new();
        while self.line(&mut line)? {
            let text = self.utf8(&line)?;
            if !text.is_empty() {
                each(text)?;
            }
        }
        Ok(())
    }

    fn jsonl(
        &mut self,
        options: &ReadOptions,
        each: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let mut line = Vec::new();
        while self.line(&mut line)? {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            read_record(&line, options, each).map_err(|e| match e {
                RecordError::Bad(reason) => self.bad(reason),
                RecordError::Other(e) => e,
            })?;
        }
        Ok(())
    }

    /// The next line without its end, in place of what `line` held; false at the end of the file.
    fn line(&mut self, line: &mut Vec<u8>) -> Result<bool> {
        if line.capacity() > 16 * line.len() && line.capacity() > KEPT {
            *line = Vec::new(); // the memory of a document that was far longer than usual
        }
        line.clear();
        let limit = MAX_DOCUMENT as u64 + 2;
        let taken = (&mut self.reader).take(limit).read_until(b'\n', line);
        self.record += 1;
        if taken.map_err(|e| self.damaged(e))? == 0 {
            return Ok(false);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        }
        if line.len() > MAX_DOCUMENT {
            return Err(self.bad(too_long()));
        }
        Ok(true)
    }

    fn utf8<'b>(&self, bytes: &'b [u8]) -> Result<&'b str> {
        str::from_utf8(bytes)
            .map_err(|e| self.bad(format!("not valid UTF-8 (byte {} of it)", e.valid_up_to())))
    }

    fn damaged(&self, e: io::Error) -> Error {
        match e.kind() {
            // What the decompressors say of a cut or damaged file.
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::Other => Error::Format {
                path: self.path.into(),
                reason: format!("cannot be decompressed: it is truncated or damaged ({e})"),
            },
            _ => Error::io(self.path, e),
        }
    }

    fn bad(&self, reason: String) -> Error {
        Error::Record {
            path: self.path.into(),
            record: self.record,
            reason,
        }
    }
}

fn too_long() -> String {
    format!("a document is at most {} MiB", MAX_DOCUMENT >> 20)
}

fn read_parquet(
    path: &Path,
    options: &ReadOptions,
    read: &Arc<AtomicU64>,
    each: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<()> {
    let broken = |e: parquet::errors::ParquetError| Error::Format {
        path: path.into(),
        reason: format!("not a readable parquet file ({e})"),
    };
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let meta = reader.metadata().file_metadata();
    let columns = meta.schema_descr().root_schema().get_fields();
    let mut wanted = vec![&options.text_field];
    wanted.extend(options.filter.iter().map(|(field, _)| field));
    for field in &wanted {
        if !columns.iter().any(|c| c.name() == field.as_str()) {
            let names: Vec<_> = columns.iter().map(|c| c.name()).collect();
            return Err(Error::Format {
                path: path.into(),
                reason: format!("it has no column {field}, only {}", names.join(", ")),
            });
        }
    }
    let kept = columns
        .iter()
        .filter(|c| wanted.iter().any(|f| c.name() == f.as_str()))
        .cloned()
        .collect();
    let projection = Type::group_type_builder("schema")
        .with_fields(kept)
        .build()
        .map_err(broken)?;
    let rows = reader.get_row_iter(Some(projection)).map_err(broken)?;
    let total = meta.num_rows().max(1) as u64;
    for (index, row) in rows.enumerate() {
        let row: Row = row.map_err(broken)?;
        let string = |name: &str| {
            row.get_column_iter()
                .find(|(n, _)| n.as_str() == name)
                .and_then(|(_, field)| match field {
                    Field::Str(s) => Some(s.clone()),
                    Field::Bytes(b) => String::from_utf8(b.data().to_vec()).ok(),
                    _ => None,
                })
        };
        // Parquet is read out of order, so progress goes by rows.
        read.fetch_add(
            length * (index as u64 + 1) / total - length * index as u64 / total,
            Ordering::Relaxed,
        );
        if let Some((field, value)) = &options.filter
            && string(field).as_deref() != Some(value)
        {
            continue;
        }
        let text = string(&options.text_field).ok_or_else(|| Error::Record {
            path: path.into(),
            record: index as u64 + 1,
            reason: format!("its field {} is not a string", options.text_field),
        })?;
        if text.len() > MAX_DOCUMENT {
            return Err(Error::Record {
                path: path.into(),
                record: index as u64 + 1,
                reason: too_long(),
            });
        }
        if !text.is_empty() {
            each(&text)?;
        }
    }
    Ok(())
}

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

/// Sizes of the inputs added up, for progress.
///
/// # Errors
/// [`Error::Missing`] for the first that is not there.
pub fn total_bytes(paths: &[PathBuf]) -> Result<u64> {
    paths.iter().try_fold(0, |sum, path| {
        let size = path.metadata().map_err(|e| Error::io(path, e))?.len();
        Ok(sum + size)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn collect(path: &Path, options: &ReadOptions) -> Result<Vec<String>> {
        let mut out = Vec::new();
        read_documents(path, options, &Arc::default(), &mut |text| {
            out.push(text.to_owned());
            Ok(())
        })?;
        Ok(out)
    }

    fn compress(kind: &str, bytes: &[u8]) -> Vec<u8> {
        match kind {
            ".gz" => {
                let mut w = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                w.write_all(bytes).unwrap();
                w.finish().unwrap()
            }
            ".xz" => {
                let mut w = liblzma::write::XzEncoder::new(Vec::new(), 1);
                w.write_all(bytes).unwrap();
                w.finish().unwrap()
            }
            ".zst" => zstd::encode_all(bytes, 1).unwrap(),
            _ => bytes.to_vec(),
        }
    }

    #[test]
    fn every_kind_and_compression() {
        let dir = tempfile::tempdir().unwrap();
        let json = b"{\"text\": \"one\\ntwo\", \"split\": \"a\"}\n\n{\"text\": \"\xc3\xa9\", \"split\": \"b\"}\r\n";
        for kind in ["", ".gz", ".xz", ".zst"] {
            let path = dir.path().join(format!("x.jsonl{kind}"));
            std::fs::write(&path, compress(kind, json)).unwrap();
            let options = ReadOptions::default();
            assert_eq!(collect(&path, &options).unwrap(), ["one\ntwo", "é"]);
            let only = ReadOptions {
                filter: Some(("split".into(), "b".into())),
                ..Default::default()
            };
            assert_eq!(collect(&path, &only).unwrap(), ["é"]);
            let path = dir.path().join(format!("x.txt{kind}"));
            std::fs::write(&path, compress(kind, b"a b\n\nc")).unwrap();
            assert_eq!(collect(&path, &options).unwrap(), ["a b\n\nc"]);
            let lines = ReadOptions {
                lines: true,
                ..Default::default()
            };
            assert_eq!(collect(&path, &lines).unwrap(), ["a b", "c"]);
        }
    }

    #[test]
    fn each_cause_has_its_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            collect(&path, &ReadOptions::default())
                .unwrap_err()
                .to_string()
        };
        assert!(put("a.jsonl", b"{}\n").contains("record 1: it has no field text"));
        assert!(put("a.jsonl", b"{\"text\": \"x\"}\n{\n").contains("record 2: not valid JSON"));
        assert!(put("a.jsonl", b"[1]\n").contains("not a JSON object"));
        assert!(put("a.jsonl", b"{\"text\": 1}\n").contains("not a string"));
        assert!(put("a.txt", b"ab\xff").contains("not valid UTF-8 (byte 2"));
        assert!(put("a.csv", b"x").contains("allowed are .txt"));
        assert!(put("a.parquet", b"nonsense").contains("not a readable parquet"));
        assert!(put("a.txt.gz", b"nonsense").contains("cannot be decompressed"));
        let whole = compress(".xz", &[b'a'; 5000]);
        assert!(put("a.txt.xz", &whole[..whole.len() / 2]).contains("cannot be decompressed"));
        let missing = collect(&dir.path().join("none.txt"), &ReadOptions::default());
        assert!(matches!(missing, Err(Error::Missing { .. })));
    }
}
