//! Flat arrays of float32 or of bf16 bits.

use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

/// Numbers in either width; bf16 comes as the bits in an int16 array, for NumPy has no bf16.
pub enum In<'py> {
    F32(PyReadonlyArray1<'py, f32>),
    Bf16(PyReadonlyArray1<'py, i16>),
}

/// Writable form of [`In`].
pub enum Out<'py> {
    F32(PyReadwriteArray1<'py, f32>),
    Bf16(PyReadwriteArray1<'py, i16>),
}

fn neither() -> PyErr {
    PyTypeError::new_err("an array must be of float32 or of bf16 bits in int16, of one dimension")
}

// A derived `extract` formats the error of float32 before it tries bf16, which takes 10 µs.
impl<'py> FromPyObject<'_, 'py> for In<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.cast::<PyArray1<f32>>() {
            return Ok(In::F32(array.try_readonly()?));
        }
        let array = object.cast::<PyArray1<i16>>().map_err(|_| neither())?;
        Ok(In::Bf16(array.try_readonly()?))
    }
}

impl<'py> FromPyObject<'_, 'py> for Out<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.cast::<PyArray1<f32>>() {
            return Ok(Out::F32(array.try_readwrite()?));
        }
        let array = object.cast::<PyArray1<i16>>().map_err(|_| neither())?;
        Ok(Out::Bf16(array.try_readwrite()?))
    }
}

/// Calls a function without the GIL, on slices that are all of one of the two widths.
macro_rules! of_one_width {
    ($py:ident, [$($input:ident),*], [$($output:ident),*], $call:expr) => {
        match ($($input,)* $($output,)*) {
            ($(In::F32($input),)* $(Out::F32(mut $output),)*) => {
                $(let $input = $input.as_slice()?;)*
                $(let $output = $output.as_slice_mut()?;)*
                $py.detach(|| $call)
            }
            ($(In::Bf16($input),)* $(Out::Bf16(mut $output),)*) => {
                $(let $input = $input.as_slice()?;)*
                $(let $output = $output.as_slice_mut()?;)*
                $py.detach(|| $call)
            }
            #[allow(unreachable_patterns)] // where there is but one array
            _ => {
                let message = "the arrays must all be float32 or all bf16 bits";
                return Err(pyo3::exceptions::PyTypeError::new_err(message));
            }
        }
        .map_err(crate::errors::to_py)
    };
}
pub(crate) use of_one_width;
