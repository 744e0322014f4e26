//! Python bindings of `bd3lm-core`: convert, release the GIL, map errors. No algorithm.

mod attention;
mod elementwise;
mod errors;
mod linear;
mod noise;
mod rows;
mod softmax;
mod store;

use pyo3::prelude::*;

/// The compiled part of bd3lm.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    noise::register(m)?;
    store::register(m)?;
    rows::register(m)?;
    attention::register(m)?;
    softmax::register(m)?;
    elementwise::register(m)?;
    linear::register(m)?;
    Ok(())
}
