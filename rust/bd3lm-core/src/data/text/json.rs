//! JSON records: a line each, or the values of an array. Python's extensions of JSON are read, too.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use super::MAX_DOCUMENT;
use super::input::damaged;
use super::record::{Record, read_record};
use super::sink::Sink;
use crate::error::Result;

/// Capacity of the record buffer that is never given back.
const KEPT: usize = 1 << 20;

/// Reads an object from each line.
pub(super) fn read_lines<R: Read>(
    path: &Path,
    source: &mut BufReader<R>,
    sink: &mut Sink<'_>,
) -> Result<()> {
    read_each(path, sink, |line| next_line(source, line))
}

/// Reads the elements of an array, or objects one after the other.
pub(super) fn read_values<R: Read>(
    path: &Path,
    source: &mut BufReader<R>,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let mut values = Values {
        source,
        in_array: false,
    };
    read_each(path, sink, |value| values.next(value))
}

/// One record of a file.
enum Next {
    End,
    Record,
    /// Too long to be read.
    TooLong,
}

fn read_each(
    path: &Path,
    sink: &mut Sink<'_>,
    mut next: impl FnMut(&mut Vec<u8>) -> io::Result<Next>,
) -> Result<()> {
    let mut json = Vec::new();
    while !sink.is_done() {
        if json.capacity() > 16 * json.len() && json.capacity() > KEPT {
            json = Vec::new();
        }
        json.clear();
        match next(&mut json).map_err(|e| damaged(path, e))? {
            Next::End => break,
            Next::TooLong => {
                if sink.begin()? {
                    sink.bad(too_long())?;
                }
            }
            Next::Record if json.iter().all(u8::is_ascii_whitespace) => sink.number += 1,
            Next::Record => read_one(&json, sink)?,
        }
    }
    Ok(())
}

pub(super) fn too_long() -> String {
    format!(
        "longer than {} MiB; a text of any length is read from a .txt file",
        MAX_DOCUMENT >> 20
    )
}

fn read_one(json: &[u8], sink: &mut Sink<'_>) -> Result<()> {
    if !sink.begin()? {
        return Ok(());
    }
    let mut read = read_record(json, sink.options);
    let mended;
    let mut json = json;
    if read.is_err()
        && let Some((whole, halves)) = mend(json)
    {
        mended = whole;
        json = &mended;
        read = read_record(json, sink.options);
        if halves && matches!(read, Ok(Record::Text(_) | Record::Chat)) {
            sink.records.repaired += 1;
        }
    }
    match read {
        Ok(Record::Text(text)) => sink.text(&text),
        Ok(Record::Null) => {
            sink.null();
            Ok(())
        }
        Ok(Record::Filtered) => {
            sink.filtered();
            Ok(())
        }
        Ok(Record::Chat) => match str::from_utf8(json) {
            Ok(record) => sink.chat(record),
            Err(e) => sink.bad(format!("not valid UTF-8 (byte {} of it)", e.valid_up_to())),
        },
        Err(reason) => sink.bad(reason),
    }
}

/// The next line without its end.
fn next_line<R: Read>(source: &mut BufReader<R>, line: &mut Vec<u8>) -> io::Result<Next> {
    let limit = MAX_DOCUMENT as u64 + 2;
    if source.by_ref().take(limit).read_until(b'\n', line)? == 0 {
        return Ok(Next::End);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if line.len() > MAX_DOCUMENT {
        source.skip_until(b'\n')?;
    }
    Ok(if line.len() > MAX_DOCUMENT + 1 {
        Next::TooLong
    } else {
        Next::Record
    })
}

/// JSON values one after the other, inside an array or not.
struct Values<'a, R> {
    source: &'a mut BufReader<R>,
    in_array: bool,
}

