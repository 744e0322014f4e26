//! Fused operations between the matrix products of a layer, over flat arrays.

use bd3lm_core::kernels::accumulate;
use bd3lm_core::kernels::activation::{self, Activation};
use bd3lm_core::kernels::dropout::Dropout;
use bd3lm_core::kernels::norm::{Inputs, Norm};
use bd3lm_core::kernels::rotary::{self, Angles, Columns};
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::arrays::{In, Out, of_one_width};
use crate::errors::to_py;

/// Adds this module's functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(activate, m)?)?;
    m.add_function(wrap_pyfunction!(activate_backward, m)?)?;
    m.add_function(wrap_pyfunction!(dropout_add, m)?)?;
    m.add_function(wrap_pyfunction!(dropout_add_backward, m)?)?;
    m.add_function(wrap_pyfunction!(add_to, m)?)?;
    m.add_function(wrap_pyfunction!(normalise, m)?)?;
    m.add_function(wrap_pyfunction!(normalise_backward, m)?)?;
    m.add_function(wrap_pyfunction!(rotate_heads, m)?)?;
    m.add_function(wrap_pyfunction!(move_heads, m)?)
}

/// Fills `out`.
#[pyfunction]
fn activate(
    py: Python<'_>,
    activation: &str,
    x: In<'_>,
    bias: PyReadonlyArray1<'_, f32>,
    out: Out<'_>,
    threads: usize,
) -> PyResult<()> {
    let (f, bias) = (
        Activation::parse(activation).map_err(to_py)?,
        bias.as_slice()?,
    );
    of_one_width!(
        py,
        [x],
        [out],
        activation::activate(f, x, bias, out, threads)
    )
}

/// Fills `out` and `d_bias`; `d`, the gradient of the result, becomes that of `x`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn activate_backward(
    py: Python<'_>,
    activation: &str,
    x: In<'_>,
    bias: PyReadonlyArray1<'_, f32>,
    d: Out<'_>,
    out: Out<'_>,
    mut d_bias: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let (f, bias) = (
        Activation::parse(activation).map_err(to_py)?,
        bias.as_slice()?,
    );
    let d_bias = d_bias.as_slice_mut()?;
    of_one_width!(
        py,
        [x],
        [d, out],
        activation::activate_backward(f, (x, bias), d, out, d_bias, threads)
    )
}

/// Fills `out` with h + dropout(x + bias).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn dropout_add(
    py: Python<'_>,
    h: PyReadonlyArray1<'_, f32>,
    x: In<'_>,
    bias: PyReadonlyArray1<'_, f32>,
    seed: u64,
    p: f64,
    mut out: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let dropout = Dropout::new(seed, p).map_err(to_py)?;
    let (h, bias, out) = (h.as_slice()?, bias.as_slice()?, out.as_slice_mut()?);
    of_one_width!(py, [x], [], dropout.add(h, x, bias, out, threads))
}

/// Fills `d_x` and `d_bias` with the gradients of the dropout's input and bias.
#[pyfunction]
fn dropout_add_backward(
    py: Python<'_>,
    d_out: PyReadonlyArray1<'_, f32>,
    seed: u64,
    p: f64,
    d_x: Out<'_>,
    mut d_bias: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let dropout = Dropout::new(seed, p).map_err(to_py)?;
    let (d_out, d_bias) = (d_out.as_slice()?, d_bias.as_slice_mut()?);
    of_one_width!(py, [], [d_x], dropout.backward(d_out, d_x, d_bias, threads))
}

/// Adds `x` to `total`, or copies it there if it is the first.
#[pyfunction]
fn add_to(
    py: Python<'_>,
    mut total: PyReadwriteArray1<'_, f32>,
    x: In<'_>,
    first: bool,
    threads: usize,
) -> PyResult<()> {
    let total = total.as_slice_mut()?;
    of_one_width!(py, [x], [], accumulate::add_to(total, x, first, threads))
}

