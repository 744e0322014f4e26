//! Python bindings of `bd3lm-core`: convert, release the GIL, map errors. No algorithm.

mod arrays;
mod attention;
mod elsewhere;
mod errors;
mod fused;
mod interrupt;
mod logits;
mod noise;
mod packed;
mod rows;
mod store;

use pyo3::prelude::*;

/// The compiled part of bd3lm.
#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    noise::register(m)?;
    store::register(m)?;
    rows::register(m)?;
    attention::register(m)?;
    logits::register(m)?;
    fused::register(m)?;
    packed::register(m)
}
