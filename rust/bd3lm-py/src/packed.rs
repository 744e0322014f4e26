//! Prepacked linear layers, and a decoder layer made of them.

use std::sync::Arc;

use bd3lm_core::kernels::packed_layer::{Block, Cache, Mlp, Norm};
use bd3lm_core::kernels::packed_linear::{Epilogue, Packed};
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::errors::to_py;

/// Adds this module's classes to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PackedLinear>()?;
    m.add_class::<PackedBlock>()
}

/// A prepacked weight matrix and its bias.
#[pyclass(frozen, module = "bd3lm._core")]
struct PackedLinear(Arc<Packed>);

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
            .map(|packed| Self(Arc::new(packed)))
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
        py.detach(|| self.0.apply(x, out, Epilogue::Write, threads))
            .map_err(to_py)
    }
}

/// Weight, bias, whether it is a LayerNorm, epsilon.
type NormOf<'py> = (
    PyReadonlyArray1<'py, f32>,
    Option<PyReadonlyArray1<'py, f32>>,
    bool,
    f32,
);

fn norm((weight, bias, centred, eps): &NormOf<'_>) -> PyResult<Norm> {
    let bias = bias.as_ref().map(|b| b.as_slice()).transpose()?;
    Norm::new(weight.as_slice()?, bias, *centred, *eps).map_err(to_py)
}

/// A layer of the Transformer, before and after attention; the matrices are shared.
#[pyclass(frozen, module = "bd3lm._core")]
struct PackedBlock(Block);

#[pymethods]
impl PackedBlock {
    #[new]
    #[pyo3(signature = (*, norm1, qkv, q_norm, k_norm, out, norm2, up, mlp, down, head_width))]
    #[expect(clippy::too_many_arguments, reason = "named in Python")]
    fn new(
        norm1: NormOf<'_>,
        qkv: &PackedLinear,
        q_norm: Option<NormOf<'_>>,
        k_norm: Option<NormOf<'_>>,
        out: &PackedLinear,
        norm2: NormOf<'_>,
        up: &PackedLinear,
        mlp: &str,
        down: &PackedLinear,
        head_width: usize,
    ) -> PyResult<Self> {
        let qk_norm = match (q_norm, k_norm) {
            (Some(q), Some(k)) => Some((norm(&q)?, norm(&k)?)),
            _ => None,
        };
        let block = Block {
            norm1: norm(&norm1)?,
            qkv: qkv.0.clone(),
            qk_norm,
            out: out.0.clone(),
            norm2: norm(&norm2)?,
            up: up.0.clone(),
            mlp: Mlp::parse(mlp).map_err(to_py)?,
            down: down.0.clone(),
            head_width,
        };
        block.checked().map(Self).map_err(to_py)
    }

    /// Projects the residual stream `h` [B, T, D] to queries `q` [B, T, H·Dh], and to keys and
    /// values in the cache, each [B, Hkv, capacity, Dh], from position `first` on; all flat.
    #[expect(clippy::too_many_arguments, reason = "buffers")]
    fn project(
        &self,
        py: Python<'_>,
        h: PyReadonlyArray1<'_, f32>,
        cos: PyReadonlyArray1<'_, f32>,
        sin: PyReadonlyArray1<'_, f32>,
        mut q: PyReadwriteArray1<'_, f32>,
        mut k: PyReadwriteArray1<'_, f32>,
        mut v: PyReadwriteArray1<'_, f32>,
        capacity: usize,
        first: usize,
        threads: usize,
    ) -> PyResult<()> {
        let (h, rope) = (h.as_slice()?, (cos.as_slice()?, sin.as_slice()?));
        let (q, k, v) = (q.as_slice_mut()?, k.as_slice_mut()?, v.as_slice_mut()?);
        py.detach(|| {
            let cache = Cache {
                k,
                v,
                capacity,
                first,
            };
            self.0.project(h, rope, q, cache, threads)
        })
        .map_err(to_py)
    }

    /// Adds projection and MLP of attention's output [M, H·Dh] to the residual stream `h` [M, D];
    /// both flat.
    fn finish(
        &self,
        py: Python<'_>,
        attended: PyReadonlyArray1<'_, f32>,
        mut h: PyReadwriteArray1<'_, f32>,
        threads: usize,
    ) -> PyResult<()> {
        let (attended, h) = (attended.as_slice()?, h.as_slice_mut()?);
        py.detach(|| self.0.finish(attended, h, threads))
            .map_err(to_py)
    }
}
