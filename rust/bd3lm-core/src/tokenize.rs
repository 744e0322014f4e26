//! Documents to token ids, in parallel and in order, into a data set.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::rng::mix;
use crate::store::{Manifest, StoreWriter, Vocab};
use crate::text::{ReadOptions, read_documents, total_bytes};

/// Text handed to the tokenizer at once: longer documents are cut where that is exact.
const PIECE: usize = 64 << 10;
/// Text of small documents that travels together.
const BATCH: usize = 4 << 20;

/// Longest time without a word on the progress, tokenizing itself not counted.
const PATIENCE: Duration = Duration::from_millis(100);

/// A tokenizer with the special ids of its vocabulary.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: String,
    vocab: Vocab,
    cut: Cut,
}

/// Where a text can be cut without changing its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// GPT-2's byte-level rule: a single space between a non-space and a letter begins a word.
    BeforeSpaceAndLetter,
    /// BERT's rule: words never cross a space.
    AtSpace,
    /// Unknown rule: whole documents only.
    Never,
}

impl Tokenizer {
    /// From the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the definition does not load, or needs ids beyond the vocabulary.
    pub fn from_json(json: &str, vocab: Vocab) -> Result<Self> {
        let bad = |reason: String| Error::Tokenizer {
            name: "definition".into(),
            reason,
        };
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json.as_bytes()).map_err(|e| bad(e.to_string()))?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| bad(e.to_string()))?;
        let needed = inner.get_vocab_size(true);
        if needed > vocab.vocab_size as usize {
            return Err(bad(format!(
                "it makes {needed} ids, more than the vocabulary of {}",
                vocab.vocab_size
            )));
        }
        let value: serde_json::Value =
            serde_json::from_str(json).map_err(|e| bad(e.to_string()))?;
        Ok(Tokenizer {
            inner,
            json: json.into(),
            vocab,
            cut: Cut::of(&value),
        })
    }

    /// Ids of a text, without special tokens around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the model cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::Tokenizer {
                name: "of this data set".into(),
                reason: e.to_string(),
            })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Cuts a text into pieces whose ids, joined, are the ids of the whole.
    fn pieces<'a>(&self, text: &'a str, out: &mut Vec<&'a str>) {
        let mut rest = text;
        while rest.len() > PIECE {
            match self.cut.find(rest, PIECE) {
                Some(at) => {
                    out.push(&rest[..at]);
                    rest = &rest[at..];
                }
                None => break,
            }
        }
        out.push(rest);
    }
}

impl Cut {
    fn of(definition: &serde_json::Value) -> Self {
        let added = definition["added_tokens"].as_array();
        let spaced = |token: &serde_json::Value| {
            let content = token["content"].as_str().unwrap_or_default();
            content.contains(' ')
        };
        if added.is_some_and(|tokens| tokens.iter().any(spaced)) {
            return Cut::Never; // such a token can stand across any cut
        }
        let pre = &definition["pre_tokenizer"];
        match pre["type"].as_str() {
            Some("ByteLevel")
                if definition["normalizer"].is_null()
                    && pre["add_prefix_space"] == false
                    && pre["use_regex"] != false =>
            {
                Cut::BeforeSpaceAndLetter
            }
            Some("BertPreTokenizer") => Cut::AtSpace,
            _ => Cut::Never,
        }
    }

    /// The first exact cut at or after `from`.
    fn find(self, text: &str, from: usize) -> Option<usize> {
        if self == Cut::Never {
            return None;
        }
        let bytes = text.as_bytes();
        // ASCII neighbours alone, so that a cut is never inside a character and no Unicode
        // space or combining mark can take part in it.
        (from..bytes.len() - 1).find(|&i| {
            bytes[i] == b' '
                && bytes[i - 1].is_ascii_alphanumeric()
                && bytes[i + 1].is_ascii_alphabetic()
        })
    }
}

/// What [`prepare`] has done so far.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes taken from the files.
    pub read: u64,
    /// Bytes of all files.
    pub total: u64,
    /// Tokens written.
    pub tokens: u64,
}

/// Which documents to take: `(fraction, held)` takes the held-out share, or all but it.
pub type HoldOut = Option<(f64, bool)>;

/// Whether document number `index` belongs to the held-out share: a fixed hash, so that two
/// passes agree.
fn is_held(index: u64, fraction: f64) -> bool {
    (mix(index) as f64) < fraction * u64::MAX as f64
}

