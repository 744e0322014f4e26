//! Packing plans and batches.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bd3lm_core::cpu::buffers::reserve;
use bd3lm_core::data::batch::{self, CleanBatch, NoiseBatch, NoisedBatch};
use bd3lm_core::data::order::Order;
use bd3lm_core::data::pack::{Packing, RowPlan};
use bd3lm_core::data::read_ahead::ReadAhead;
use bd3lm_core::data::store::{TokenStore, Tokens};
use bd3lm_core::{Error, Result};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::elsewhere::{Elsewhere, runs_array};
use crate::errors::to_py;
use crate::noise::{Key, PyNoiseSpec, noise_key};
use crate::store::PyTokenStore;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyRowPlan>()?;
    m.add_function(wrap_pyfunction!(row_order, m)?)
}

type Array<'py, T> = Bound<'py, PyArray2<T>>;
/// Ids, noisable flags, document ids.
type Gathered<'py> = (Array<'py, i64>, Array<'py, bool>, Option<Array<'py, i32>>);

/// Rows of a data set.
#[pyclass(name = "RowPlan", frozen, module = "bd3lm._core")]
pub struct PyRowPlan {
    store: Arc<TokenStore>,
    elsewhere: Option<Elsewhere>,
    plan: RowPlan,
    ahead: ReadAhead,
    /// Batches that were gathered.
    batches: AtomicU64,
    documents: bool,
}

/// The token file is looked at once in so many batches.
const BATCHES_BETWEEN_LOOKS: u64 = 64;

impl PyRowPlan {
    /// Checks from time to time that nobody wrote to the token file.
    fn check_unchanged(&self) -> PyResult<()> {
        let batch = self.batches.fetch_add(1, Ordering::Relaxed);
        if !batch.is_multiple_of(BATCHES_BETWEEN_LOOKS) {
            return Ok(());
        }
        self.store.check_unchanged().map_err(to_py)
    }

    /// Runs of tokens that rows are made of. Rows that do not exist have none.
    fn runs_of(&self, rows: &[u64]) -> Vec<Range<usize>> {
        let mut runs = Vec::with_capacity(rows.len());
        for row in rows
            .iter()
            .filter(|row| **row < self.plan.num_rows() as u64)
        {
            let keep = |run| runs.push(run);
            self.plan.spans(&self.store, *row as usize, keep);
        }
        runs
    }

    /// Calls `read` with the store's tokens, or with copies of those of the rows.
    fn with_tokens<R>(
        &self,
        py: Python<'_>,
        rows: &[u64],
        read: impl FnOnce(Tokens<'_>) -> PyResult<R>,
    ) -> PyResult<R> {
        match &self.elsewhere {
            None => read(self.store.tokens()),
            Some(elsewhere) => {
                let runs = self.runs_of(rows);
                let copies = elsewhere.read(py, &runs)?;
                read(Tokens::Staged(&copies.staged(&self.store, &runs)?))
            }
        }
    }
}

#[pymethods]
impl PyRowPlan {
    #[new]
    #[pyo3(signature = (store, *, seq_len, block_size, packing, row_eos, stride, keep_last, documents))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        store: &PyTokenStore,
        seq_len: usize,
        block_size: usize,
        packing: &str,
        row_eos: bool,
        stride: Option<usize>,
        keep_last: bool,
        documents: bool,
    ) -> PyResult<Self> {
        let packing = Packing::parse(packing, row_eos, stride).map_err(to_py)?;
        let (store, elsewhere) = store.parts(py);
        let plan = py
            .detach(|| RowPlan::new(&store, seq_len, block_size, packing, keep_last))
            .map_err(to_py)?;
        Ok(PyRowPlan {
            store,
            elsewhere,
            plan,
            ahead: ReadAhead::default(),
            batches: AtomicU64::new(0),
            documents,
        })
    }

    fn __len__(&self) -> usize {
        self.plan.num_rows()
    }

    #[getter]
    fn may_pad(&self) -> bool {
        self.plan.may_pad()
    }

    #[getter]
    fn num_stream_tokens(&self) -> u64 {
        self.plan.num_stream_tokens()
    }

