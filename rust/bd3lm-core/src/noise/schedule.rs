//! Noise schedules: mask probability, NELBO weight and inverse (MATH §2). The only place they stand.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_PI_2, FRAC_PI_4, LN_2};

use statrs::distribution::{Continuous, ContinuousCDF, Normal};

use crate::cpu::multiversion::multiversion;
use crate::error::{Error, Result};

/// Lowest noise level that is drawn: the second moment of the estimator is infinite on (0, 1].
pub const MIN_LEVEL: f64 = 1e-3;

/// A Gaussian restricted to (0, 1), the law of p under the paper's Eq. 3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truncated {
    mu: f64,
    sigma: f64,
    /// −1 where (0, 1) lies in the upper tail: areas are then measured from above, for 1 − tiny
    /// keeps no digits of the tiny.
    sign: f64,
    /// Area of the tail before p = 0, in that direction.
    before: f64,
    mass: f64,
}

impl Truncated {
    /// `names` of the two parameters are what an error says.
    fn new(names: [&'static str; 2], mu: f64, sigma: f64) -> Result<Self> {
        if !mu.is_finite() {
            return Err(Error::config(names[0], mu, "a finite number is needed"));
        }
        if !(sigma.is_finite() && sigma > 0.0) {
            return Err(Error::config(names[1], sigma, "must be greater than 0"));
        }
        let sign = if mu < 0.0 { -1.0 } else { 1.0 };
        let before = area_below(-sign * mu / sigma);
        let mass = sign * (area_below(sign * (1.0 - mu) / sigma) - before);
        if mass < 1e-12 {
            return Err(Error::config(
                names[0],
                mu,
                format!("a Gaussian of deviation {sigma} there leaves no mass in (0, 1)"),
            ));
        }
        Ok(Truncated {
            mu,
            sigma,
            sign,
            before,
            mass,
        })
    }

    fn z(&self, t: f64) -> f64 {
        self.sign * standard().inverse_cdf(self.before + self.sign * t * self.mass)
    }

    fn quantile(&self, t: f64) -> f64 {
        (self.mu + self.sigma * self.z(t)).clamp(0.0, 1.0)
    }

    /// dp/dt of the quantile.
    fn slope(&self, t: f64) -> f64 {
        self.sigma * self.mass / standard().pdf(self.z(t))
    }

    fn cdf(&self, p: f64) -> f64 {
        let area = area_below(self.sign * (p - self.mu) / self.sigma);
        self.sign * (area - self.before) / self.mass
    }

    fn pdf(&self, p: f64) -> f64 {
        standard().pdf((p - self.mu) / self.sigma) / (self.sigma * self.mass)
    }
}

/// Density of p under a mixture; `weight` belongs to the first component.
fn mixture_pdf(first: Truncated, second: Truncated, weight: f64, p: f64) -> f64 {
    weight * first.pdf(p) + (1.0 - weight) * second.pdf(p)
}

fn standard() -> Normal {
    Normal::standard()
}

/// Φ(z), to the last digits in both tails; that of `statrs` has ten.
fn area_below(z: f64) -> f64 {
    0.5 * libm::erfc(-z * FRAC_1_SQRT_2)
}

/// A noise schedule on t in (0, 1].
#[derive(Clone, Copy, Debug, PartialEq)]
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
        /// Use the paper's Eq. 5–7 literally: not monotone, and its weight counts the NELBO
        /// twice. Training only.
        paper_weights: bool,
    },
}

