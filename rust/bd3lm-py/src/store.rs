//! Tokenization into token stores, and opening them.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bd3lm_core::Error;
use bd3lm_core::cpu::threads;
use bd3lm_core::data::prepare::prepare as run;
use bd3lm_core::data::store::{self, TokenStore, Tokens, Verify, Vocab};
use bd3lm_core::data::text::{self, Chat, Detokenizer, Exchange, Format, ReadOptions, Reader};
use bd3lm_core::data::tokenize::{self, Tokenizer};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

use crate::elsewhere::Elsewhere;
use crate::errors::to_py;
use crate::interrupt::interruptible;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenStore>()?;
    m.add_class::<Documents>()?;
    m.add_function(wrap_pyfunction!(prepare, m)?)?;
    m.add_function(wrap_pyfunction!(join_stores, m)?)?;
    m.add_function(wrap_pyfunction!(read_manifest, m)?)?;
    m.add_function(wrap_pyfunction!(detokenize, m)?)?;
    m.add_function(wrap_pyfunction!(vet_tokenizer, m)?)?;
    m.add_function(wrap_pyfunction!(parquet_rows, m)?)?;
    m.add_function(wrap_pyfunction!(count_records, m)?)?;
    m.add_function(wrap_pyfunction!(available_threads, m)?)
}

/// (vocab_size, bos_id, eos_id, mask_id)
type VocabTuple = (u32, u32, u32, u32);

fn vocab((vocab_size, bos_id, eos_id, mask_id): VocabTuple) -> Vocab {
    Vocab {
        vocab_size,
        bos_id,
        eos_id,
        mask_id,
    }
}

/// An open data set.
#[pyclass(name = "TokenStore", frozen, module = "bd3lm._core")]
pub struct PyTokenStore {
    store: Arc<TokenStore>,
    elsewhere: Option<Elsewhere>,
}

impl PyTokenStore {
    fn here(store: TokenStore) -> Self {
        PyTokenStore {
            store: Arc::new(store),
            elsewhere: None,
        }
    }

    /// The store, and the reader of its tokens if they are elsewhere.
    pub fn parts(&self, py: Python<'_>) -> (Arc<TokenStore>, Option<Elsewhere>) {
        let elsewhere = self.elsewhere.as_ref().map(|e| e.clone_ref(py));
        (self.store.clone(), elsewhere)
    }

    /// Gives the tokens of a range to `each`, in parts.
    fn read(
        &self,
        py: Python<'_>,
        range: Range<usize>,
        mut each: impl FnMut(&[i64]),
    ) -> PyResult<()> {
        let mut ids = Vec::new();
        for start in range.clone().step_by(READ_TOGETHER) {
            let part = start..range.end.min(start + READ_TOGETHER);
            ids.resize(part.len(), 0);
            match &self.elsewhere {
                None => self.store.tokens().copy_to(start, &mut ids),
                Some(elsewhere) => {
                    py.check_signals()?;
                    let runs = [part];
                    let copies = elsewhere.read(py, &runs)?;
                    let staged = copies.staged(&self.store, &runs)?;
                    Tokens::Staged(&staged).copy_to(start, &mut ids);
                }
            }
            each(&ids);
        }
        Ok(())
    }
}

/// Tokens of a document that are read at a time.
const READ_TOGETHER: usize = 1 << 20;

