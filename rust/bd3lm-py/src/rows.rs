//! Packing plans and batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bd3lm_core::Error;
use bd3lm_core::data::batch::{self, CleanBatch, NoiseBatch, NoisedBatch};
use bd3lm_core::data::order::Order;
use bd3lm_core::data::pack::{Packing, RowPlan};
use bd3lm_core::data::read_ahead::ReadAhead;
use bd3lm_core::data::store::TokenStore;
use bd3lm_core::noise::NoiseKey;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;

use crate::errors::to_py;
use crate::noise::PyNoiseSpec;
use crate::store::PyTokenStore;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyRowPlan>()?;
    m.add_function(wrap_pyfunction!(row_order, m)?)
}

type Array<'py, T> = Bound<'py, PyArray2<T>>;
/// Ids, what may be noised, documents.
type Gathered<'py> = (Array<'py, i64>, Array<'py, bool>, Option<Array<'py, i32>>);

/// Rows of a data set.
#[pyclass(name = "RowPlan", frozen, module = "bd3lm._core")]
pub struct PyRowPlan {
    store: Arc<TokenStore>,
    plan: RowPlan,
    ahead: ReadAhead,
    /// Batches that were gathered.
    batches: AtomicU64,
    block_size: usize,
    documents: bool,
}

/// The token file is looked at once in so many batches.
const BATCHES_BETWEEN_LOOKS: u64 = 64;

