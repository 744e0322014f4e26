//! CPU attention over raw pointers: NumPy has no bf16, so tensors arrive as addresses.
//!
//! The caller keeps the tensors alive during the call. The core checks shapes, strides and dtypes
//! before it follows a pointer.

use bd3lm_core::cpu::{Isa, threads};
use bd3lm_core::kernels::attention::{self, Backward, Dtype, Forward, LogSumExp, Mask, Options};
use bd3lm_core::kernels::attention::{Ranges, Tensor};
use bd3lm_core::{Error, Result};
use pyo3::prelude::*;

use crate::errors::to_py;

/// Runs all kernels on the threads of the OpenMP runtime whose `GOMP_parallel` is at the address.
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
    fn tensor(self) -> Result<Tensor> {
        Ok(Tensor {
            ptr: self.0 as *mut u8,
            dtype: Dtype::parse(&self.3)?,
            shape: self.1,
            strides: self.2,
        })
    }
}

impl MaskArg {
    /// # Safety
    /// The addresses hold as many int32 as `self.1` says, unchanged for as long as `'a`.
    unsafe fn mask<'a>(&self) -> Result<Mask<'a>> {
        let slice = |address: usize| -> Result<&'a [i32]> {
            if self.1 == 0 {
                return Ok(&[]);
            }
            if address == 0 || !address.is_multiple_of(align_of::<i32>()) {
                let given = format!("address {address}");
                return Err(Error::config("mask", given, "aligned to int32"));
            }
            if self.1 > isize::MAX as usize / size_of::<i32>() {
                return Err(Error::config("mask", self.1, "within memory"));
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
    fn options(self) -> Result<Options> {
        Ok(Options {
            threads: self.0,
            isa: self.1.as_deref().map(Isa::parse).transpose()?,
            scale: self.2,
        })
    }
}

/// # Safety
/// As [`MaskArg::mask`].
unsafe fn forward_args<'a>(
    [q, k, v, out]: [TensorArg; 4],
    mask: &MaskArg,
    lse: usize,
    options: OptionsArg,
) -> Result<Forward<'a>> {
    Ok(Forward {
        q: q.tensor()?,
        k: k.tensor()?,
        v: v.tensor()?,
        // SAFETY: by the contract.
        mask: unsafe { mask.mask()? },
        out: out.tensor()?,
        lse: LogSumExp(lse as *mut f32),
        options: options.options()?,
    })
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
    // SAFETY: the caller keeps the four arrays of the mask alive during this call.
    let args = unsafe { forward_args([q, k, v, out], &mask, lse, options) }.map_err(to_py)?;
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
    let args = || -> Result<Backward<'_>> {
        Ok(Backward {
            // SAFETY: the caller keeps the four arrays of the mask alive during this call.
            forward: unsafe { forward_args([q, k, v, out], &mask, lse, options)? },
            d_out: d_out.tensor()?,
            dq: dq.tensor()?,
            dk: dk.tensor()?,
            dv: dv.tensor()?,
        })
    };
    let args = args().map_err(to_py)?;
    // SAFETY: the caller keeps the tensors alive during this call, and made the gradients for
    // it; their shapes and strides are checked.
    py.detach(|| unsafe { attention::backward(&args) })
        .map_err(to_py)
}

/// Instruction sets that the attention kernel can use here, best last.
#[pyfunction]
fn attention_isas() -> Vec<&'static str> {
    let available = Isa::ALL.into_iter().filter(|(_, isa)| isa.is_available());
    available.map(|(name, _)| name).collect()
}

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(use_openmp, m)?)?;
    m.add_function(wrap_pyfunction!(attention_forward, m)?)?;
    m.add_function(wrap_pyfunction!(attention_backward, m)?)?;
    m.add_function(wrap_pyfunction!(attention_isas, m)?)?;
    Ok(())
}
