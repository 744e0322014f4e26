//! Text files to a data set: one thread reads, several tokenize, one writes, all in order.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use crate::data::store::{Manifest, StoreWriter};
use crate::data::text::detokenize::Detokenizer;
use crate::data::text::{ReadOptions, read_documents, total_bytes};
use crate::data::tokenize::Tokenizer;
use crate::error::{Error, Result};
use crate::random::mix;

/// Text that travels together: a few of these are in memory at a time.
const BATCH: usize = 512 << 10;
/// Longest time without a word on the progress.
const PATIENCE: Duration = Duration::from_millis(100);

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

/// Parts of documents, one after the other.
#[derive(Default)]
struct Batch {
    text: String,
    /// Where each part ends, and the bytes of its document if it is the last one of it.
    ends: Vec<(usize, Option<u64>)>,
}

/// Their ids, in the same way.
struct Encoded {
    ids: Vec<u32>,
    ends: Vec<(usize, Option<u64>)>,
}

/// Reads, tokenizes and writes a data set; `progress` returns false to stop.
///
/// Files are read in order on a thread of their own, `threads` threads tokenize, and this one
/// writes. Memory holds the document being read and a few batches of 512 KiB for each thread; a
/// tokenizer whose words cannot be told apart holds whole documents instead.
///
/// # Errors
/// Whatever reading, tokenizing or writing meets; nothing is left behind then. `Ok(None)` when
/// `progress` asked to stop.
pub fn prepare(
    inputs: &[PathBuf],
    options: &ReadOptions,
    hold_out: HoldOut,
    tokenizer: &Tokenizer,
    target: &Path,
    threads: usize,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Option<Manifest>> {
    let total = total_bytes(inputs)?;
    let mut writer = StoreWriter::create(target, tokenizer.vocab(), tokenizer.json())?
        .made_from(options.detokenizer.map(Detokenizer::name), options.no_eos);
    let read = Arc::new(AtomicU64::new(0));
    let stopped = AtomicBool::new(false);
    // Called on this thread, where an interpreter can see that Ctrl-C was pressed.
    let mut told = |tokens| {
        progress(Progress {
            read: read.load(Ordering::Relaxed),
            total,
            tokens,
        })
    };

    let finished = std::thread::scope(|scope| -> Result<bool> {
        // Batches go to the threads in turn and come back in turn, which keeps their order and
        // lets no thread run ahead of another.
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for _ in 0..threads.max(1) {
            let (to_worker, batches) = sync_channel(1);
            let (to_writer, encoded) = sync_channel(1);
            scope.spawn(move || tokenize(tokenizer, batches, to_writer));
            senders.push(to_worker);
            receivers.push(encoded);
        }
        let (read, stopped) = (&read, &stopped);
        let reader = scope.spawn(move || {
            let mut reader = Reader {
                tokenizer,
                senders,
                turn: 0,
                batch: Batch::default(),
            };
            let mut index = 0u64;
            for path in inputs {
                read_documents(path, options, read, &mut |text| {
                    if stopped.load(Ordering::Relaxed) {
                        return Err(gone());
                    }
                    let taken = hold_out.is_none_or(|(f, held)| is_held(index, f) == held);
                    index += 1;
                    if taken { reader.take(text) } else { Ok(()) }
                })?;
            }
            reader.send()
        });
        let mut outcome = Ok(true);
        let mut turn = 0;
        while matches!(outcome, Ok(true)) {
            outcome = match receivers[turn].recv_timeout(PATIENCE) {
                Ok(encoded) => {
                    turn = (turn + 1) % receivers.len();
                    encoded
                        .and_then(|encoded| write(&encoded, &mut writer))
                        .map(|()| told(writer.num_tokens()))
                }
                Err(RecvTimeoutError::Timeout) => Ok(told(writer.num_tokens())),
                Err(RecvTimeoutError::Disconnected) => break,
            };
        }
        stopped.store(true, Ordering::Relaxed);
        drop(receivers); // lets threads that are ahead of us end
        let reading = reader.join().expect("the reader does not panic");
        if !outcome? {
            return Ok(false);
        }
        reading.map(|()| true)
    })?;
    if !finished {
        return Ok(None);
    }
    let source = inputs.iter().map(|p| p.display().to_string()).collect();
    writer.finish(source).map(Some)
}

/// The other end of a channel is gone only when it has met an error of its own.
fn gone() -> Error {
    Error::config("reader", "", "stopped")
}

/// Gathers documents into batches, and hands these to the threads in turn.
struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    senders: Vec<SyncSender<Batch>>,
    turn: usize,
    batch: Batch,
}

impl Reader<'_> {
    /// Long documents are cut where that changes no id.
    fn take(&mut self, document: &str) -> Result<()> {
        let mut rest = document;
        loop {
            let (part, after) = rest.split_at(self.tokenizer.part(rest, BATCH));
            rest = after;
            self.batch.text.push_str(part);
            let last = rest.is_empty().then_some(document.len() as u64);
            self.batch.ends.push((self.batch.text.len(), last));
            if self.batch.text.len() >= BATCH {
                self.send()?;
            }
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    fn send(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        let sent = self.senders[self.turn].send(batch);
        self.turn = (self.turn + 1) % self.senders.len();
        sent.map_err(|_| gone())
    }
}

/// One thread's work: ends when either side is gone.
fn tokenize(
    tokenizer: &Tokenizer,
    batches: Receiver<Batch>,
    to_writer: SyncSender<Result<Encoded>>,
) {
    let mut encoder = tokenizer.encoder();
    for batch in batches {
        let mut encode = || {
            // English has about four bytes a token.
            let mut ids = Vec::with_capacity(batch.text.len() / 3);
            let mut ends = Vec::with_capacity(batch.ends.len());
            let mut start = 0;
            for (end, document) in &batch.ends {
                encoder.encode(&batch.text[start..*end], &mut ids)?;
                ends.push((ids.len(), *document));
                start = *end;
            }
            Ok(Encoded { ids, ends })
        };
        if to_writer.send(encode()).is_err() {
            return;
        }
    }
}

fn write(encoded: &Encoded, writer: &mut StoreWriter) -> Result<()> {
    let mut start = 0;
    for (end, document) in &encoded.ends {
        writer.push(&encoded.ids[start..*end])?;
        if let Some(bytes) = document {
            writer.end_document(*bytes)?;
        }
        start = *end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::store::TokenStore;
    use crate::data::tokenize::tests::{VOCAB, definition};

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
        std::fs::read(target.join(crate::data::store::BIN)).unwrap()
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