/// Fills `out` and `moments`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn normalise(
    py: Python<'_>,
    x: PyReadonlyArray1<'_, f32>,
    weight: PyReadonlyArray1<'_, f32>,
    bias: PyReadonlyArray1<'_, f32>,
    centred: bool,
    eps: f32,
    out: Out<'_>,
    mut moments: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let (x, moments) = (x.as_slice()?, moments.as_slice_mut()?);
    let norm = Norm {
        weight: weight.as_slice()?,
        bias: bias.as_slice()?,
        centred,
        eps,
    };
    of_one_width!(py, [], [out], norm.forward(x, out, moments, threads))
}

/// Fills `d_x`, `d_weight` and `d_bias`; `residual`, the gradient of the residual connection, is
/// added to the first.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn normalise_backward(
    py: Python<'_>,
    d_out: In<'_>,
    x: PyReadonlyArray1<'_, f32>,
    weight: PyReadonlyArray1<'_, f32>,
    centred: bool,
    moments: PyReadonlyArray1<'_, f32>,
    residual: Option<PyReadonlyArray1<'_, f32>>,
    mut d_x: PyReadwriteArray1<'_, f32>,
    mut d_weight: PyReadwriteArray1<'_, f32>,
    mut d_bias: PyReadwriteArray1<'_, f32>,
    threads: usize,
) -> PyResult<()> {
    let (x, weight, moments) = (x.as_slice()?, weight.as_slice()?, moments.as_slice()?);
    let residual = residual.as_ref().map(|x| x.as_slice()).transpose()?;
    let d_x = d_x.as_slice_mut()?;
    let (d_weight, d_bias) = (d_weight.as_slice_mut()?, d_bias.as_slice_mut()?);
    of_one_width!(py, [d_out], [], {
        let inputs = Inputs {
            d_out,
            x,
            weight,
            centred,
            moments,
            residual: residual.unwrap_or_default(),
        };
        inputs.gradients(d_x, d_weight, d_bias, threads)
    })
}

/// Cosines and signed sines [T, Dh], Dh, and whether to rotate back.
#[derive(FromPyObject)]
struct Rope<'py>(
    PyReadonlyArray1<'py, f32>,
    PyReadonlyArray1<'py, f32>,
    usize,
    bool,
);

impl Rope<'_> {
    fn angles(&self) -> PyResult<Angles<'_>> {
        Ok(Angles {
            cos: self.0.as_slice()?,
            sin: self.1.as_slice()?,
            head_width: self.2,
            inverse: self.3,
        })
    }
}

fn columns((width, first): (usize, usize)) -> Columns {
    Columns { width, first }
}

/// Rotates `count` features of every row in place.
///
/// * `place`: features of a row, and the first of those rotated.
#[pyfunction]
fn rotate_heads(
    py: Python<'_>,
    heads: Out<'_>,
    place: (usize, usize),
    count: usize,
    rope: Rope<'_>,
    threads: usize,
) -> PyResult<()> {
    let (place, angles) = (columns(place), rope.angles()?);
    of_one_width!(
        py,
        [],
        [heads],
        rotary::rotate_heads(heads, place, count, angles, threads)
    )
}

/// Copies `count` features of every row from one buffer to another, rotated if there is a rope.
///
/// * `here`, `there`: features of a row, and the first of those moved.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn move_heads(
    py: Python<'_>,
    source: In<'_>,
    here: (usize, usize),
    target: Out<'_>,
    there: (usize, usize),
    count: usize,
    rope: Option<Rope<'_>>,
    threads: usize,
) -> PyResult<()> {
    let (here, there) = (columns(here), columns(there));
    let angles = rope.as_ref().map(Rope::angles).transpose()?;
    of_one_width!(
        py,
        [source],
        [target],
        rotary::move_heads((source, here), (target, there), count, angles, threads)
    )
}
