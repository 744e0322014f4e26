//! Noise schedules: mask probability, NELBO weight and inverse (docs/math.md §2). Formulas of
//! Gaussians and tables are in `gaussian` and `table`, all others here.

mod gaussian;
mod table;
#[cfg(test)]
pub(crate) mod tests;

pub use gaussian::Truncated;
pub use table::Table;

use std::f64::consts::{FRAC_PI_2, FRAC_PI_4, LN_2};
use std::sync::Arc;

use serde::Deserialize;

use super::root::root;
use crate::cpu::multiversion::multiversion;
use crate::error::{Error, Result, named};
use gaussian::mixture_pdf;

/// Lowest noise level that is drawn: the second moment of the estimator is infinite on (0, 1].
pub const MIN_LEVEL: f64 = 1e-3;

/// A noise schedule on t in (0, 1].
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// p = t.
    LogLinear,
    /// p = t².
    Square,
    /// p = √t.
    SquareRoot,
    /// p = log(1+t)/log 2.
    Logarithmic,
    /// p = 1 − (1−ε)cos(πt/2); misses the mass below ε.
    Cosine {
        /// p(0), in [0, 1).
        eps: f64,
    },
    /// p follows a Gaussian truncated to (0, 1).
    Gaussian(Truncated),
    /// p follows a mixture of two truncated Gaussians.
    BimodalGaussian {
        /// First component.
        first: Truncated,
        /// Second component.
        second: Truncated,
        /// Weight of the first, in (0, 1).
        weight: f64,
        /// Use Eq. 5–7 of the reproduction as printed: p(t) is not monotone, and its weight counts
        /// the NELBO twice. Training only.
        paper_weights: bool,
    },
    /// p interpolates a table.
    Table(Arc<Table>),
}

/// Name and parameters of a schedule; it reads those that it has.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSettings {
    /// One of [`Schedule::NAMES`].
    pub name: String,
    /// cosine: p(0); 1e-3 unless given.
    #[serde(default)]
    pub eps: Option<f64>,
    /// gaussian, bimodal_gaussian: mean of the first component.
    #[serde(default)]
    pub mu: Option<f64>,
    /// gaussian, bimodal_gaussian: deviation of the first component.
    #[serde(default)]
    pub sigma: Option<f64>,
    /// bimodal_gaussian: mean of the second component.
    #[serde(default)]
    pub mu2: Option<f64>,
    /// bimodal_gaussian: deviation of the second component.
    #[serde(default)]
    pub sigma2: Option<f64>,
    /// bimodal_gaussian: weight of the first component.
    #[serde(default)]
    pub mixture: Option<f64>,
    /// bimodal_gaussian: Eq. 5–7 of the reproduction as printed.
    #[serde(default)]
    pub paper_weights: bool,
    /// table: (t, p) of every point.
    #[serde(default)]
    pub points: Option<Vec<(f64, f64)>>,
}

impl ScheduleSettings {
    /// The schedule of this name with these parameters.
    ///
    /// # Errors
    /// An unknown name, or a parameter that is missing or out of range.
    pub fn build(&self) -> Result<Schedule> {
        type Build = fn(&ScheduleSettings) -> Result<Schedule>;
        let kinds: [(&'static str, Build); Schedule::NAMES.len()] = [
            ("loglinear", |_| Ok(Schedule::LogLinear)),
            ("square", |_| Ok(Schedule::Square)),
            ("square_root", |_| Ok(Schedule::SquareRoot)),
            ("logarithmic", |_| Ok(Schedule::Logarithmic)),
            ("cosine", |s| Schedule::cosine(s.eps.unwrap_or(1e-3))),
            ("gaussian", |s| {
                Schedule::gaussian(need("mu", s.mu)?, need("sigma", s.sigma)?)
            }),
            ("bimodal_gaussian", |s| {
                Schedule::bimodal(
                    (need("mu", s.mu)?, need("sigma", s.sigma)?),
                    (need("mu2", s.mu2)?, need("sigma2", s.sigma2)?),
                    need("mixture", s.mixture)?,
                    s.paper_weights,
                )
            }),
            ("table", |s| {
                let points = s.points.as_deref().unwrap_or_default();
                Ok(Schedule::Table(Arc::new(Table::new(points)?)))
            }),
        ];
        named("schedule", &self.name, &kinds)?(self)
    }
}

fn need(name: &'static str, value: Option<f64>) -> Result<f64> {
    value.ok_or_else(|| Error::config(name, "None", "a number for this schedule"))
}

impl Schedule {
    /// Names of all schedules, as configs and the command line spell them.
    pub const NAMES: [&'static str; 8] = [
        "loglinear",
        "square",
        "square_root",
        "logarithmic",
        "cosine",
        "gaussian",
        "bimodal_gaussian",
        "table",
    ];

