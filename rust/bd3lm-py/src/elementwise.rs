//! GELU and dropout over flat arrays.

use bd3lm_core::elementwise::{self, Dropout};
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::errors::to_py;

/// Adds this module's functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(gelu, m)?)?;
    m.add_function(wrap_pyfunction!(gelu_backward, m)?)?;
    m.add_function(wrap_pyfunction!(dropout_add, m)?)?;
    m.add_function(wrap_pyfunction!(dropout_add_backward, m)?)
}

/// Numbers in either width; bf16 comes as the bits in an int16 array, for NumPy has no bf16.
#[derive(FromPyObject)]
enum In<'py> {
    F32(PyReadonlyArray1<'py, f32>),
    Bf16(PyReadonlyArray1<'py, i16>),
}

/// As [`In`], to be written.
#[derive(FromPyObject)]
pub enum Out<'py> {
    F32(PyReadwriteArray1<'py, f32>),
    Bf16(PyReadwriteArray1<'py, i16>),
}

fn mixed() -> PyErr {
    PyTypeError::new_err("the arrays must all be float32 or all bf16 bits")
}

/// Fills `out`.
#[pyfunction]
fn gelu(py: Python<'_>, x: In<'_>, out: Out<'_>, threads: usize) -> PyResult<()> {
    match (x, out) {
        (In::F32(x), Out::F32(mut out)) => {
            let (x, out) = (x.as_slice()?, out.as_slice_mut()?);
            py.detach(|| elementwise::gelu(x, out, threads))
        }
        (In::Bf16(x), Out::Bf16(mut out)) => {
            let (x, out) = (x.as_slice()?, out.as_slice_mut()?);
            py.detach(|| elementwise::gelu(x, out, threads))
        }
        _ => return Err(mixed()),
    }
    .map_err(to_py)
}

/// Fills `d_x`.
#[pyfunction]
fn gelu_backward(
    py: Python<'_>,
    x: In<'_>,
    d_out: In<'_>,
    d_x: Out<'_>,
    threads: usize,
) -> PyResult<()> {
    match (x, d_out, d_x) {
        (In::F32(x), In::F32(d_out), Out::F32(mut d_x)) => {
            let (x, d_out, d_x) = (x.as_slice()?, d_out.as_slice()?, d_x.as_slice_mut()?);
            py.detach(|| elementwise::gelu_backward(x, d_out, d_x, threads))
        }
        (In::Bf16(x), In::Bf16(d_out), Out::Bf16(mut d_x)) => {
            let (x, d_out, d_x) = (x.as_slice()?, d_out.as_slice()?, d_x.as_slice_mut()?);
            py.detach(|| elementwise::gelu_backward(x, d_out, d_x, threads))
        }
        _ => return Err(mixed()),
    }
    .map_err(to_py)
}

/// Fills `out` with h + dropout(x).
#[pyfunction]
fn dropout_add(
    py: Python<'_>,
    h: PyReadonlyArray1<'_, f32>,
    x: In<'_>,
    seed: u64,
    p: f64,
    mut out: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let dropout = Dropout::new(seed, p).map_err(to_py)?;
    let (h, out) = (h.as_slice()?, out.as_slice_mut()?);
    match x {
        In::F32(x) => {
            let x = x.as_slice()?;
            py.detach(|| dropout.add(h, x, out, threads))
        }
        In::Bf16(x) => {
            let x = x.as_slice()?;
            py.detach(|| dropout.add(h, x, out, threads))
        }
    }
    .map_err(to_py)
}

/// Fills `d_x` with the gradient that reaches what was dropped from.
#[pyfunction]
fn dropout_add_backward(
    py: Python<'_>,
    d_out: PyReadonlyArray1<'_, f32>,
    seed: u64,
    p: f64,
    d_x: Out<'_>,
    threads: usize,
) -> PyResult<()> {
    let dropout = Dropout::new(seed, p).map_err(to_py)?;
    let d_out = d_out.as_slice()?;
    match d_x {
        Out::F32(mut d_x) => {
            let d_x = d_x.as_slice_mut()?;
            py.detach(|| dropout.backward(d_out, d_x, threads))
        }
        Out::Bf16(mut d_x) => {
            let d_x = d_x.as_slice_mut()?;
            py.detach(|| dropout.backward(d_out, d_x, threads))
        }
    }
    .map_err(to_py)
}
