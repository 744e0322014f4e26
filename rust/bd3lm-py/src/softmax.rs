//! Cross-entropy of logits, in place.

use bd3lm_core::softmax;
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::errors::to_py;

/// Adds this module's functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cross_entropy, m)?)
}

/// Logits in either width; bf16 comes as the bits in an int16 array, for NumPy has no bf16.
#[derive(FromPyObject)]
enum Logits<'py> {
    F32(PyReadwriteArray1<'py, f32>),
    Bf16(PyReadwriteArray1<'py, i16>),
}

/// Fills `nll`; with weights, `logits` become the gradient.
#[pyfunction]
fn cross_entropy(
    py: Python<'_>,
    logits: Logits<'_>,
    target: PyReadonlyArray1<'_, i64>,
    weight: Option<PyReadonlyArray1<'_, f32>>,
    mask_id: usize,
    mut nll: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let target = target.as_slice()?;
    let weight = weight.as_ref().map(|w| w.as_slice()).transpose()?;
    let nll = nll.as_slice_mut()?;
    match logits {
        Logits::F32(mut x) => {
            let x = x.as_slice_mut()?;
            py.detach(|| softmax::cross_entropy(x, target, weight, mask_id, nll, threads))
        }
        Logits::Bf16(mut x) => {
            let x = x.as_slice_mut()?;
            py.detach(|| softmax::cross_entropy(x, target, weight, mask_id, nll, threads))
        }
    }
    .map_err(to_py)
}
