//! Text files to data sets: one thread reads, several tokenize, one writes, all in order.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use crate::data::store::{Manifest, Partial, Recipe, StoreWriter};
use crate::data::text::{
    Detokenizer, Input, Piece, ReadOptions, Reader, Records, expand, stopped, total_bytes,
};
use crate::data::tokenize::Tokenizer;
use crate::error::{Error, Result, first_of};
use crate::random::mix;

/// Text that travels together: a few of these are in memory at a time.
const BATCH: usize = 512 << 10;
/// Longest time between two reports of progress, and until a stop is noticed.
const PATIENCE: Duration = Duration::from_millis(100);
/// The first document is cut finely, because the tail of a lone document is held out. Bytes between
/// two cuts: at least the first number, and this share of the bytes before.
const SEAMS: (usize, u64) = (16, 256);
/// Most threads that tokenize.
pub const MAX_THREADS: usize = 1024;

/// Directories of the two sides of a split.
pub const SIDES: [&str; 2] = ["train", "valid"];

/// Progress of [`prepare`].
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes taken from the files.
    pub read: u64,
    /// Bytes of all files.
    pub total: u64,
    /// Tokens written.
    pub tokens: u64,
}

/// The side of a document: 0 trains, 1 validates. A fixed hash of its number decides, except that
/// the first document always trains.
fn side_of(index: u64, held_out: Option<f64>) -> usize {
    let is_held = |fraction| (mix(index) as f64) < fraction * u64::MAX as f64;
    usize::from(index > 0 && held_out.is_some_and(is_held))
}

/// Parts of documents, one after the other.
#[derive(Default)]
struct Batch {
    text: String,
    parts: Vec<Part>,
}

/// A part of a document.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// End in its batch: in bytes, and then in ids.
    end: usize,
    bytes: u64,
    side: usize,
    /// True if the document begins before it.
    continued: bool,
    /// True for a part of a prompt.
    prompt: bool,
    /// True if the document ends with it.
    last: bool,
    /// Bytes between the places where it may be divided, if these are wanted.
    spacing: Option<usize>,
}

/// Ids of parts.
struct Encoded {
    ids: Vec<u32>,
    parts: Vec<Part>,
}