#[pymethods]
impl PyTokenStore {
    /// `verify`: None verifies once and remembers it.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf, verify: Option<bool>) -> PyResult<Self> {
        let verify = match verify {
            None => Verify::Once,
            Some(true) => Verify::Always,
            Some(false) => Verify::Never,
        };
        let stop = AtomicBool::new(false);
        interruptible(py, &stop, || TokenStore::open_unless(&path, verify, &stop)).map(Self::here)
    }

    /// Opens a directory that lacks the token files, whose runs of tokens `read` brings.
    #[staticmethod]
    fn open_absent(py: Python<'_>, path: PathBuf, read: Py<PyAny>) -> PyResult<Self> {
        let stop = AtomicBool::new(false);
        let open = || TokenStore::open_absent(&path, Verify::Once, &stop);
        let store = interruptible(py, &stop, open)?;
        Ok(PyTokenStore {
            store: Arc::new(store),
            elsewhere: Some(Elsewhere(read)),
        })
    }

    #[staticmethod]
    fn from_arrays(
        ids: PyReadonlyArray1<'_, i32>,
        lengths: PyReadonlyArray1<'_, u64>,
        special: VocabTuple,
    ) -> PyResult<Self> {
        let ids = ids.as_array().to_vec();
        let lengths = lengths.as_array().to_vec();
        TokenStore::from_arrays(ids, &lengths, vocab(special))
            .map(Self::here)
            .map_err(to_py)
    }

    #[getter]
    fn num_documents(&self) -> usize {
        self.store.num_documents()
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.store.num_tokens()
    }

    #[getter]
    fn num_prompt_tokens(&self) -> u64 {
        self.store.prompts().iter().map(|n| u64::from(*n)).sum()
    }

    #[getter]
    fn special(&self) -> VocabTuple {
        let v = self.store.vocab();
        (v.vocab_size, v.bos_id, v.eos_id, v.mask_id)
    }

    /// The manifest as JSON; None for arrays.
    #[getter]
    fn manifest(&self) -> Option<String> {
        let manifest = self.store.manifest()?;
        Some(serde_json::to_string(manifest).expect("a manifest is plain JSON"))
    }

    /// Number of occurrences of each id.
    fn token_counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let stop = AtomicBool::new(false);
        if self.elsewhere.is_some() {
            let mut counts = vec![0u64; self.store.vocab().vocab_size as usize];
            self.read(py, 0..self.store.num_tokens(), |ids| {
                ids.iter().for_each(|id| counts[*id as usize] += 1);
            })?;
            return Ok(PyArray1::from_vec(py, counts));
        }
        let counts = interruptible(py, &stop, || self.store.token_counts(&stop))?;
        Ok(PyArray1::from_vec(py, counts))
    }

    fn document<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let offsets = self.store.doc_offsets();
        if index >= self.store.num_documents() {
            let allowed = format!("below the {} documents", self.store.num_documents());
            return Err(to_py(Error::config("document", index, allowed)));
        }
        let (start, end) = (offsets[index] as usize, offsets[index + 1] as usize);
        let mut ids = Vec::with_capacity(end - start);
        self.read(py, start..end, |part| ids.extend_from_slice(part))?;
        Ok(PyArray1::from_vec(py, ids))
    }
}

/// Options of reading text files, as keyword arguments in Python.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Reading {
    text_field: String,
    filter: Option<(String, String)>,
    lines: bool,
    detokenizer: Option<String>,
    no_eos: bool,
    format: Option<String>,
    strict: bool,
    rows: Option<(u64, u64)>,
    source: Option<String>,
    /// Maps a JSON record to `[(prompt, response)]`; a ValueError says why it cannot.
    chat: Option<Py<PyAny>>,
}

impl Reading {
    fn options(self) -> bd3lm_core::Result<ReadOptions> {
        let detokenizer = self.detokenizer.as_deref().map(Detokenizer::named);
        Ok(ReadOptions {
            text_field: self.text_field,
            filter: self.filter,
            lines: self.lines,
            detokenizer: detokenizer.transpose()?,
            no_eos: self.no_eos,
            format: self.format.as_deref().map(Format::named).transpose()?,
            strict: self.strict,
            rows: self.rows,
            source: self.source,
            chat: self.chat.map(rendered_by),
        })
    }
}

/// Chats that a Python callable renders.
fn rendered_by(render: Py<PyAny>) -> Chat {
    Chat(Arc::new(move |record: &str| {
        Python::attach(|py| {
            let exchanges: Vec<(String, String)> = render.bind(py).call1((record,))?.extract()?;
            Ok(exchanges
                .into_iter()
                .map(|(prompt, response)| Exchange { prompt, response })
                .collect())
        })
        .map_err(|e: PyErr| Python::attach(|py| e.value(py).to_string()))
    }))
}

/// A benchmark text as it was written.
#[pyfunction]
fn detokenize(name: &str, text: &str) -> PyResult<String> {
    Ok(Detokenizer::named(name).map_err(to_py)?.apply(text))
}

/// Checks the manifest of a directory; returns it as JSON.
#[pyfunction]
fn read_manifest(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    let manifest = py.detach(|| store::read_manifest(&path)).map_err(to_py)?;
    Ok(serde_json::to_string(&manifest).expect("a manifest is plain JSON"))
}

/// Largest id, number of tokens and ids of some names.
type VettedTuple = (Option<u64>, Option<(usize, Vec<Option<u32>>)>);

/// Checks the definition of a tokenizer before the library loads it.
#[pyfunction]
fn vet_tokenizer(py: Python<'_>, json: &str, names: Vec<String>) -> PyResult<VettedTuple> {
    let vetted = py.detach(|| tokenize::vet(json, &names)).map_err(to_py)?;
    Ok((vetted.largest_id, vetted.tokens))
}