/// Reads, tokenizes and writes a data set; `progress` returns false to stop.
///
/// Files are read in order on a thread of their own while up to `threads` threads tokenize.
/// Memory holds a few batches of 4 MiB, or a few documents where these are longer.
///
/// # Errors
/// Whatever reading, tokenizing or writing meets; nothing is left behind then. `Ok(None)` when
/// `progress` asked to stop.
pub fn prepare(
    inputs: &[PathBuf],
    options: &ReadOptions,
    hold_out: HoldOut,
    tokenizer: &Tokenizer,
    target: &std::path::Path,
    threads: usize,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Option<Manifest>> {
    let total = total_bytes(inputs)?;
    let mut writer = StoreWriter::create(target, tokenizer.vocab, &tokenizer.json)?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|e| Error::config("threads", threads, e.to_string()))?;
    let read = Arc::new(AtomicU64::new(0));
    let stopped = AtomicBool::new(false);
    let (sender, receiver) = sync_channel::<Vec<String>>(1);

    let outcome = std::thread::scope(|scope| -> Result<bool> {
        let reader = scope.spawn(|| -> Result<()> {
            let sender = sender;
            let (mut batch, mut size, mut index) = (Vec::new(), 0, 0u64);
            let stop = || Error::config("reader", "", "stopped");
            for path in inputs {
                read_documents(path, options, &read, &mut |text| {
                    if stopped.load(Ordering::Relaxed) {
                        return Err(stop());
                    }
                    let held = hold_out.map(|(f, held)| is_held(index, f) == held);
                    index += 1;
                    if held == Some(false) {
                        return Ok(());
                    }
                    size += text.len();
                    batch.push(text);
                    if size >= BATCH {
                        size = 0;
                        // The other end is gone only when it has met an error of its own.
                        sender
                            .send(std::mem::take(&mut batch))
                            .map_err(|_| stop())?;
                    }
                    Ok(())
                })?;
            }
            sender.send(batch).map_err(|_| stop())
        });
        // Called on this thread, where an interpreter can see that Ctrl-C was pressed.
        let mut told = |tokens| {
            progress(Progress {
                read: read.load(Ordering::Relaxed),
                total,
                tokens,
            })
        };
        let mut written = Ok(true);
        while matches!(written, Ok(true)) {
            written = match receiver.recv_timeout(PATIENCE) {
                Ok(batch) => write_batch(tokenizer, &pool, &batch, &mut writer, &mut told),
                Err(RecvTimeoutError::Timeout) => Ok(told(writer.num_tokens())),
                Err(RecvTimeoutError::Disconnected) => break,
            };
        }
        drop(receiver); // lets a reader that is ahead of us end
        stopped.store(true, Ordering::Relaxed);
        let reading = reader.join().expect("the reader does not panic");
        if !written? {
            return Ok(false);
        }
        reading.map(|()| true)
    })?;
    if !outcome {
        return Ok(None);
    }
    let source = inputs.iter().map(|p| p.display().to_string()).collect();
    writer.finish(source).map(Some)
}