    /// Runs of tokens that rows are made of, as begin and end [N, 2].
    fn runs<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Array<'py, i64>> {
        runs_array(py, &self.runs_of(rows.as_slice()?))
    }

    /// Clean rows: ids [B, L], noisable flags [B, L], and document ids [B, L] unless every row is
    /// full and counts as one document. Allocating here takes half the time that Python takes.
    fn gather<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Gathered<'py>> {
        let rows = rows.as_slice()?;
        let shape = [rows.len(), self.plan.seq_len()];
        // NumPy's own refusal of an allocation would be a panic.
        let tokens = shape[0].saturating_mul(shape[1]);
        if tokens > 1 << 24 {
            reserve("rows", &mut Vec::<[i64; 2]>::new(), tokens).map_err(to_py)?;
        }
        let with_documents = self.documents || self.plan.may_pad();
        // SAFETY: `gather` writes all of each; where it fails, they are dropped.
        let (x0, noisable, doc_ids) = unsafe {
            (
                PyArray2::<i64>::new(py, shape, false),
                PyArray2::<bool>::new(py, shape, false),
                with_documents.then(|| PyArray2::<i32>::new(py, shape, false)),
            )
        };
        // SAFETY: these arrays are new: contiguous, of so many elements, without other references.
        // A bool is a byte, and `gather` writes 0 or 1.
        let out = unsafe {
            CleanBatch {
                x0: x0.as_slice_mut()?,
                noisable: std::slice::from_raw_parts_mut(noisable.data().cast(), tokens),
                doc_ids: match &doc_ids {
                    Some(ids) => ids.as_slice_mut()?,
                    None => &mut [],
                },
            }
        };
        let (store, plan) = (&self.store, &self.plan);
        self.check_unchanged()?;
        let padded = self.with_tokens(py, rows, |tokens| {
            py.detach(|| {
                let read = || batch::gather(store, tokens, plan, rows, self.documents, out);
                self.ahead.around(store, plan, rows, read)
            })
            .map_err(to_py)
        })?;
        Ok((x0, noisable, doc_ids.filter(|_| padded || self.documents)))
    }

    /// Fills a training batch noised in blocks of S: ids `x0` and `xt` [B, L], `noisable` flags
    /// [B, L], levels `mask_prob` [B, K], and the flat positions and weights of masked tokens, of
    /// which the first so many are written; `doc_ids` [B, L] may be empty where no row pads.
    /// Returns (noisable tokens, masked tokens, any padding).
    #[pyo3(signature = (
        spec, key, rows, block_size, *, x0, noisable, doc_ids, xt, mask_prob, masked, masked_weight
    ))]
    #[allow(clippy::too_many_arguments)]
    fn gather_noised(
        &self,
        py: Python<'_>,
        spec: &PyNoiseSpec,
        key: Key,
        rows: PyReadonlyArray1<'_, u64>,
        block_size: usize,
        mut x0: PyReadwriteArray1<'_, i64>,
        mut noisable: PyReadwriteArray1<'_, u8>,
        mut doc_ids: PyReadwriteArray1<'_, i32>,
        mut xt: PyReadwriteArray1<'_, i64>,
        mut mask_prob: PyReadwriteArray1<'_, f32>,
        mut masked: PyReadwriteArray1<'_, i64>,
        mut masked_weight: PyReadwriteArray1<'_, f32>,
    ) -> PyResult<(u64, usize, bool)> {
        let rows = rows.as_slice()?;
        let (x0, doc_ids) = (x0.as_slice_mut()?, doc_ids.as_slice_mut()?);
        let noisable = noisable.as_slice_mut()?;
        let (xt, mask_prob) = (xt.as_slice_mut()?, mask_prob.as_slice_mut()?);
        let (masked, masked_weight) = (masked.as_slice_mut()?, masked_weight.as_slice_mut()?);
        self.check_unchanged()?;
        let filled = self.with_tokens(py, rows, |tokens| {
            py.detach(|| {
                // These stay here.
                let mut mask = vec![0; x0.len()];
                let mut weight = vec![0.0; mask_prob.len()];
                let clean = CleanBatch {
                    x0,
                    noisable,
                    doc_ids,
                };
                let noise = NoiseBatch {
                    mask: &mut mask,
                    mask_prob,
                    weight: &mut weight,
                };
                let out = NoisedBatch {
                    xt,
                    noise,
                    masked,
                    masked_weight,
                };
                let (store, plan) = (&self.store, &self.plan);
                let (s, documents) = (block_size, self.documents);
                self.ahead.around(store, plan, rows, || {
                    let key = noise_key(key);
                    batch::gather_noised(
                        store, tokens, plan, &spec.0, key, rows, s, documents, clean, out,
                    )
                })
            })
            .map_err(to_py)
        })?;
        Ok((filled.noisable, filled.masked, filled.padded))
    }
}

/// Rows at places `first..first + count` of the endless sequence of shuffled epochs.
#[pyfunction]
fn row_order(
    py: Python<'_>,
    seed: u64,
    num_rows: u64,
    first: u64,
    count: usize,
) -> PyResult<Bound<'_, PyArray1<u64>>> {
    let order = || -> Result<Vec<u64>> {
        let order = Order::new(seed, num_rows)?;
        // A call cannot be interrupted; this many take a fraction of a second.
        if count > 1 << 24 {
            return Err(Error::config("count", count, "at most 2^24"));
        }
        let mut rows = Vec::new();
        reserve("count", &mut rows, count)?;
        rows.resize(count, 0);
        order.fill(first, &mut rows)?;
        Ok(rows)
    };
    Ok(PyArray1::from_vec(py, order().map_err(to_py)?))
}
