//! CPU attention over raw pointers: NumPy has no bf16, so tensors arrive as addresses.
//!
//! The caller keeps the tensors alive during the call; everything that can be told from shapes,
//! strides and dtypes is checked by the core before a pointer is followed.

use crate::errors::to_py;
use bd3lm_core::cpu::{Isa, threads};
use bd3lm_core::kernels::attention::{self, Backward, Dtype, Forward, LogSumExp, Mask, Options};
use bd3lm_core::kernels::attention::{Ranges, Tensor};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Has all kernels use the threads of the OpenMP runtime whose `GOMP_parallel` is at the address.
#[pyfunction]
fn use_openmp(address: usize) {
    // SAFETY: the caller looked the address up by that name, in a library that stays.
    unsafe { threads::use_openmp(address) };
}

/// (address, shape [B, H, T, Dh], strides in elements, dtype: "f32" or "bf16").
#[derive(FromPyObject)]
struct TensorArg(usize, [usize; 4], [isize; 4], String);

/// (addresses of clean_lo, clean_hi, noised_lo, noised_hi; their length; first clean key).
#[derive(FromPyObject)]
struct MaskArg([usize; 4], usize, usize);

/// (threads, instruction set or None, factor of q . k).
#[derive(FromPyObject)]
struct OptionsArg(usize, Option<String>, f32);

impl TensorArg {
    fn tensor(self) -> PyResult<Tensor> {
        let dtype = match self.3.as_str() {
            "f32" => Dtype::F32,
            "bf16" => Dtype::Bf16,
            other => return Err(PyValueError::new_err(format!("dtype {other}: f32 or bf16"))),
        };
        Ok(Tensor {
            ptr: self.0 as *mut u8,
            dtype,
            shape: self.1,
            strides: self.2,
        })
    }
}

impl MaskArg {
    /// # Safety
    /// The addresses hold as many int32 as `self.1` says, unchanged for as long as `'a`.
    unsafe fn mask<'a>(&self) -> PyResult<Mask<'a>> {
        let slice = |address: usize| -> PyResult<&'a [i32]> {
            if self.1 == 0 {
                return Ok(&[]);
            }
            if address == 0 || !address.is_multiple_of(align_of::<i32>()) {
                return Err(PyValueError::new_err(format!("mask at address {address}")));
            }
            // SAFETY: not null, aligned, and as long as the caller vouches for.
            Ok(unsafe { std::slice::from_raw_parts(address as *const i32, self.1) })
        };
        let [clean_lo, clean_hi, noised_lo, noised_hi] = self.0;
        let ranges = Ranges {
            clean_lo: slice(clean_lo)?,
            clean_hi: slice(clean_hi)?,
            noised_lo: slice(noised_lo)?,
            noised_hi: slice(noised_hi)?,
        };
        Ok(Mask {
            ranges,
            clean_offset: self.2,
        })
    }
}

impl OptionsArg {
    fn options(self) -> PyResult<Options> {
        let isa = match self.1.as_deref() {
            None => None,
            Some("portable") => Some(Isa::Portable),
            Some("avx2") => Some(Isa::Avx2),
            Some("avx512") => Some(Isa::Avx512),
            Some("avx512bf16") => Some(Isa::Avx512Bf16),
            Some(other) => {
                let message = format!("isa {other}: portable, avx2, avx512 or avx512bf16");
                return Err(PyValueError::new_err(message));
            }
        };
        Ok(Options {
            threads: self.0,
            isa,
            scale: self.2,
        })
    }
}

/// Attention of q over k, v: fills `out` and `lse` (float32, its address; B * H * Tq values).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn attention_forward(
    py: Python<'_>,
    q: TensorArg,
    k: TensorArg,
    v: TensorArg,
    mask: MaskArg,
    out: TensorArg,
    lse: usize,
    options: OptionsArg,
) -> PyResult<()> {
    let args = Forward {
        q: q.tensor()?,
        k: k.tensor()?,
        v: v.tensor()?,
        // SAFETY: the caller keeps the four arrays alive during this call.
        mask: unsafe { mask.mask()? },
        out: out.tensor()?,
        lse: LogSumExp(lse as *mut f32),
        options: options.options()?,
    };
    // SAFETY: the caller keeps the tensors alive during this call, and made `out` and `lse` for
    // it; their shapes and strides are checked.
    py.detach(|| unsafe { attention::forward(&args) })
        .map_err(to_py)
}

/// Gradients of `attention_forward`: fills `dq`, `dk` and `dv`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn attention_backward(
    py: Python<'_>,
    q: TensorArg,
    k: TensorArg,
    v: TensorArg,
    mask: MaskArg,
    out: TensorArg,
    lse: usize,
    d_out: TensorArg,
    dq: TensorArg,
    dk: TensorArg,
    dv: TensorArg,
    options: OptionsArg,
) -> PyResult<()> {
    let forward = Forward {
        q: q.tensor()?,
        k: k.tensor()?,
        v: v.tensor()?,
        // SAFETY: the caller keeps the four arrays alive during this call.
        mask: unsafe { mask.mask()? },
        out: out.tensor()?,
        lse: LogSumExp(lse as *mut f32),
        options: options.options()?,
    };
    let args = Backward {
        forward,
        d_out: d_out.tensor()?,
        dq: dq.tensor()?,
        dk: dk.tensor()?,
        dv: dv.tensor()?,
    };
    // SAFETY: the caller keeps the tensors alive during this call, and made the gradients for
    // it; their shapes and strides are checked.
    py.detach(|| unsafe { attention::backward(&args) })
        .map_err(to_py)
}

/// Instruction sets that the attention kernel can use here, best last.
#[pyfunction]
fn attention_isas() -> Vec<&'static str> {
    [
        (Isa::Portable, "portable"),
        (Isa::Avx2, "avx2"),
        (Isa::Avx512, "avx512"),
        (Isa::Avx512Bf16, "avx512bf16"),
    ]
    .into_iter()
    .filter(|(isa, _)| isa.is_available())
    .map(|(_, name)| name)
    .collect()
}

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(use_openmp, m)?)?;
    m.add_function(wrap_pyfunction!(attention_forward, m)?)?;
    m.add_function(wrap_pyfunction!(attention_backward, m)?)?;
    m.add_function(wrap_pyfunction!(attention_isas, m)?)?;
    Ok(())
}
