//! Reweightings of the training loss (docs/math.md §3). Reported likelihoods always use
//! [`Weighting::Nelbo`].

use super::schedule::Schedule;
use crate::error::{Error, Result, named};

/// A factor w̃ on top of the NELBO weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Weighting {
    /// 1: the bound itself.
    Nelbo,
    /// EDM's weighting, a Gaussian bump in λ.
    Edm,
    /// sech(λ/2).
    Iddpm,
    /// sigmoid(k − λ).
    Sigmoid {
        /// Shift of the sigmoid.
        k: f64,
    },
    /// e^{−λ/2}.
    FlowMatching,
    /// p/p′, which makes the total weight 1.
    Simple,
}

impl Weighting {
    /// Names of all weightings, as configs and the command line spell them.
    pub const NAMES: [&'static str; 6] = [
        "nelbo",
        "edm",
        "iddpm",
        "sigmoid",
        "flow_matching",
        "simple",
    ];

    /// The weighting of this name; `k` shifts the sigmoid.
    ///
    /// # Errors
    /// An unknown name, or a `k` that is not finite.
    pub fn parse(name: &str, k: f64) -> Result<Self> {
        if !k.is_finite() {
            return Err(Error::config("weighting_k", k, "finite"));
        }
        let [nelbo, edm, iddpm, sigmoid, flow_matching, simple] = Self::NAMES;
        let table = [
            (nelbo, Weighting::Nelbo),
            (edm, Weighting::Edm),
            (iddpm, Weighting::Iddpm),
            (sigmoid, Weighting::Sigmoid { k }),
            (flow_matching, Weighting::FlowMatching),
            (simple, Weighting::Simple),
        ];
        named("weighting", name, &table)
    }

    /// w̃ where tokens are masked with probability p; `schedule` matters to `Simple` alone.
    pub fn at(&self, schedule: &Schedule, t: f64, p: f64) -> f64 {
        // λ = log(α/(1−α)) clamped to ±20, in the form that keeps both tails exact.
        let lambda = ((1.0 - p).ln() - p.ln()).clamp(-20.0, 20.0);
        match *self {
            Weighting::Nelbo => 1.0,
            Weighting::Edm => {
                let z = (lambda - 2.4) / 2.4;
                let bump = (-0.5 * z * z).exp() / (2.4 * (2.0 * std::f64::consts::PI).sqrt());
                bump * ((-lambda).exp() + 0.25) / 0.25
            }
            Weighting::Iddpm => 1.0 / (0.5 * lambda).cosh(),
            Weighting::Sigmoid { k } => 1.0 / (1.0 + (lambda - k).exp()),
            Weighting::FlowMatching => (-0.5 * lambda).exp(),
            // Levels below p(0) never occur: dt/dp is 0 there.
            Weighting::Simple if p < schedule.mask_prob(0.0) => 0.0,
            Weighting::Simple => 1.0 / schedule.loss_weight(t),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::schedule::tests::all;

    /// The closed forms of docs/math.md §3 in α, away from the clamp.
    #[test]
    fn equals_the_closed_forms() {
        let schedule = Schedule::LogLinear;
        for i in 1..1000 {
            let p = f64::from(i) / 1000.0;
            let a = 1.0 - p;
            let close = |w: Weighting, expected: f64| {
                let got = w.at(&schedule, p, p);
                assert!((got / expected - 1.0).abs() < 1e-12, "{w:?} at {p}");
            };
            close(Weighting::Iddpm, 2.0 * (a * p).sqrt());
            close(Weighting::FlowMatching, (p / a).sqrt());
            for k in [-1.0, 0.0, 2.0] {
                let e = f64::exp(-k);
                close(Weighting::Sigmoid { k }, p / (1.0 - (1.0 - e) * a));
            }
            close(Weighting::Simple, p);
        }
    }

    /// Under cosine no level lies below ε, and the mean over counts stays finite.
    #[test]
    fn simple_is_nothing_where_a_schedule_has_no_levels() {
        let cosine = Schedule::cosine(1e-3).unwrap();
        assert_eq!(Weighting::Simple.at(&cosine, 0.0, 0.9e-3), 0.0);
        let got = Weighting::Simple.at(&cosine, 0.5, cosine.mask_prob(0.5));
        assert!((got * cosine.loss_weight(0.5) - 1.0).abs() < 1e-12);
    }

    /// Under loglinear, sigmoid(0) and simple are the same function.
    #[test]
    fn sigmoid_zero_is_simple_under_loglinear() {
        for i in 1..1000 {
            let p = f64::from(i) / 1000.0;
            let a = Weighting::Sigmoid { k: 0.0 }.at(&Schedule::LogLinear, p, p);
            let b = Weighting::Simple.at(&Schedule::LogLinear, p, p);
            assert!((a - b).abs() < 1e-12);
        }
    }

    #[test]
    fn finite_at_the_ends() {
        for schedule in all() {
            for w in [Weighting::Edm, Weighting::Iddpm, Weighting::FlowMatching] {
                for p in [0.0, 1e-300, 1.0 - 1e-16, 1.0] {
                    assert!(w.at(&schedule, 0.5, p).is_finite(), "{w:?} at {p}");
                }
            }
        }
    }
}
