//! A Gaussian restricted to (0, 1).

use std::f64::consts::FRAC_1_SQRT_2;

use statrs::distribution::{Continuous, ContinuousCDF, Normal};

use crate::error::{Error, Result};

/// A Gaussian restricted to (0, 1), the distribution of p under Eq. 3 of the reproduction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truncated {
    mu: f64,
    sigma: f64,
    /// −1 where (0, 1) lies in the upper tail: areas are then measured from above, because 1 − x
    /// loses the digits of a small x.
    sign: f64,
    /// Area of the tail before p = 0, in that direction.
    before: f64,
    mass: f64,
}

impl Truncated {
    /// An error calls the parameters by `names`.
    pub(super) fn new(names: [&'static str; 2], mu: f64, sigma: f64) -> Result<Self> {
        if !mu.is_finite() {
            return Err(Error::config(names[0], mu, "finite"));
        }
        if !(sigma.is_finite() && sigma > 0.0) {
            return Err(Error::config(names[1], sigma, "greater than 0"));
        }
        let sign = if mu < 0.0 { -1.0 } else { 1.0 };
        let before = area_below(-sign * mu / sigma);
        let mass = sign * (area_below(sign * (1.0 - mu) / sigma) - before);
        if mass < 1e-12 {
            return Err(Error::config(
                names[0],
                mu,
                format!(
                    "nearer to (0, 1): a Gaussian of deviation {sigma} there leaves it no mass"
                ),
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

    pub(super) fn quantile(&self, t: f64) -> f64 {
        (self.mu + self.sigma * self.z(t)).clamp(0.0, 1.0)
    }

    /// dp/dt of the quantile.
    pub(super) fn slope(&self, t: f64) -> f64 {
        self.sigma * self.mass / standard().pdf(self.z(t))
    }

    pub(super) fn cdf(&self, p: f64) -> f64 {
        let area = area_below(self.sign * (p - self.mu) / self.sigma);
        self.sign * (area - self.before) / self.mass
    }

    pub(super) fn pdf(&self, p: f64) -> f64 {
        standard().pdf((p - self.mu) / self.sigma) / (self.sigma * self.mass)
    }
}

/// Density of p under a mixture; `weight` belongs to the first component.
pub(super) fn mixture_pdf(first: Truncated, second: Truncated, weight: f64, p: f64) -> f64 {
    weight * first.pdf(p) + (1.0 - weight) * second.pdf(p)
}

fn standard() -> Normal {
    Normal::standard()
}

/// Φ(z) to full precision in both tails; `statrs` gives ten digits.
fn area_below(z: f64) -> f64 {
    0.5 * libm::erfc(-z * FRAC_1_SQRT_2)
}
