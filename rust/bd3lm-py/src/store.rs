//! Tokenization into token stores, and opening them.

use std::path::PathBuf;
use std::sync::Arc;

use bd3lm_core::Error;
use bd3lm_core::data::prepare::prepare as run;
use bd3lm_core::data::store::{TokenStore, Vocab};
use bd3lm_core::data::text::Detokenizer;
use bd3lm_core::data::text::{ReadOptions, read_documents};
use bd3lm_core::data::tokenize::Tokenizer;
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;

use crate::errors::to_py;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenStore>()?;
    m.add_function(wrap_pyfunction!(prepare, m)?)?;
    m.add_function(wrap_pyfunction!(detokenize, m)?)?;
    m.add_function(wrap_pyfunction!(for_each_document, m)?)
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
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf, verify: bool) -> PyResult<Self> {
        py.detach(|| TokenStore::open(&path, verify))
            .map(|store| PyTokenStore(Arc::new(store)))
            .map_err(to_py)
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

    /// How often each id occurs.
    fn token_counts<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        let counts = py.detach(|| self.0.token_counts());
        PyArray1::from_vec(py, counts)
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

fn options(
    text_field: String,
    filter: Option<(String, String)>,
    lines: bool,
    detokenizer: Option<&str>,
    no_eos: bool,
) -> PyResult<ReadOptions> {
    let detokenizer = detokenizer.map(Detokenizer::named).transpose();
    Ok(ReadOptions {
        text_field,
        filter,
        lines,
        detokenizer: detokenizer.map_err(to_py)?,
        no_eos,
    })
}

/// A benchmark text as it was written.
#[pyfunction]
fn detokenize(name: &str, text: &str) -> PyResult<String> {
    Ok(Detokenizer::named(name).map_err(to_py)?.apply(text))
}

/// Reads, tokenizes and writes a data set; `progress(read, total, tokens)` is called now and then
/// and may raise. Returns the manifest as JSON.
#[pyfunction]
#[pyo3(signature = (inputs, target, tokenizer, special, *, text_field, filter, lines, detokenizer, no_eos, hold_out, threads, progress))]
#[allow(clippy::too_many_arguments)]
fn prepare(
    py: Python<'_>,
    inputs: Vec<PathBuf>,
    target: PathBuf,
    tokenizer: String,
    special: VocabTuple,
    text_field: String,
    filter: Option<(String, String)>,
    lines: bool,
    detokenizer: Option<&str>,
    no_eos: bool,
    hold_out: Option<(f64, bool)>,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let tokenizer = Tokenizer::from_json(&tokenizer, vocab(special)).map_err(to_py)?;
    let options = options(text_field, filter, lines, detokenizer, no_eos)?;
    let mut raised = None;
    let outcome = py.detach(|| {
        run(
            &inputs,
            &options,
            hold_out,
            &tokenizer,
            &target,
            threads,
            &mut |now| {
                Python::attach(|py| {
                    let told = py.check_signals().and_then(|()| match &progress {
                        Some(f) => f.call1(py, (now.read, now.total, now.tokens)).map(drop),
                        None => Ok(()),
                    });
                    raised = told.err();
                    raised.is_none()
                })
            },
        )
    });
    match outcome.map_err(to_py)? {
        Some(manifest) => Ok(serde_json::to_string(&manifest).expect("a manifest is plain JSON")),
        None => Err(raised.unwrap_or_else(|| PyKeyboardInterrupt::new_err(""))),
    }
}

/// Calls `each(text)` with every document of a file, in order.
#[pyfunction]
#[pyo3(signature = (path, each, *, text_field, filter, lines))]
fn for_each_document(
    py: Python<'_>,
    path: PathBuf,
    each: Py<PyAny>,
    text_field: String,
    filter: Option<(String, String)>,
    lines: bool,
) -> PyResult<()> {
    let options = options(text_field, filter, lines, None, false)?;
    let mut raised = None;
    let read = py.detach(|| {
        read_documents(&path, &options, &Arc::default(), &mut |text| {
            Python::attach(|py| each.call1(py, (text,)).map(drop)).map_err(|e| {
                raised = Some(e);
                Error::config("each", "", "stopped")
            })
        })
    });
    match raised {
        Some(error) => Err(error),
        None => read.map_err(to_py),
    }
}