/// Reads, tokenizes and writes a data set, or both sides of a split; `progress` returns false to
/// stop.
///
/// Files are read in order on one thread, `threads` threads tokenize, and the calling thread
/// writes. Memory holds the part of a document that is being read, at most 64 MiB, and a few
/// batches of 512 KiB for each thread; a tokenizer whose words cannot be separated holds whole
/// parts instead.
///
/// With `held_out`, that share of the documents goes to `valid/` and the rest to `train/`: by a
/// hash of their number, at least one document each. Of a single document the tail is held out.
///
/// # Errors
/// Those of reading, tokenizing and writing; nothing is left behind then. `Ok(None)` when
/// `progress` stopped it.
pub fn prepare(
    paths: &[PathBuf],
    options: &ReadOptions,
    held_out: Option<f64>,
    tokenizer: &Arc<Tokenizer>,
    target: &Path,
    threads: usize,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Option<Vec<Manifest>>> {
    if !(1..=MAX_THREADS).contains(&threads) {
        let allowed = format!("1 to {MAX_THREADS}");
        return Err(Error::config("threads", threads, allowed));
    }
    let inputs = expand(paths, options)?;
    let source: Vec<String> = match &options.source {
        Some(name) => vec![name.clone()],
        None => paths.iter().map(|p| p.display().to_string()).collect(),
    };
    let partial = Partial::create(target)?;
    let mut writers = writers(&partial, options, held_out, tokenizer)?;
    let total = total_bytes(&inputs);
    let pipeline = Pipeline::start(inputs, options, held_out, tokenizer, threads)?;
    let read = pipeline.reader_bytes.clone();
    // Called on this thread, where an interpreter can see that Ctrl-C was pressed.
    let mut report = |writers: &[StoreWriter]| {
        progress(Progress {
            read: read.load(Ordering::Relaxed),
            total,
            tokens: writers.iter().map(StoreWriter::num_tokens).sum(),
        })
    };
    let Some(records) = pipeline.run(&mut writers, &mut report)? else {
        return Ok(None);
    };
    if writers.iter().all(|w| w.num_documents() == 0) {
        return Err(Error::empty(
            &source,
            records.why_empty(options.filter.as_ref()),
        ));
    }
    if let ([train, valid], Some(fraction)) = (writers.as_mut_slice(), held_out) {
        fill_validation(train, valid, fraction, &source)?;
    }
    let finish = |writer: StoreWriter| writer.finish(source.clone(), Some(records.clone()));
    let manifests = writers.into_iter().map(finish).collect::<Result<_>>()?;
    partial.commit()?;
    Ok(Some(manifests))
}

fn writers(
    partial: &Partial,
    options: &ReadOptions,
    held_out: Option<f64>,
    tokenizer: &Tokenizer,
) -> Result<Vec<StoreWriter>> {
    let recipe = Recipe {
        vocab: tokenizer.vocab(),
        tokenizer: tokenizer.json().into(),
        detokenizer: options.detokenizer.map(Detokenizer::name).map(Into::into),
        no_eos: options.no_eos,
    };
    let Some(fraction) = held_out else {
        return Ok(vec![StoreWriter::create(partial.path(), recipe)?]);
    };
    if !(fraction > 0.0 && fraction < 1.0) {
        let allowed = "above 0 and below 1";
        return Err(Error::config("valid-fraction", fraction, allowed));
    }
    SIDES
        .iter()
        .map(|side| {
            let dir = partial.path().join(side);
            std::fs::create_dir(&dir).map_err(|e| Error::io(&dir, e))?;
            StoreWriter::create(&dir, recipe.clone())
        })
        .collect()
}

/// Gives the validation side a document where the hash gave it none.
fn fill_validation(
    train: &mut StoreWriter,
    valid: &mut StoreWriter,
    fraction: f64,
    source: &[String],
) -> Result<()> {
    if valid.num_documents() > 0 {
        return Ok(());
    }
    match train.num_documents() {
        1 if !train.split_only(fraction, valid)? => Err(Error::EmptySplit {
            inputs: first_of(source),
            documents: 1,
            reason:
                "it is too short to be divided; give a longer text, or validation data of its own"
                    .into(),
        }),
        1 => Ok(()),
        _ => train.move_last(valid),
    }
}

/// The threads that read and tokenize. They are not joined where the work is stopped: one may be
/// in the middle of a long document, and the others end by themselves.
struct Pipeline {
    reader: thread::JoinHandle<Result<Records>>,
    receivers: Vec<Receiver<Result<Encoded>>>,
    reader_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    /// Whether the reader renders chats.
    renders: bool,
}

impl Pipeline {
    fn start(
        inputs: Vec<Input>,
        options: &ReadOptions,
        held_out: Option<f64>,
        tokenizer: &Arc<Tokenizer>,
        threads: usize,
    ) -> Result<Self> {
        let fail = |e| Error::io("a thread", e);
        // Batches go round the threads and come back in the same order, so documents keep theirs
        // and no thread runs ahead of another.
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for index in 0..threads {
            let (to_worker, batches) = sync_channel(1);
            let (to_writer, encoded) = sync_channel(1);
            let tokenizer = tokenizer.clone();
            let work = move || tokenize(&tokenizer, threads, batches, to_writer);
            match thread::Builder::new()
                .name("bd3lm-tokenize".into())
                .spawn(work)
            {
                Ok(_) => {}
                Err(_) if index > 0 => break, // fewer threads do the same work
                Err(e) => return Err(fail(e)),
            }
            senders.push(to_worker);
            receivers.push(encoded);
        }
        let reader = Reader::new(options);
        let (reader_bytes, stop) = (reader.read.clone(), reader.stop.clone());
        let batcher = Batcher {
            tokenizer: tokenizer.clone(),
            senders,
            next: 0,
            batch: Batch::default(),
            held_out,
            index: 0,
            begun: 0,
        };
        let read = move || read_all(reader, &inputs, batcher);
        let reader = thread::Builder::new().name("bd3lm-read".into()).spawn(read);
        Ok(Pipeline {
            reader: reader.map_err(fail)?,
            receivers,
            reader_bytes,
            stop,
            renders: options.chat.is_some(),
        })
    }

    /// Writes the ids that the threads make; `None` where `report` returned false.
    fn run(
        self,
        writers: &mut [StoreWriter],
        report: &mut dyn FnMut(&[StoreWriter]) -> bool,
    ) -> Result<Option<Records>> {
        let mut next = 0;
        loop {
            let outcome = match self.receivers[next].recv_timeout(PATIENCE) {
                Ok(encoded) => {
                    next = (next + 1) % self.receivers.len();
                    encoded.and_then(|encoded| write(&encoded, writers))
                }
                Err(RecvTimeoutError::Timeout) => Ok(()),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if outcome.is_err() || !report(writers) {
                self.stop.store(true, Ordering::Relaxed);
                if self.renders {
                    // It calls into an interpreter, which may end before a thread that is left.
                    drop(self.receivers);
                    let _ = self.reader.join();
                }
                return outcome.map(|()| None);
            }
        }
        match self.reader.join() {
            Ok(read) => read.map(Some),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn read_all(mut reader: Reader, inputs: &[Input], mut batcher: Batcher) -> Result<Records> {
    for input in inputs {
        reader.read(input, &mut |piece| batcher.take(piece))?;
    }
    batcher.send()?;
    Ok(reader.records().clone())
}

/// Gathers documents into batches, and hands them round the threads.
struct Batcher {
    tokenizer: Arc<Tokenizer>,
    senders: Vec<SyncSender<Batch>>,
    next: usize,
    batch: Batch,
    held_out: Option<f64>,
    /// Number of the current document; those of a chat share one.
    index: u64,
    /// Bytes of it that were taken.
    begun: u64,
}

impl Batcher {
    /// Long documents are cut where that changes no id.
    fn take(&mut self, piece: Piece<'_>) -> Result<()> {
        let side = side_of(self.index, self.held_out);
        let seams = self.held_out.is_some() && self.index == 0;
        let mut rest = piece.text;
        loop {
            let (part, after) = rest.split_at(self.tokenizer.part(rest, BATCH));
            rest = after;
            self.batch.text.push_str(part);
            self.batch.parts.push(Part {
                end: self.batch.text.len(),
                bytes: part.len() as u64,
                side,
                continued: self.begun > 0,
                prompt: piece.prompt,
                last: piece.last && rest.is_empty(),
                spacing: seams.then(|| SEAMS.0.max((self.begun / SEAMS.1) as usize)),
            });
            self.begun += part.len() as u64;
            if self.batch.text.len() >= BATCH {
                self.send()?;
            }
            if rest.is_empty() {
                break;
            }
        }
        if piece.last {
            // Documents of one record are on the same side of a split.
            self.index += u64::from(!piece.more);
            self.begun = 0;
        }
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        let sent = self.senders[self.next].send(batch);
        self.next = (self.next + 1) % self.senders.len();
        // The other end is gone only when it has met an error of its own.
        sent.map_err(|_| stopped())
    }
}

/// One thread's work: ends when either side is gone.
fn tokenize(
    tokenizer: &Tokenizer,
    threads: usize,
    batches: Receiver<Batch>,
    to_writer: SyncSender<Result<Encoded>>,
) {
    let mut encoder = tokenizer.encoder(threads);
    for batch in batches {
        let mut encode = || {
            // English has about four bytes a token.
            let mut ids = Vec::with_capacity(batch.text.len() / 3);
            let mut parts = Vec::with_capacity(batch.parts.len());
            let mut start = 0;
            for part in &batch.parts {
                let text = &batch.text[start..part.end];
                start = part.end;
                let mut rest = *part;
                if let Some(spacing) = part.spacing {
                    let (first, mut done) = (ids.len(), 0);
                    let seams =
                        encoder.encode_with_seams(text, part.continued, spacing, &mut ids)?;
                    for seam in seams {
                        parts.push(Part {
                            end: first + seam.ids,
                            bytes: seam.bytes as u64 - done,
                            last: false,
                            ..*part
                        });
                        done = seam.bytes as u64;
                    }
                    rest.bytes -= done;
                } else {
                    encoder.encode(text, part.continued, &mut ids)?;
                }
                rest.end = ids.len();
                parts.push(rest);
            }
            Ok(Encoded { ids, parts })
        };
        if to_writer.send(encode()).is_err() {
            return;
        }
    }
}

fn write(encoded: &Encoded, writers: &mut [StoreWriter]) -> Result<()> {
    let mut start = 0;
    for part in &encoded.parts {
        let writer = &mut writers[part.side];
        let ids = &encoded.ids[start..part.end];
        if part.prompt {
            writer.push_prompt(ids)?;
        } else {
            writer.push(ids, part.bytes)?;
        }
        if part.last {
            writer.end_document()?;
        }
        start = part.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