/// Number of rows of a parquet file.
#[pyfunction]
fn parquet_rows(path: PathBuf) -> PyResult<u64> {
    text::parquet_rows(&path).map_err(to_py)
}

/// Number of records of files.
#[pyfunction]
#[pyo3(signature = (inputs, *, reading))]
fn count_records(py: Python<'_>, inputs: Vec<PathBuf>, reading: Reading) -> PyResult<u64> {
    let options = reading.options().map_err(to_py)?;
    let mut reader = Reader::new(&options);
    let stop = reader.stop.clone();
    let count = || {
        for input in text::expand(&inputs, &options)? {
            reader.read(&input, &mut |_| Ok(()))?;
        }
        Ok(reader.records().read)
    };
    interruptible(py, &stop, count)
}

/// Threads that this process may run at once.
#[pyfunction]
fn available_threads() -> usize {
    threads::available_threads()
}

/// Reads, tokenizes and writes a data set; `progress(read, total, tokens)` is called now and then
/// and may raise. Returns the manifests as JSON.
#[pyfunction]
#[pyo3(signature = (inputs, target, tokenizer, special, *, reading, held_out, threads, progress))]
#[allow(clippy::too_many_arguments)]
fn prepare(
    py: Python<'_>,
    inputs: Vec<PathBuf>,
    target: PathBuf,
    tokenizer: String,
    special: VocabTuple,
    reading: Reading,
    held_out: Option<f64>,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<String>> {
    let options = reading.options().map_err(to_py)?;
    let mut raised = None;
    let outcome = py.detach(|| {
        let tokenizer = Arc::new(Tokenizer::from_json(&tokenizer, vocab(special))?);
        run(
            &inputs,
            &options,
            held_out,
            &tokenizer,
            &target,
            threads,
            &mut |now| {
                Python::attach(|py| {
                    let called = py.check_signals().and_then(|()| match &progress {
                        Some(f) => f.call1(py, (now.read, now.total, now.tokens)).map(drop),
                        None => Ok(()),
                    });
                    raised = called.err();
                    raised.is_none()
                })
            },
        )
    });
    let Some(manifests) = outcome.map_err(to_py)? else {
        return Err(raised.unwrap_or_else(|| PyKeyboardInterrupt::new_err("")));
    };
    let json = |manifest| serde_json::to_string(manifest).expect("a manifest is plain JSON");
    Ok(manifests.iter().map(json).collect())
}

/// Joins data sets inside a directory by a manifest, which is returned as JSON.
#[pyfunction]
fn join_stores(py: Python<'_>, path: PathBuf, names: Vec<String>) -> PyResult<String> {
    let manifest = py.detach(|| store::join(&path, &names)).map_err(to_py)?;
    Ok(serde_json::to_string(&manifest).expect("a manifest is plain JSON"))
}

/// Text of a document, or of a part of a very long one, and whether the document ends there.
type Part = (String, bool);

/// Documents of files, read by a thread a few ahead of the caller.
#[pyclass(frozen, module = "bd3lm._core")]
struct Documents {
    parts: Mutex<Receiver<Result<Part, Error>>>,
    stop: Arc<AtomicBool>,
}

#[pymethods]
impl Documents {
    #[new]
    #[pyo3(signature = (inputs, *, reading))]
    fn new(inputs: Vec<PathBuf>, reading: Reading) -> PyResult<Self> {
        let options = reading.options().map_err(to_py)?;
        let inputs = text::expand(&inputs, &options).map_err(to_py)?;
        let mut reader = Reader::new(&options);
        let stop = reader.stop.clone();
        let (send, parts) = sync_channel(4);
        let stopped = || Error::config("reader", "", "stopped");
        let read = move || {
            for input in &inputs {
                let outcome = reader.read(input, &mut |piece| {
                    let part = (piece.text.to_owned(), piece.last);
                    send.send(Ok(part)).map_err(|_| stopped())
                });
                if let Err(e) = outcome {
                    let _ = send.send(Err(e)); // nobody listens any more, or it is the last word
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("bd3lm-read".into())
            .spawn(read)?;
        Ok(Documents {
            parts: Mutex::new(parts),
            stop,
        })
    }

    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Part>> {
        loop {
            let next = py.detach(|| {
                let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
                parts.recv_timeout(Duration::from_millis(100))
            });
            match next {
                Ok(part) => return part.map(Some).map_err(to_py),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            }
        }
    }
}

impl Drop for Documents {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
