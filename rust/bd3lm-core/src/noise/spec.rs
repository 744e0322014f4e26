//! The specification of a noise distribution, and its checks.

use std::sync::Arc;

use serde::Deserialize;

use super::schedule::{MIN_LEVEL, Schedule, ScheduleSettings};
use super::tables::CountTables;
use super::weighting::Weighting;
use crate::error::{Error, Result, named};

/// Distribution of the masked positions of a block.
#[derive(Clone, Debug, PartialEq)]
pub enum Estimator {
    /// A level t a block, independent masks of probability p(t), weight w(t), as in the BD3-LM
    /// paper.
    Bernoulli {
        /// Spread the levels over equal strata of the global batch.
        strata: bool,
    },
    /// A masked count k, a uniform subset of that size, weight 1/(k·q(k)).
    Count {
        /// q(k) for k = 1..=S; `None` is uniform. A block with fewer noisable tokens uses the
        /// same numbers up to its own, renormalised.
        probs: Option<Vec<f64>>,
        /// `(j, r)`: draw k from the j-th of r equal shares of its distribution.
        stratum: Option<(u32, u32)>,
    },
    /// Every noisable token masked with weight 1 (t ≡ 1).
    Full,
}

/// Settings of the noise, as a config names them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseSettings {
    /// p(t).
    pub schedule: ScheduleSettings,
    /// `bernoulli`, `count` or `full`.
    pub estimator: String,
    /// Interval of t.
    pub clip: Option<(f64, f64)>,
    /// Force each block's masked share into the clip.
    pub resample: bool,
    /// One of [`Weighting::NAMES`].
    pub weighting: String,
    /// Shift of the sigmoid weighting.
    pub weighting_k: f64,
    /// count: q(k).
    pub count_probs: Option<Vec<f64>>,
    /// count: the j-th of r equal shares of q.
    pub stratum: Option<(u32, u32)>,
    /// bernoulli: spread the levels over strata.
    pub strata: bool,
    /// See [`NoiseSpec::for_time_conditioned`].
    pub time_conditioned: bool,
}

impl NoiseSettings {
    /// The specification, with a factor for each token id where masking goes by frequency.
    ///
    /// # Errors
    /// An unknown name, a parameter out of range, or settings that do not go together.
    pub fn build(&self, gamma: Option<Arc<[f32]>>) -> Result<NoiseSpec> {
        let bernoulli = Estimator::Bernoulli {
            strata: self.strata,
        };
        let count = Estimator::Count {
            probs: self.count_probs.clone(),
            stratum: self.stratum,
        };
        let kinds = [
            ("bernoulli", &bernoulli),
            ("count", &count),
            ("full", &Estimator::Full),
        ];
        let spec = NoiseSpec::new(
            self.schedule.build()?,
            named("estimator", &self.estimator, &kinds)?.clone(),
            self.clip,
            self.resample,
            Weighting::parse(&self.weighting, self.weighting_k)?,
            gamma,
        )?;
        Ok(match self.time_conditioned {
            true => spec.for_time_conditioned(),
            false => spec,
        })
    }
}

/// Position of a row in a run; its random numbers depend on nothing else.
#[derive(Clone, Copy, Debug)]
pub struct NoiseKey {
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u64,
    /// Index of the row in the global batch.
    pub row: u64,
    /// Rows of the global batch.
    pub rows: u64,
}

/// Specification of the noise: checked when it is made, immutable, shared between threads.
#[derive(Clone, Debug)]
pub struct NoiseSpec {
    pub(super) schedule: Schedule,
    pub(super) estimator: Estimator,
    pub(super) clip: Option<(f64, f64)>,
    pub(super) resample: bool,
    pub(super) weighting: Weighting,
    pub(super) gamma: Option<Arc<[f32]>>,
    pub(super) time_conditioned: bool,
    pub(super) tables: CountTables,
}

