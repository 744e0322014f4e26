//! Linear layers laid out once for many products.

use bd3lm_core::linear::Packed;
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::errors::to_py;

/// Adds this module's class to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PackedLinear>()
}

/// A weight matrix and its bias, ready to be multiplied with.
#[pyclass(frozen, module = "bd3lm._core")]
struct PackedLinear(Packed);

#[pymethods]
impl PackedLinear {
    #[new]
    fn new(
        py: Python<'_>,
        weight: PyReadonlyArray1<'_, f32>,
        bias: Option<PyReadonlyArray1<'_, f32>>,
        inputs: usize,
        bf16: bool,
    ) -> PyResult<Self> {
        let weight = weight.as_slice()?;
        let bias = bias.as_ref().map(|b| b.as_slice()).transpose()?;
        py.detach(|| Packed::new(weight, bias, inputs, bf16))
            .map(Self)
            .map_err(to_py)
    }

    /// Fills `out` [M, N] with the products of rows `x` [M, K], both flat.
    fn apply(
        &self,
        py: Python<'_>,
        x: PyReadonlyArray1<'_, f32>,
        mut out: PyReadwriteArray1<'_, f32>,
        threads: usize,
    ) -> PyResult<()> {
        let (x, out) = (x.as_slice()?, out.as_slice_mut()?);
        py.detach(|| self.0.apply(x, out, threads)).map_err(to_py)
    }
}