    /// A Gaussian schedule of mean `mu` and deviation `sigma`.
    pub fn gaussian(mu: f64, sigma: f64) -> Result<Self> {
        Ok(Schedule::Gaussian(Truncated::new(
            ["mu", "sigma"],
            mu,
            sigma,
        )?))
    }

    /// A mixture schedule; `weight` belongs to the first component.
    pub fn bimodal(
        (mu1, sigma1): (f64, f64),
        (mu2, sigma2): (f64, f64),
        weight: f64,
        paper_weights: bool,
    ) -> Result<Self> {
        if !(weight > 0.0 && weight < 1.0) {
            return Err(Error::config("mixture", weight, "in (0, 1)"));
        }
        Ok(Schedule::BimodalGaussian {
            first: Truncated::new(["mu", "sigma"], mu1, sigma1)?,
            second: Truncated::new(["mu2", "sigma2"], mu2, sigma2)?,
            weight,
            paper_weights,
        })
    }

    /// The cosine schedule with p(0) = `eps`.
    pub fn cosine(eps: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&eps) {
            return Err(Error::config("eps", eps, "in [0, 1)"));
        }
        Ok(Schedule::Cosine { eps })
    }

    /// Name of the schedule, one of [`Self::NAMES`].
    pub fn name(&self) -> &'static str {
        Self::NAMES[match self {
            Schedule::LogLinear => 0,
            Schedule::Square => 1,
            Schedule::SquareRoot => 2,
            Schedule::Logarithmic => 3,
            Schedule::Cosine { .. } => 4,
            Schedule::Gaussian(_) => 5,
            Schedule::BimodalGaussian { .. } => 6,
            Schedule::Table(_) => 7,
        }]
    }

    /// p(t): probability that a token is masked at level t.
    #[inline(always)]
    pub fn mask_prob(&self, t: f64) -> f64 {
        match *self {
            Schedule::LogLinear => t,
            Schedule::Square => t * t,
            Schedule::SquareRoot => t.sqrt(),
            Schedule::Logarithmic => t.ln_1p() / LN_2,
            // 1 − cos x = 2 sin²(x/2) keeps the digits of a small t.
            Schedule::Cosine { eps } => eps + (1.0 - eps) * 2.0 * (FRAC_PI_4 * t).sin().powi(2),
            Schedule::Gaussian(g) => g.quantile(t),
            Schedule::Table(ref table) => table.mask_prob(t),
            Schedule::BimodalGaussian {
                first,
                second,
                weight,
                paper_weights,
            } => {
                if paper_weights {
                    let (component, s, _) = branch(first, second, weight, t);
                    component.quantile(s)
                } else {
                    mixture_quantile(first, second, weight, t)
                }
            }
        }
    }

    /// w(t) = p′(t)/p(t): the non-negative NELBO weight of a masked token at level t.
    #[inline(always)]
    pub fn loss_weight(&self, t: f64) -> f64 {
        match *self {
            Schedule::LogLinear => 1.0 / t,
            Schedule::Square => 2.0 / t,
            Schedule::SquareRoot => 0.5 / t,
            Schedule::Logarithmic => 1.0 / ((1.0 + t) * t.ln_1p()),
            Schedule::Cosine { eps } => {
                FRAC_PI_2 * (1.0 - eps) * (FRAC_PI_2 * t).sin() / self.mask_prob(t)
            }
            Schedule::Gaussian(g) => g.slope(t) / g.quantile(t),
            Schedule::Table(ref table) => table.loss_weight(t),
            Schedule::BimodalGaussian {
                first,
                second,
                weight,
                paper_weights,
            } => {
                if paper_weights {
                    let (component, s, share) = branch(first, second, weight, t);
                    component.slope(s) / (share * component.quantile(s))
                } else {
                    let p = mixture_quantile(first, second, weight, t);
                    1.0 / (p * mixture_pdf(first, second, weight, p))
                }
            }
        }
    }

    /// w at the level where tokens are masked with probability p: 1/(p·f(p)), f the density of p.
    ///
    /// As `loss_weight(inverse(p))`, but Gaussians take it from their density: near t = 1 a level
    /// keeps too few digits of p.
    ///
    /// # Errors
    /// As [`Schedule::inverse`].
    pub fn loss_weight_at(&self, p: f64) -> Result<f64> {
        Ok(match *self {
            Schedule::Gaussian(g) => 1.0 / (p * g.pdf(p)),
            Schedule::Table(ref table) => table.loss_weight_at(p),
            Schedule::BimodalGaussian {
                first,
                second,
                weight,
                paper_weights: false,
            } => 1.0 / (p * mixture_pdf(first, second, weight, p)),
            _ => self.loss_weight(self.inverse(p)?),
        })
    }

    /// p(t) and w(t) of many levels.
    pub fn fill(&self, t: &[f64], mask_prob: &mut [f64], loss_weight: &mut [f64]) {
        fill(self, t, mask_prob, loss_weight);
    }

    /// t(p): the level at which tokens are masked with probability p.
    ///
    /// # Errors
    /// `paper_weights`: p(t) then sweeps (0, 1) twice and has no inverse.
    pub fn inverse(&self, p: f64) -> Result<f64> {
        Ok(match *self {
            Schedule::LogLinear => p,
            Schedule::Square => p.sqrt(),
            Schedule::SquareRoot => p * p,
            Schedule::Logarithmic => (p * LN_2).exp_m1(),
            Schedule::Cosine { eps } => {
                let half = 0.5 * ((p - eps) / (1.0 - eps)).clamp(0.0, 1.0);
                half.sqrt().asin() / FRAC_PI_4
            }
            Schedule::Gaussian(g) => g.cdf(p),
            Schedule::Table(ref table) => table.inverse(p),
            Schedule::BimodalGaussian {
                paper_weights: true,
                ..
            } => {
                return Err(Error::config(
                    "paper_weights",
                    true,
                    "false here: the paper's bimodal p(t) is not monotone and has no inverse. It is for \
                     training with the bernoulli estimator and no clip",
                ));
            }
            Schedule::BimodalGaussian {
                first,
                second,
                weight,
                ..
            } => weight * first.cdf(p) + (1.0 - weight) * second.cdf(p),
        })
    }

    /// Returns whether p(t) increases, so that inverse, clip and sampling are defined.
    pub fn is_monotone(&self) -> bool {
        !matches!(
            self,
            Schedule::BimodalGaussian {
                paper_weights: true,
                ..
            }
        )
    }
}