impl<R: Read> Values<'_, R> {
    /// The bytes of the next value: up to where its brackets close, or to the next delimiter.
    fn next(&mut self, value: &mut Vec<u8>) -> io::Result<Next> {
        let Some(first) = self.begin()? else {
            return Ok(Next::End);
        };
        let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
        let is_plain = !matches!(first, b'{' | b'[' | b'"');
        let mut too_long = false;
        'value: loop {
            let bytes = self.source.fill_buf()?;
            if bytes.is_empty() {
                break; // cut off: the parser says so
            }
            let mut taken = bytes.len();
            let mut ended = false;
            for (i, byte) in bytes.iter().enumerate() {
                if in_string {
                    match byte {
                        _ if escaped => escaped = false,
                        b'\\' => escaped = true,
                        b'"' => {
                            in_string = false;
                            ended = depth == 0;
                        }
                        _ => {}
                    }
                } else {
                    match byte {
                        b'"' if !is_plain => in_string = true,
                        b'{' | b'[' => depth += 1,
                        b'}' | b']' => {
                            if depth == 0 {
                                taken = i; // of the array around it
                                ended = true;
                                break;
                            }
                            depth -= 1;
                            ended = depth == 0;
                        }
                        b',' | b' ' | b'\t' | b'\r' | b'\n' if depth == 0 => {
                            taken = i;
                            ended = true;
                            break;
                        }
                        _ => {}
                    }
                }
                if ended {
                    taken = i + 1;
                    break;
                }
            }
            if value.len() + taken > MAX_DOCUMENT {
                too_long = true;
                value.clear();
            }
            if !too_long {
                value.extend_from_slice(&bytes[..taken]);
            }
            self.source.consume(taken);
            if ended {
                break 'value;
            }
        }
        Ok(if too_long {
            Next::TooLong
        } else {
            Next::Record
        })
    }

    /// The first byte of the next value, which is not taken.
    fn begin(&mut self) -> io::Result<Option<u8>> {
        loop {
            let Some(byte) = self.source.fill_buf()?.first().copied() else {
                return Ok(None);
            };
            match byte {
                b' ' | b'\t' | b'\r' | b'\n' | b',' => {}
                b'[' if !self.in_array => self.in_array = true,
                b']' => self.in_array = false,
                b'}' => {}
                _ => return Ok(Some(byte)),
            }
            self.source.consume(1);
        }
    }
}

/// Rewrites Python's extensions of JSON: half a surrogate pair becomes U+FFFD; NaN and infinities
/// become null. Also says whether there was half a pair. `None` where
/// there is nothing to rewrite.
fn mend(json: &[u8]) -> Option<(Vec<u8>, bool)> {
    let mut out = Vec::with_capacity(json.len());
    let (mut halves, mut numbers) = (false, false);
    let (mut i, mut in_string) = (0, false);
    while i < json.len() {
        let rest = &json[i..];
        if in_string {
            match rest {
                [b'\\', b'u', ..] => match surrogate(rest) {
                    Some(High) if rest.len() >= 12 && surrogate(&rest[6..]) == Some(Low) => {
                        out.extend_from_slice(&rest[..12]);
                        i += 12;
                    }
                    Some(_) => {
                        halves = true;
                        out.extend_from_slice(b"\\ufffd");
                        i += 6;
                    }
                    None => {
                        out.extend_from_slice(b"\\u");
                        i += 2;
                    }
                },
                [b'\\', next, ..] => {
                    out.extend_from_slice(&[b'\\', *next]);
                    i += 2;
                }
                [byte, ..] => {
                    in_string = *byte != b'"';
                    out.push(*byte);
                    i += 1;
                }
                [] => break,
            }
            continue;
        }
        let number = [&b"NaN"[..], b"Infinity", b"-Infinity", b"-NaN"]
            .into_iter()
            .find(|number| rest.starts_with(number));
        if let Some(number) = number {
            numbers = true;
            out.extend_from_slice(b"null");
            i += number.len();
        } else {
            in_string = rest[0] == b'"';
            out.push(rest[0]);
            i += 1;
        }
    }
    (halves || numbers).then_some((out, halves))
}

use Surrogate::{High, Low};

/// Half of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Surrogate {
    High,
    Low,
}

/// The surrogate that is written as `\uXXXX` at the start of some bytes.
fn surrogate(bytes: &[u8]) -> Option<Surrogate> {
    let hex = bytes.strip_prefix(b"\\u")?.get(..4)?;
    if !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let code = u16::from_str_radix(str::from_utf8(hex).ok()?, 16).ok()?;
    match code {
        0xD800..0xDC00 => Some(High),
        0xDC00..0xE000 => Some(Low),
        _ => None,
    }
}
