//! Tokenization into token stores, and opening them.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bd3lm_core::Error;
use bd3lm_core::cpu::threads;
use bd3lm_core::data::prepare::prepare as run;
use bd3lm_core::data::store::{self, TokenStore, Verify, Vocab};
use bd3lm_core::data::text::{self, Chat, Detokenizer, Exchange, Format, ReadOptions, Reader};
use bd3lm_core::data::tokenize::{self, Tokenizer};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

use crate::errors::to_py;
use crate::interrupt::interruptible;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenStore>()?;
    m.add_class::<Documents>()?;
    m.add_function(wrap_pyfunction!(prepare, m)?)?;
    m.add_function(wrap_pyfunction!(join_stores, m)?)?;
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
pub struct PyTokenStore(pub Arc<TokenStore>);

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
        interruptible(py, &stop, || TokenStore::open_unless(&path, verify, &stop))
            .map(|store| PyTokenStore(Arc::new(store)))
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
            .map(|store| PyTokenStore(Arc::new(store)))
            .map_err(to_py)
    }

    #[getter]
    fn num_documents(&self) -> usize {
        self.0.num_documents()
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.0.tokens().len()
    }

    #[getter]
    fn num_prompt_tokens(&self) -> u64 {
        self.0.prompts().iter().map(|n| u64::from(*n)).sum()
    }

    #[getter]
    fn special(&self) -> VocabTuple {
        let v = self.0.vocab();
        (v.vocab_size, v.bos_id, v.eos_id, v.mask_id)
    }

    /// The manifest as JSON; None for arrays.
    #[getter]
    fn manifest(&self) -> Option<String> {
        let manifest = self.0.manifest()?;
        Some(serde_json::to_string(manifest).expect("a manifest is plain JSON"))
    }

    /// Number of occurrences of each id.
    fn token_counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let stop = AtomicBool::new(false);
        let counts = interruptible(py, &stop, || self.0.token_counts(&stop))?;
        Ok(PyArray1::from_vec(py, counts))
    }

    fn document<'py>(&self, py: Python<'py>, index: usize) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let offsets = self.0.doc_offsets();
        if index >= self.0.num_documents() {
            let allowed = format!("below the {} documents", self.0.num_documents());
            return Err(to_py(Error::config("document", index, allowed)));
        }
        let (start, end) = (offsets[index] as usize, offsets[index + 1] as usize);
        let mut ids = vec![0; end - start];
        self.0.tokens().copy_to(start, &mut ids);
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

/// Checks the definition of a tokenizer before the library loads it; returns its largest id.
#[pyfunction]
fn vet_tokenizer(py: Python<'_>, json: &str) -> PyResult<Option<u64>> {
    py.detach(|| tokenize::vet(json)).map_err(to_py)
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