impl Schedule {
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
            return Err(Error::config("mixture", weight, "must lie in (0, 1)"));
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
            return Err(Error::config("eps", eps, "must lie in [0, 1)"));
        }
        Ok(Schedule::Cosine { eps })
    }

    /// Its name in configs and on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Schedule::LogLinear => "loglinear",
            Schedule::Square => "square",
            Schedule::SquareRoot => "square_root",
            Schedule::Logarithmic => "logarithmic",
            Schedule::Cosine { .. } => "cosine",
            Schedule::Gaussian(_) => "gaussian",
            Schedule::BimodalGaussian { .. } => "bimodal_gaussian",
        }
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
        fill(*self, t, mask_prob, loss_weight);
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
            Schedule::BimodalGaussian {
                paper_weights: true,
                ..
            } => {
                return Err(Error::config(
                    "paper_weights",
                    true,
                    "the paper's bimodal p(t) is not monotone and has no inverse; \
                     it is for training with the bernoulli estimator and no clip",
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

    /// Whether p(t) increases, so that inverse, clip and sampling are defined.
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
    fn fill(schedule: Schedule, t: &[f64], mask_prob: &mut [f64], loss_weight: &mut [f64]) {
        // Arms of their own for the schedules that vectorise once their name is a constant.
        match schedule {
            Schedule::LogLinear => each(Schedule::LogLinear, t, mask_prob, loss_weight),
            Schedule::Square => each(Schedule::Square, t, mask_prob, loss_weight),
            Schedule::SquareRoot => each(Schedule::SquareRoot, t, mask_prob, loss_weight),
            other => each(other, t, mask_prob, loss_weight),
        }
    }
}

#[inline(always)]
fn each(schedule: Schedule, t: &[f64], mask_prob: &mut [f64], loss_weight: &mut [f64]) {
    for ((t, p), w) in t.iter().zip(mask_prob).zip(loss_weight) {
        *p = schedule.mask_prob(*t);
        *w = schedule.loss_weight(*t);
    }
}

/// The paper's Eq. 5: which component a level belongs to, its own level there, its share.
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

/// Where an increasing function of p in [lo, hi] is zero: Newton steps, halving the bracket where
/// one would leave it, so that it always ends.
///
/// `f` gives the value and the slope, `start` the first guess.
pub(crate) fn root(f: impl Fn(f64) -> (f64, f64), (lo, hi): (f64, f64), start: f64) -> f64 {
    let (mut lo, mut hi) = (lo, hi);
    let mut p = start.clamp(lo, hi);
    while hi - lo > 1e-15 {
        let (excess, slope) = f(p);
        if excess < 0.0 {
            lo = p;
        } else {
            hi = p;
        }
        let newton = p - excess / slope;
        let next = if lo < newton && newton < hi {
            newton
        } else {
            0.5 * (lo + hi)
        };
        if (next - p).abs() < 1e-14 {
            return next;
        }
        p = next;
    }
    p
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn all() -> Vec<Schedule> {
        vec![
            Schedule::LogLinear,
            Schedule::Square,
            Schedule::SquareRoot,
            Schedule::Logarithmic,
            Schedule::cosine(1e-3).unwrap(),
            Schedule::gaussian(0.5, 0.2).unwrap(),
            Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, false).unwrap(),
        ]
    }

    #[test]
    fn weight_is_the_slope_over_the_probability() {
        for schedule in all() {
            for i in 1..100 {
                let (t, h) = (f64::from(i) / 100.0, 1e-5);
                let slope = (schedule.mask_prob(t + h) - schedule.mask_prob(t - h)) / (2.0 * h);
                let expected = slope / schedule.mask_prob(t);
                let got = schedule.loss_weight(t);
                assert!(
                    (got / expected - 1.0).abs() < 1e-5,
                    "{} at {t}: {got} against {expected}",
                    schedule.name()
                );
            }
        }
    }

    #[test]
    fn many_levels_are_the_same_bits() {
        let t: Vec<f64> = (1..=50).map(|i| f64::from(i) / 50.0).collect();
        for schedule in all() {
            let (mut p, mut w) = (vec![0.0; 50], vec![0.0; 50]);
            schedule.fill(&t, &mut p, &mut w);
            for i in 0..50 {
                assert_eq!(p[i].to_bits(), schedule.mask_prob(t[i]).to_bits());
                assert_eq!(w[i].to_bits(), schedule.loss_weight(t[i]).to_bits());
            }
        }
    }

    #[test]
    fn weight_at_a_mask_probability_is_that_of_its_level() {
        for schedule in all() {
            for i in 1..100 {
                let t = f64::from(i) / 100.0;
                let got = schedule.loss_weight_at(schedule.mask_prob(t)).unwrap();
                let error = got / schedule.loss_weight(t) - 1.0;
                assert!(error.abs() < 1e-7, "{} at {t}: {error}", schedule.name());
            }
        }
        // Ten deviations out, where 1 − t has no digits left: √(2π)·σ·Z·e^50, Z = 1/2.
        let steep = Schedule::gaussian(0.0, 0.1).unwrap();
        let want = (2.0 * std::f64::consts::PI).sqrt() * 0.05 * 50f64.exp();
        assert!((steep.loss_weight_at(1.0).unwrap() / want - 1.0).abs() < 1e-9);
    }

    #[test]
    fn inverse_undoes_mask_prob() {
        for schedule in all() {
            for i in 1..100 {
                let t = f64::from(i) / 100.0;
                let back = schedule.inverse(schedule.mask_prob(t)).unwrap();
                assert!((back - t).abs() < 1e-10, "{} at {t}", schedule.name());
            }
        }
    }

    /// p(t) near its ends and under Gaussians far from (0, 1), from 60-digit arithmetic.
    #[test]
    fn thin_tails_keep_their_digits() {
        for (mu, sigma, t, p) in [
            (0.5, 0.2, 1e-6, 1.126_761_974_264_682e-5),
            (-1.0, 0.15, 0.5, 0.015_156_072_289_390_1),
            (-1.0, 0.15, 1.0 - 1e-6, 0.269_376_820_822_647_1),
            (2.0, 0.15, 1e-6, 0.730_623_179_176_85),
        ] {
            let got = Schedule::gaussian(mu, sigma).unwrap();
            let error = got.mask_prob(t) / p - 1.0;
            assert!(
                error.abs() < 1e-9,
                "mu = {mu}, sigma = {sigma}, t = {t}: {error}"
            );
            let back = got.inverse(p).unwrap() / t - 1.0;
            assert!(
                back.abs() < 1e-9,
                "mu = {mu}, sigma = {sigma}, t = {t}: {back}"
            );
        }
        let cosine = Schedule::cosine(1e-3).unwrap();
        let above = cosine.mask_prob(1e-6) - 1e-3; // (1 − ε)(π·10⁻⁶)²/8
        assert!(
            (above / 1.232_466_849_585_78e-12 - 1.0).abs() < 1e-6,
            "{above}"
        );
        assert!((cosine.inverse(cosine.mask_prob(1e-3)).unwrap() / 1e-3 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn ends_at_one() {
        for schedule in all() {
            assert!(
                (schedule.mask_prob(1.0) - 1.0).abs() < 1e-12,
                "{}",
                schedule.name()
            );
        }
    }

    /// MATH §2: the literal form covers the NELBO exactly twice: ∫ w(t) g(p(t)) dt.
    #[test]
    fn paper_form_counts_twice() {
        let integral = |schedule: Schedule| -> f64 {
            let n = 20_000;
            (0..n)
                .map(|i| {
                    let t = (f64::from(i) + 0.5) / f64::from(n);
                    let p = schedule.mask_prob(t);
                    schedule.loss_weight(t) * p * p // g(p) = p²: ∫ p dp = 1/2
                })
                .sum::<f64>()
                / f64::from(n)
        };
        let ours = Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, false).unwrap();
        let paper = Schedule::bimodal((0.3, 0.2), (0.8, 0.2), 0.6, true).unwrap();
        assert!((integral(ours) - 0.5).abs() < 1e-3);
        assert!((integral(paper) - 1.0).abs() < 1e-3);
        assert!(paper.inverse(0.5).is_err());
    }

    #[test]
    fn bad_parameters_name_themselves() {
        assert!(
            Schedule::gaussian(0.5, 0.0)
                .unwrap_err()
                .to_string()
                .contains("sigma = 0")
        );
        assert!(
            Schedule::gaussian(50.0, 0.1)
                .unwrap_err()
                .to_string()
                .contains("mu = 50")
        );
        assert!(Schedule::cosine(1.0).is_err());
        let bimodal = |second, mixture| {
            let made = Schedule::bimodal((0.3, 0.2), second, mixture, false);
            made.unwrap_err().to_string()
        };
        assert!(bimodal((0.8, 0.2), 1.0).contains("mixture = 1"));
        assert!(bimodal((0.8, 0.0), 0.5).contains("sigma2 = 0"));
    }
}
