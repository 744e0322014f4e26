//! Packing plans and batches.

use pyo3::prelude::*;

/// Adds this module's classes and functions to `_core`.
pub fn register(_m: &Bound<'_, PyModule>) -> PyResult<()> {
    Ok(())
}