impl NoiseSpec {
    /// Builds a specification from parts that go together.
    ///
    /// `clip` restricts t to U[a, b], with a = 0 meaning 1e-3 and U[1, 1] meaning
    /// [`Estimator::Full`]. `resample` also forces each block's masked share into [a, b].
    /// `gamma` is a factor for each token id (frequency-informed masking).
    ///
    /// # Errors
    /// [`Error::Config`] that names the field.
    pub fn new(
        schedule: Schedule,
        mut estimator: Estimator,
        mut clip: Option<(f64, f64)>,
        mut resample: bool,
        weighting: Weighting,
        gamma: Option<Arc<[f32]>>,
    ) -> Result<Self> {
        if let Some((a, b)) = clip {
            let shown = format!("[{a}, {b}]");
            if !(0.0 <= a && a <= b && b <= 1.0 && b > 0.0) {
                return Err(Error::config(
                    "clip",
                    shown,
                    "[a, b] with 0 <= a <= b <= 1 and b > 0",
                ));
            }
            if a == 1.0 {
                // Every share is 1, so resampling has no effect.
                (estimator, clip, resample) = (Estimator::Full, None, false);
            } else if estimator == Estimator::Full {
                return Err(Error::config(
                    "clip",
                    shown,
                    "left out with the full estimator, which masks everything",
                ));
            } else {
                let a = a.max(MIN_LEVEL);
                if a >= b {
                    return Err(Error::config(
                        "clip",
                        shown,
                        format!(
                            "[a, b] with a < b, where a is at least {MIN_LEVEL}; or [1, 1], which masks all"
                        ),
                    ));
                }
                clip = Some((a, b));
            }
        }
        let bernoulli = matches!(estimator, Estimator::Bernoulli { .. });
        if resample && (clip.is_none() || !bernoulli) {
            return Err(Error::config(
                "resample",
                true,
                "false unless the estimator is bernoulli and has a clip",
            ));
        }
        if gamma.is_some() && (!bernoulli || resample) {
            return Err(Error::config(
                "gamma",
                "given",
                "left out unless the estimator is bernoulli, without resample",
            ));
        }
        if let Some(gamma) = &gamma
            && !gamma.iter().all(|g| g.is_finite() && *g > 0.0)
        {
            return Err(Error::config(
                "gamma",
                "given",
                "greater than 0 for every token",
            ));
        }
        if !schedule.is_monotone() && (clip.is_some() || !bernoulli) {
            return Err(Error::config(
                "paper_weights",
                true,
                "false unless the estimator is bernoulli without a clip: its p(t) has no inverse",
            ));
        }
        if let Estimator::Count { probs, stratum } = &estimator {
            if let Some(q) = probs
                && (q.is_empty() || !q.iter().all(|x| x.is_finite() && *x > 0.0))
            {
                return Err(Error::config(
                    "count_probs",
                    "given",
                    "greater than 0 for every k",
                ));
            }
            if let Some((j, r)) = stratum
                && j >= r
            {
                return Err(Error::config(
                    "stratum",
                    format!("({j}, {r})"),
                    "(index, number) with index < number",
                ));
            }
        }
        Ok(NoiseSpec {
            schedule,
            estimator,
            clip,
            resample,
            weighting,
            gamma,
            time_conditioned: false,
            tables: CountTables::default(),
        })
    }

    /// The noise of a model that reads the level of each block.
    ///
    /// Its loss depends on the level that is drawn with a count, and so does the reweighting: each
    /// block is weighted by w̃ at its own level. The mean of w̃ given the count, which other models
    /// take, would be another objective.
    pub fn for_time_conditioned(mut self) -> Self {
        self.time_conditioned = true;
        self
    }

    /// The schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The estimator; a clip of [1, 1] has become [`Estimator::Full`].
    pub fn estimator(&self) -> &Estimator {
        &self.estimator
    }

    /// Checks the specification against the shape of the rows, once a batch.
    ///
    /// # Errors
    /// A block size that is 0 or does not divide the rows, a clip that no k/S fits, q of another
    /// length than S, or a factor table that is shorter than the vocabulary.
    pub fn check(&self, seq_len: usize, block_size: usize) -> Result<()> {
        if seq_len == 0 {
            return Err(Error::config("seq_len", 0, "at least 1"));
        }
        if block_size == 0 || !seq_len.is_multiple_of(block_size) {
            return Err(Error::config(
                "block_size",
                block_size,
                format!("a divisor of seq_len = {seq_len}"),
            ));
        }
        if self.resample {
            let (lo, hi) = self.count_bounds(block_size);
            if lo > hi || hi == 0 {
                let (a, b) = self.clip.unwrap_or((0.0, 1.0));
                return Err(Error::config(
                    "clip",
                    format!("[{a}, {b}]"),
                    format!("around a k/{block_size} of k >= 1, or resample leaves no loss"),
                ));
            }
        }
        if let Estimator::Count { probs: Some(q), .. } = &self.estimator
            && q.len() != block_size
        {
            return Err(Error::config(
                "count_probs",
                format!("{} numbers", q.len()),
                format!("one for each k = 1..={block_size}"),
            ));
        }
        Ok(())
    }

    /// The level interval of t.
    pub(super) fn interval(&self) -> (f64, f64) {
        self.clip.unwrap_or((MIN_LEVEL, 1.0))
    }

    /// Counts k with a ≤ k/n ≤ b; a bound at 1e-3 or 1 does not bind. Empty when lo > hi.
    pub(super) fn count_bounds(&self, n: usize) -> (usize, usize) {
        let (a, b) = self.interval();
        let slack = 1e-9; // 0.3·10 must count as 3 despite rounding
        let lo = if a <= MIN_LEVEL {
            0
        } else {
            (a * n as f64 - slack).ceil() as usize
        };
        let hi = if b >= 1.0 {
            n
        } else {
            (b * n as f64 + slack).floor() as usize
        };
        (lo, hi)
    }
}
