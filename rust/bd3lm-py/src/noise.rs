//! Schedules, weightings, noise specifications and the noising of rows.

use std::sync::Arc;

use bd3lm_core::data::batch::{self, NoiseBatch};
use bd3lm_core::noise::schedule::MIN_LEVEL;
use bd3lm_core::noise::{Estimator, NoiseKey, NoiseSpec, Schedule, Weighting};
use bd3lm_core::{Error, Result};
use numpy::{PyArray1, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

use crate::errors::to_py;

/// Adds this module's classes and functions to `_core`.
pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("MIN_LEVEL", MIN_LEVEL)?;
    m.add_class::<PySchedule>()?;
    m.add_class::<PyWeighting>()?;
    m.add_class::<PyNoiseSpec>()?;
    m.add_function(wrap_pyfunction!(noise, m)?)
}

/// A noise schedule.
#[pyclass(name = "Schedule", frozen, module = "bd3lm._core")]
pub struct PySchedule(Schedule);

fn need(name: &'static str, value: Option<f64>) -> Result<f64> {
    value.ok_or_else(|| Error::config(name, "None", "is needed by this schedule"))
}

#[pymethods]
impl PySchedule {
    #[new]
    #[pyo3(signature = (name, *, eps=1e-3, mu=None, sigma=None, mu2=None, sigma2=None, mixture=None, paper_weights=false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        name: &str,
        eps: f64,
        mu: Option<f64>,
        sigma: Option<f64>,
        mu2: Option<f64>,
        sigma2: Option<f64>,
        mixture: Option<f64>,
        paper_weights: bool,
    ) -> PyResult<Self> {
        let make = || -> Result<Schedule> {
            Ok(match name {
                "loglinear" => Schedule::LogLinear,
                "square" => Schedule::Square,
                "square_root" => Schedule::SquareRoot,
                "logarithmic" => Schedule::Logarithmic,
                "cosine" => Schedule::cosine(eps)?,
                "gaussian" => Schedule::gaussian(need("mu", mu)?, need("sigma", sigma)?)?,
                "bimodal_gaussian" => Schedule::bimodal(
                    (need("mu", mu)?, need("sigma", sigma)?),
                    (need("mu2", mu2)?, need("sigma2", sigma2)?),
                    need("mixture", mixture)?,
                    paper_weights,
                )?,
                _ => {
                    return Err(Error::config(
                        "schedule",
                        name,
                        "must be loglinear, square, square_root, logarithmic, cosine, gaussian \
                         or bimodal_gaussian",
                    ));
                }
            })
        };
        make().map(PySchedule).map_err(to_py)
    }

    #[getter]
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn mask_prob<'py>(&self, py: Python<'py>, t: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, t, |t| Ok(self.0.mask_prob(t)))
    }

    fn loss_weight<'py>(&self, py: Python<'py>, t: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, t, |t| Ok(self.0.loss_weight(t)))
    }

    fn loss_weight_at<'py>(&self, py: Python<'py>, p: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, p, |p| self.0.loss_weight_at(p))
    }

    fn inverse<'py>(&self, py: Python<'py>, p: PyReadonlyArray1<'py, f64>) -> Floats<'py> {
        map(py, p, |p| self.0.inverse(p))
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
    #[pyo3(signature = (name="nelbo", *, k=0.0))]
    fn new(name: &str, k: f64) -> PyResult<Self> {
        Ok(PyWeighting(match name {
            "nelbo" => Weighting::Nelbo,
            "edm" => Weighting::Edm,
            "iddpm" => Weighting::Iddpm,
            "sigmoid" => Weighting::Sigmoid { k },
            "flow_matching" => Weighting::FlowMatching,
            "simple" => Weighting::Simple,
            _ => {
                return Err(to_py(Error::config(
                    "weighting",
                    name,
                    "must be nelbo, edm, iddpm, sigmoid, flow_matching or simple",
                )));
            }
        }))
    }

    fn at<'py>(
        &self,
        py: Python<'py>,
        schedule: &PySchedule,
        t: PyReadonlyArray1<'py, f64>,
    ) -> Floats<'py> {
        map(py, t, |t| {
            Ok(self.0.at(&schedule.0, t, schedule.0.mask_prob(t)))
        })
    }
}

/// What to draw for a batch.
#[pyclass(name = "NoiseSpec", frozen, module = "bd3lm._core")]
pub struct PyNoiseSpec(pub NoiseSpec);

#[pymethods]
impl PyNoiseSpec {
    #[new]
    #[pyo3(signature = (schedule, *, estimator="bernoulli", clip=None, resample=false, weighting=None, gamma=None, count_probs=None, stratum=None, strata=true, time_conditioned=false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        schedule: &PySchedule,
        estimator: &str,
        clip: Option<(f64, f64)>,
        resample: bool,
        weighting: Option<&PyWeighting>,
        gamma: Option<PyReadonlyArray1<'_, f32>>,
        count_probs: Option<Vec<f64>>,
        stratum: Option<(u32, u32)>,
        strata: bool,
        time_conditioned: bool,
    ) -> PyResult<Self> {
        let estimator = match estimator {
            "bernoulli" => Estimator::Bernoulli { strata },
            "count" => Estimator::Count {
                probs: count_probs,
                stratum,
            },
            "full" => Estimator::Full,
            _ => {
                let allowed = "must be bernoulli, count or full";
                return Err(to_py(Error::config("estimator", estimator, allowed)));
            }
        };
        let weighting = weighting.map_or(Weighting::Nelbo, |w| w.0);
        let gamma: Option<Arc<[f32]>> = gamma.map(|g| g.as_array().iter().copied().collect());
        let spec = NoiseSpec::new(schedule.0, estimator, clip, resample, weighting, gamma)
            .map_err(to_py)?;
        Ok(PyNoiseSpec(if time_conditioned {
            spec.for_time_conditioned()
        } else {
            spec
        }))
    }

    fn check(&self, seq_len: usize, block_size: usize) -> PyResult<()> {
        self.0.check(seq_len, block_size).map_err(to_py)
    }
}

/// Noises rows that are already there.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn noise(
    py: Python<'_>,
    spec: &PyNoiseSpec,
    seq_len: usize,
    block_size: usize,
    seed: u64,
    step: u64,
    first_row: u64,
    num_rows: u64,
    x0: PyReadonlyArray1<'_, i64>,
    noisable: PyReadonlyArray1<'_, u8>,
    mut mask: PyReadwriteArray1<'_, u8>,
    mut mask_prob: PyReadwriteArray1<'_, f32>,
    mut weight: PyReadwriteArray1<'_, f32>,
) -> PyResult<()> {
    let key = NoiseKey {
        seed,
        step,
        row: first_row,
        rows: num_rows,
    };
    let (x0, noisable) = (x0.as_slice()?, noisable.as_slice()?);
    let out = NoiseBatch {
        mask: mask.as_slice_mut()?,
        mask_prob: mask_prob.as_slice_mut()?,
        weight: weight.as_slice_mut()?,
    };
    py.detach(|| batch::noise(&spec.0, key, seq_len, block_size, x0, noisable, out))
        .map_err(to_py)
}
