//! Tokens that Python brings: of data sets in object storage.

use std::ops::Range;

use bd3lm_core::data::store::{Staged, TokenStore, Tokens};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::errors::to_py;

/// A callable that maps runs of tokens, an int64 array of begins and ends, to their ids.
pub struct Elsewhere(pub Py<PyAny>);

/// Ids of runs, one run after the other.
pub enum Copies<'py> {
    U16(PyReadonlyArray1<'py, u16>),
    I32(PyReadonlyArray1<'py, i32>),
}

/// Runs as Python takes them: begin and end of each.
pub fn runs_array<'py>(
    py: Python<'py>,
    runs: &[Range<usize>],
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let flat = runs
        .iter()
        .flat_map(|run| [run.start as i64, run.end as i64]);
    PyArray1::from_iter(py, flat).reshape([runs.len(), 2])
}

impl Elsewhere {
    /// Another reference to the same callable.
    pub fn clone_ref(&self, py: Python<'_>) -> Self {
        Elsewhere(self.0.clone_ref(py))
    }

    /// Reads the ids of runs.
    ///
    /// # Errors
    /// Those of the callable.
    pub fn read<'py>(&self, py: Python<'py>, runs: &[Range<usize>]) -> PyResult<Copies<'py>> {
        let ids = self.0.bind(py).call1((runs_array(py, runs)?,))?;
        if let Ok(ids) = ids.cast::<PyArray1<u16>>() {
            return Ok(Copies::U16(ids.try_readonly()?));
        }
        let ids = ids.cast::<PyArray1<i32>>();
        let ids = ids.map_err(|_| PyTypeError::new_err("ids must be uint16 or int32"))?;
        Ok(Copies::I32(ids.try_readonly()?))
    }
}

impl Copies<'_> {
    /// The same ids, found by the places of their runs.
    ///
    /// # Errors
    /// As [`Staged::new`].
    pub fn staged(&self, store: &TokenStore, runs: &[Range<usize>]) -> PyResult<Staged<'_>> {
        let ids = match self {
            Copies::U16(ids) => Tokens::U16(ids.as_slice()?),
            Copies::I32(ids) => Tokens::I32(ids.as_slice()?),
        };
        Staged::new(store, runs, ids).map_err(to_py)
    }
}