impl PyRowPlan {
    /// Now and then, checks that nobody wrote to the token file.
    fn check_unchanged(&self) -> PyResult<()> {
        let batch = self.batches.fetch_add(1, Ordering::Relaxed);
        if !batch.is_multiple_of(BATCHES_BETWEEN_LOOKS) {
            return Ok(());
        }
        self.store.check_unchanged().map_err(to_py)
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
        if packing != "wrap" && (row_eos || stride.is_some()) {
            let allowed = "goes with wrap where rows have a stride or an EOS of their own";
            return Err(to_py(Error::config("packing", packing, allowed)));
        }
        let packing = match packing {
            "wrap" => Packing::Wrap { row_eos, stride },
            "aligned" => Packing::Aligned,
            "best_fit" => Packing::BestFit,
            _ => {
                let allowed = "must be wrap, aligned or best_fit";
                return Err(to_py(Error::config("packing", packing, allowed)));
            }
        };
        let store = store.0.clone();
        let plan = py
            .detach(|| RowPlan::new(&store, seq_len, block_size, packing, keep_last))
            .map_err(to_py)?;
        Ok(PyRowPlan {
            store,
            plan,
            ahead: ReadAhead::default(),
            batches: AtomicU64::new(0),
            block_size,
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

    /// Clean rows: ids [B, L], what may be noised [B, L], and documents [B, L] unless every row is
    /// full and counts as one. The arrays are made here, in half the time that Python takes.
    fn gather<'py>(
        &self,
        py: Python<'py>,
        rows: PyReadonlyArray1<'py, u64>,
    ) -> PyResult<Gathered<'py>> {
        let rows = rows.as_slice()?;
        let shape = [rows.len(), self.plan.seq_len()];
        let tokens = check_room(shape[0].checked_mul(shape[1]))?;
        let with_documents = self.documents || self.plan.may_pad();
        // SAFETY: `gather` writes all of each, or fails, and then no one sees them.
        let (x0, noisable, doc_ids) = unsafe {
            (
                PyArray2::<i64>::new(py, shape, false),
                PyArray2::<bool>::new(py, shape, false),
                with_documents.then(|| PyArray2::<i32>::new(py, shape, false)),
            )
        };
        // SAFETY: these arrays are new: contiguous, of so many elements, and no one else's. A bool
        // is a byte, and what is written is 0 or 1.
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
        let padded = py
            .detach(|| {
                let read = || batch::gather(store, plan, rows, self.documents, out);
                self.ahead.around(store, plan, rows, read)
            })
            .map_err(to_py)?;
        Ok((x0, noisable, doc_ids.filter(|_| padded || self.documents)))
    }

    /// Writes rows and their noise; returns (noisable tokens, masked tokens, any padding).
    #[allow(clippy::too_many_arguments)]
    fn gather_noised(
        &self,
        py: Python<'_>,
        spec: &PyNoiseSpec,
        seed: u64,
        step: u64,
        first_row: u64,
        num_rows: u64,
        rows: PyReadonlyArray1<'_, u64>,
        mut x0: PyReadwriteArray1<'_, i64>,
        mut noisable: PyReadwriteArray1<'_, u8>,
        mut doc_ids: PyReadwriteArray1<'_, i32>,
        mut xt: PyReadwriteArray1<'_, i64>,
        mut mask: PyReadwriteArray1<'_, u8>,
        mut mask_prob: PyReadwriteArray1<'_, f32>,
        mut weight: PyReadwriteArray1<'_, f32>,
        mut masked: PyReadwriteArray1<'_, i64>,
        mut masked_weight: PyReadwriteArray1<'_, f32>,
    ) -> PyResult<(u64, usize, bool)> {
        let key = NoiseKey {
            seed,
            step,
            row: first_row,
            rows: num_rows,
        };
        let rows = rows.as_slice()?;
        let clean = CleanBatch {
            x0: x0.as_slice_mut()?,
            noisable: noisable.as_slice_mut()?,
            doc_ids: doc_ids.as_slice_mut()?,
        };
        let out = NoisedBatch {
            xt: xt.as_slice_mut()?,
            noise: NoiseBatch {
                mask: mask.as_slice_mut()?,
                mask_prob: mask_prob.as_slice_mut()?,
                weight: weight.as_slice_mut()?,
            },
            masked: masked.as_slice_mut()?,
            masked_weight: masked_weight.as_slice_mut()?,
        };
        self.check_unchanged()?;
        let filled = py
            .detach(|| {
                self.ahead.around(&self.store, &self.plan, rows, || {
                    batch::gather_noised(
                        &self.store,
                        &self.plan,
                        &spec.0,
                        key,
                        rows,
                        self.block_size,
                        self.documents,
                        clean,
                        out,
                    )
                })
            })
            .map_err(to_py)?;
        Ok((filled.noisable, filled.masked, filled.padded))
    }
}

/// Zeros, or Python's `MemoryError`.
fn zeroed(count: usize) -> PyResult<Vec<u64>> {
    let mut values = Vec::new();
    let reserved = values.try_reserve_exact(count);
    reserved.map_err(|_| PyMemoryError::new_err(format!("{count} rows do not fit the memory")))?;
    values.resize(count, 0);
    Ok(values)
}

/// Checks that the arrays of a batch can be allocated, as NumPy's own failure is a panic here.
fn check_room(tokens: Option<usize>) -> PyResult<usize> {
    /// Bytes of the arrays of a batch for each token, at most.
    const TOKEN: usize = 16;
    /// Smaller allocations do not fail.
    const SMALL: usize = 1 << 28;
    let fits = |tokens: &usize| match tokens.checked_mul(TOKEN) {
        Some(bytes) if bytes < SMALL => true,
        Some(bytes) => Vec::<u8>::new().try_reserve_exact(bytes).is_ok(),
        None => false,
    };
    tokens
        .filter(fits)
        .ok_or_else(|| PyMemoryError::new_err("the batch does not fit the memory"))
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
    if !(1..=1 << 63).contains(&num_rows) {
        return Err(to_py(Error::config(
            "num_rows",
            num_rows,
            "must be 1 to 2^63",
        )));
    }
    let mut rows = zeroed(count)?;
    Order::new(seed, num_rows).fill(first, &mut rows);
    Ok(PyArray1::from_vec(py, rows))
}