multiversion! {
    fn fill(schedule: &Schedule, t: &[f64], mask_prob: &mut [f64], loss_weight: &mut [f64]) {
        // Constant arms let the compiler vectorise the simple schedules.
        match schedule {
            Schedule::LogLinear => each(&Schedule::LogLinear, t, mask_prob, loss_weight),
            Schedule::Square => each(&Schedule::Square, t, mask_prob, loss_weight),
            Schedule::SquareRoot => each(&Schedule::SquareRoot, t, mask_prob, loss_weight),
            other => each(other, t, mask_prob, loss_weight),
        }
    }
}

#[inline(always)]
fn each(schedule: &Schedule, t: &[f64], mask_prob: &mut [f64], loss_weight: &mut [f64]) {
    for ((t, p), w) in t.iter().zip(mask_prob).zip(loss_weight) {
        *p = schedule.mask_prob(*t);
        *w = schedule.loss_weight(*t);
    }
}

/// Eq. 5 of the reproduction: the component of a level, the level inside it, its share.
fn branch(first: Truncated, second: Truncated, weight: f64, t: f64) -> (Truncated, f64, f64) {
    if t < weight {
        (first, t / weight, weight)
    } else {
        (second, (t - weight) / (1.0 - weight), 1.0 - weight)
    }
}

/// F⁻¹(t) of the mixture.
fn mixture_quantile(first: Truncated, second: Truncated, weight: f64, t: f64) -> f64 {
    let excess = |p: f64| {
        let slope = weight * first.pdf(p) + (1.0 - weight) * second.pdf(p);
        let excess = weight * first.cdf(p) + (1.0 - weight) * second.cdf(p) - t;
        (excess, slope)
    };
    root(excess, (0.0, 1.0), t)
}