/// Tokenizes documents in groups of about [`BATCH`] bytes, so that one long document is bounded
/// too, and appends them in order; returns whether to go on.
fn write_batch(
    tokenizer: &Tokenizer,
    pool: &rayon::ThreadPool,
    documents: &[String],
    writer: &mut StoreWriter,
    keep_going: &mut dyn FnMut(u64) -> bool,
) -> Result<bool> {
    // (text, bytes of the document if this is its last piece)
    let mut pieces: Vec<(&str, Option<u64>)> = Vec::new();
    let mut cut = Vec::new();
    for document in documents {
        cut.clear();
        tokenizer.pieces(document, &mut cut);
        let last = cut.len() - 1;
        pieces.extend(
            cut.iter()
                .enumerate()
                .map(|(i, piece)| (*piece, (i == last).then_some(document.len() as u64))),
        );
    }
    let mut rest = pieces.as_slice();
    while !rest.is_empty() {
        let mut size = 0;
        let group = rest
            .iter()
            .position(|(text, _)| {
                size += text.len();
                size > BATCH
            })
            .unwrap_or(rest.len())
            .max(1);
        let encoded: Vec<Vec<u32>> = pool.install(|| {
            let texts = rest[..group].par_iter();
            texts
                .map(|(text, _)| tokenizer.encode(text))
                .collect::<Result<_>>()
        })?;
        for (ids, (_, end)) in encoded.iter().zip(rest) {
            writer.push(ids)?;
            if let Some(bytes) = end {
                writer.end_document(*bytes)?;
            }
        }
        rest = &rest[group..];
        if !keep_going(writer.num_tokens()) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TokenStore;

    const VOCAB: Vocab = Vocab {
        vocab_size: 300,
        bos_id: 256,
        eos_id: 256,
        mask_id: 257,
    };

    /// Byte-level BPE with every byte and a few merges.
    fn definition() -> String {
        let mut vocab = serde_json::Map::new();
        let mut next = 256u32;
        for b in 0..=255u32 {
            // GPT-2's printable stand-ins
            let printable =
                (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
            let c = if printable {
                char::from_u32(b).unwrap()
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap()
            };
            vocab.insert(c.to_string(), b.into());
        }
        vocab.insert("<eos>".into(), 256.into());
        vocab.insert("<mask>".into(), 257.into());
        let merges = ["t h", "th e", "Ġ the", "Ġ a", "i n", "Ġ Ġ"];
        for (i, m) in merges.iter().enumerate() {
            vocab.insert(m.replace(' ', ""), (258 + i).into());
        }
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                      "vocab": vocab, "merges": merges}
        })
        .to_string()
    }

    /// Cutting anywhere the rule allows never changes the ids.
    #[test]
    fn cuts_are_exact() {
        let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
        assert_eq!(tokenizer.cut, Cut::BeforeSpaceAndLetter);
        let text = "the  cat's in the\n\n the é x1 2b  a;\tthe end don't a\u{3000}b c ".repeat(3);
        let whole = tokenizer.encode(&text).unwrap();
        let mut cuts = 0;
        for from in 1..text.len() - 1 {
            let Some(at) = tokenizer.cut.find(&text, from) else {
                continue;
            };
            let mut joined = tokenizer.encode(&text[..at]).unwrap();
            joined.extend(tokenizer.encode(&text[at..]).unwrap());
            assert_eq!(joined, whole, "cut at {at}");
            cuts += 1;
        }
        assert!(cuts > 20);
    }

    #[test]
    fn long_documents_equal_their_whole() {
        let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
        let text = "in the beginning a thing was there ".repeat(6000);
        assert!(text.len() > 3 * PIECE);
        let mut pieces = Vec::new();
        tokenizer.pieces(&text, &mut pieces);
        assert!(pieces.len() > 2 && pieces.concat() == text);
        let joined: Vec<u32> = pieces
            .iter()
            .flat_map(|p| tokenizer.encode(p).unwrap())
            .collect();
        assert_eq!(joined, tokenizer.encode(&text).unwrap());
    }

    fn run(threads: usize, hold_out: HoldOut) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        let text: String = (0..3000)
            .map(|i| format!("the thing {i} in the end\n"))
            .collect();
        std::fs::write(&path, text).unwrap();
        let options = ReadOptions {
            lines: true,
            ..Default::default()
        };
        let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
        let target = dir.path().join("out");
        prepare(
            &[path],
            &options,
            hold_out,
            &tokenizer,
            &target,
            threads,
            &mut |_| true,
        )
        .unwrap()
        .unwrap();
        assert!(TokenStore::open(&target, true).is_ok());
        std::fs::read(target.join(crate::store::BIN)).unwrap()
    }

    #[test]
    fn threads_do_not_change_the_result() {
        assert_eq!(run(1, None), run(3, None));
    }

    #[test]
    fn held_out_documents_are_the_others() {
        let (all, train, held) = (
            run(2, None).len(),
            run(2, Some((0.1, false))).len(),
            run(2, Some((0.1, true))).len(),
        );
        assert_eq!(all, train + held);
        let share = held as f64 / all as f64;
        assert!((share - 0.1).abs() < 0.03, "{share}");
    }

    #[test]
    fn stopping_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.txt");
        std::fs::write(&path, "some text").unwrap();
        let tokenizer = Tokenizer::from_json(&definition(), VOCAB).unwrap();
        let target = dir.path().join("out");
        let options = ReadOptions::default();
        let stopped = prepare(&[path], &options, None, &tokenizer, &target, 1, &mut |_| {
            false
        })
        .unwrap();
        assert!(stopped.is_none() && !target.exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
