//! Cross-entropy of logits, in place, and draws from them.

use bd3lm_core::kernels::{categorical, cross_entropy as kernel};
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::arrays::{Out, of_one_width};
use crate::errors::to_py;

/// Adds this module's functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(cross_entropy, m)?)?;
    m.add_function(wrap_pyfunction!(distribution, m)?)?;
    m.add_function(wrap_pyfunction!(draw, m)?)
}

/// Fills `nll` and `d_bias`; with weights, `logits` become the gradient.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn cross_entropy(
    py: Python<'_>,
    logits: Out<'_>,
    bias: PyReadonlyArray1<'_, f32>,
    target: PyReadonlyArray1<'_, i64>,
    weight: Option<PyReadonlyArray1<'_, f32>>,
    mask_id: Option<usize>,
    mut nll: PyReadwriteArray1<'_, f32>,
    mut d_bias: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let targets = kernel::Targets {
        ids: target.as_slice()?,
        weight: weight.as_ref().map(|w| w.as_slice()).transpose()?,
        mask_id,
    };
    let (bias, nll) = (bias.as_slice()?, nll.as_slice_mut()?);
    let d_bias = d_bias.as_slice_mut()?;
    of_one_width!(
        py,
        [],
        [logits],
        kernel::cross_entropy(logits, bias, targets, nll, d_bias, threads)
    )
}

/// Fills `token` and `log_p`.
#[pyfunction]
#[pyo3(signature = (logits, shaped, uniform, token, log_p, *, temperature, top_k, top_p, forbidden,
    threads))]
#[allow(clippy::too_many_arguments)]
fn draw(
    py: Python<'_>,
    logits: PyReadonlyArray1<'_, f32>,
    shaped: Option<PyReadonlyArray1<'_, f32>>,
    uniform: PyReadonlyArray1<'_, f64>,
    mut token: PyReadwriteArray1<'_, i64>,
    mut log_p: PyReadwriteArray1<'_, f64>,
    temperature: f32,
    top_k: Option<usize>,
    top_p: f64,
    forbidden: Vec<usize>,
    threads: usize,
) -> PyResult<()> {
    let (logits, uniform) = (logits.as_slice()?, uniform.as_slice()?);
    let shaped = shaped.as_ref().map(|s| s.as_slice()).transpose()?;
    let (token, log_p) = (token.as_slice_mut()?, log_p.as_slice_mut()?);
    let shaping = categorical::Shaping {
        temperature,
        top_k,
        top_p,
        forbidden: &forbidden,
    };
    py.detach(|| categorical::draw(logits, shaped, uniform, shaping, token, log_p, threads))
        .map_err(to_py)
}

/// Multiples of the probabilities that [`draw`] draws from, [R, V], and their sums (see
/// `bd3lm_core::kernels::categorical`).
#[pyfunction]
#[pyo3(signature = (logits, mass, total, *, temperature, top_k, top_p, forbidden, threads))]
#[allow(clippy::too_many_arguments)]
fn distribution(
    py: Python<'_>,
    logits: PyReadonlyArray1<'_, f32>,
    mut mass: PyReadwriteArray1<'_, f32>,
    mut total: PyReadwriteArray1<'_, f64>,
    temperature: f32,
    top_k: Option<usize>,
    top_p: f64,
    forbidden: Vec<usize>,
    threads: usize,
) -> PyResult<()> {
    let (logits, mass, total) = (
        logits.as_slice()?,
        mass.as_slice_mut()?,
        total.as_slice_mut()?,
    );
    let shaping = categorical::Shaping {
        temperature,
        top_k,
        top_p,
        forbidden: &forbidden,
    };
    py.detach(|| categorical::distribution(logits, shaping, mass, total, threads))
        .map_err(to_py)
}
