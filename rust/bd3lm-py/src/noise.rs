//! Schedules, weightings, noise specifications and the noising of rows.

use std::sync::Arc;

use bd3lm_core::data::batch::{self, NoiseBatch};
use bd3lm_core::data::pack::Packing;
use bd3lm_core::data::text::Detokenizer;
use bd3lm_core::noise::schedule::MIN_LEVEL;
use bd3lm_core::noise::{
    NoiseKey, NoiseSettings, NoiseSpec, Schedule, ScheduleSettings, Weighting,
};
use bd3lm_core::{Error, Result};
use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use pythonize::depythonize;

use crate::errors::to_py;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("MIN_LEVEL", MIN_LEVEL)?;
    m.add_class::<PySchedule>()?;
    m.add_class::<PyWeighting>()?;
    m.add_class::<PyNoiseSpec>()?;
    m.add_function(wrap_pyfunction!(names, m)?)?;
    m.add_function(wrap_pyfunction!(noise, m)?)
}

/// All names of one kind: of a schedule, weighting, packing or detokenizer.
#[pyfunction]
fn names(kind: &str) -> PyResult<Vec<&'static str>> {
    let kinds = [
        ("schedule", &Schedule::NAMES[..]),
        ("weighting", &Weighting::NAMES[..]),
        ("packing", &Packing::NAMES[..]),
        ("detokenizer", &Detokenizer::names()[..]),
    ];
    let names = bd3lm_core::error::named("kind", kind, &kinds);
    names.map(<[_]>::to_vec).map_err(to_py)
}

/// A noise schedule.
#[pyclass(name = "Schedule", frozen, module = "bd3lm._core")]
pub struct PySchedule(Schedule);

#[pymethods]
impl PySchedule {
    /// Builds a schedule from its name and its parameters.
    #[new]
    fn new(settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let settings: ScheduleSettings = depythonize(settings)?;
        settings.build().map(PySchedule).map_err(to_py)
    }

    fn mask_prob<'py>(&self, py: Python<'py>, t: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, t, |t| Ok(self.0.mask_prob(unit_interval("t", t)?)))
    }

    fn loss_weight<'py>(&self, py: Python<'py>, t: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, t, |t| Ok(self.0.loss_weight(level(t)?)))
    }

    fn loss_weight_at<'py>(&self, py: Python<'py>, p: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, p, |p| self.0.loss_weight_at(unit_interval("p", p)?))
    }

    fn inverse<'py>(&self, py: Python<'py>, p: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, p, |p| self.0.inverse(unit_interval("p", p)?))
    }
}

fn unit_interval(name: &'static str, x: f64) -> Result<f64> {
    match (0.0..=1.0).contains(&x) {
        true => Ok(x),
        false => Err(Error::config(name, x, "in [0, 1]")),
    }
}

fn level(t: f64) -> Result<f64> {
    match 0.0 < t && t <= 1.0 {
        true => Ok(t),
        false => Err(Error::config("t", t, "in (0, 1]")),
    }
}

type Floats<'py> = PyResult<Bound<'py, PyArray1<f64>>>;

fn map<'py>(
    py: Python<'py>,
    x: PyReadonlyArray1<'py, f64>,
    f: impl Fn(f64) -> Result<f64>,
) -> Floats<'py> {
    let values = x.as_array().iter().map(|x| f(*x)).collect::<Result<_>>();
    Ok(PyArray1::from_vec(py, values.map_err(to_py)?))
}

/// A reweighting of the training loss.
#[pyclass(name = "Weighting", frozen, module = "bd3lm._core")]
pub struct PyWeighting(Weighting);

#[pymethods]
impl PyWeighting {
    #[new]
    fn new(name: &str, k: f64) -> PyResult<Self> {
        Weighting::parse(name, k).map(PyWeighting).map_err(to_py)
    }

    fn at<'py>(
        &self,
        py: Python<'py>,
        schedule: &PySchedule,
        t: PyReadonlyArray1<'py, f64>,
    ) -> Floats<'py> {
        map(py, t, |t| {
            let p = schedule.0.mask_prob(level(t)?);
            Ok(self.0.at(&schedule.0, t, p))
        })
    }
}

/// The noise of a batch.
#[pyclass(name = "NoiseSpec", frozen, module = "bd3lm._core")]
pub struct PyNoiseSpec(pub NoiseSpec);

#[pymethods]
impl PyNoiseSpec {
    /// Builds a specification from its settings, and a factor for each token id where masking goes
    /// by frequency.
    #[new]
    fn new(
        settings: &Bound<'_, PyAny>,
        gamma: Option<PyReadonlyArray1<'_, f32>>,
    ) -> PyResult<Self> {
        let settings: NoiseSettings = depythonize(settings)?;
        let gamma: Option<Arc<[f32]>> = gamma.map(|g| g.as_array().iter().copied().collect());
        settings.build(gamma).map(PyNoiseSpec).map_err(to_py)
    }

    fn check(&self, seq_len: usize, block_size: usize) -> PyResult<()> {
        self.0.check(seq_len, block_size).map_err(to_py)
    }

    fn complementary_weights<'py>(&self, py: Python<'py>, n: usize) -> Floats<'py> {
        let weights = self.0.complementary_weights(n).map_err(to_py)?;
        Ok(PyArray1::from_vec(py, weights))
    }
}

/// (seed, step, first row, rows of the global batch).
pub type Key = (u64, u64, u64, u64);

pub fn noise_key((seed, step, row, rows): Key) -> NoiseKey {
    NoiseKey {
        seed,
        step,
        row,
        rows,
    }
}

/// Noises rows that are already there.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn noise(
    py: Python<'_>,
    spec: &PyNoiseSpec,
    key: Key,
    seq_len: usize,
    block_size: usize,
    x0: PyReadonlyArray1<'_, i64>,
    noisable: PyReadonlyArray1<'_, u8>,
    mut mask: PyReadwriteArray1<'_, u8>,
    mut mask_prob: PyReadwriteArray1<'_, f32>,
    mut weight: PyReadwriteArray1<'_, f32>,
) -> PyResult<()> {
    let (x0, noisable) = (x0.as_slice()?, noisable.as_slice()?);
    let out = NoiseBatch {
        mask: mask.as_slice_mut()?,
        mask_prob: mask_prob.as_slice_mut()?,
        weight: weight.as_slice_mut()?,
    };
    py.detach(|| {
        batch::noise(
            &spec.0,
            noise_key(key),
            seq_len,
            block_size,
            x0,
            noisable,
            out,
        )
    })
    .map_err(to_py)
}
