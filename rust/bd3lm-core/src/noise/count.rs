//! The `count` estimator: a masked count a block, and a uniform subset of that size.

use std::sync::Arc;

use statrs::function::beta::{beta_reg, ln_beta};

use super::root::root;
use super::row::{Row, Scratch};
use super::spec::{Estimator, NoiseSpec};
use super::tables::CountTable;
use super::weighting::Weighting;
use crate::error::{Error, Result};
use crate::random::unit;

impl NoiseSpec {
    pub(super) fn count(&self, stratum: Option<(u32, u32)>, row: Row<'_>, scratch: &mut Scratch) {
        let blocks = row.weight.len();
        let s = row.block_size;
        let choice = &mut scratch.choice;
        choice.clear();
        let mut table: Option<(usize, Arc<CountTable>)> = None;
        for (b, n) in scratch.live.iter().enumerate() {
            let n = *n as usize;
            if n == 0 {
                choice.counts.push(0);
                row.weight[b] = 0.0;
                continue;
            }
            let table = match &table {
                Some((size, table)) if *size == n => table,
                _ => {
                    &table
                        .insert((n, self.tables.get(n, || self.make_table(n))))
                        .1
                }
            };
            let mut u = unit(scratch.levels[b]);
            if let Some((j, r)) = stratum {
                u = (f64::from(j) + u) / f64::from(r);
            }
            let below = match &table.cumulative {
                None => (u * n as f64) as usize,
                Some(cumulative) => cumulative.iter().filter(|c| **c <= u).count(),
            };
            let k = 1 + below.min(n - 1);
            choice.counts.push(k as u32);
            row.weight[b] = table.weight[k - 1];
        }
        choice.run(&scratch.random, row.noisable, s, row.mask);
        match self.clip {
            // The k-th smallest of n uniform numbers is Beta(k, n−k+1), independent of which it is.
            None => row.mask_prob.copy_from_slice(&choice.largest),
            Some(clip) => {
                for (b, n) in scratch.live.iter().enumerate() {
                    row.mask_prob[b] = match choice.counts[b] as usize {
                        0 => 0.0,
                        k => {
                            let v = unit(scratch.levels[blocks + b]);
                            self.level_given_count(k, *n as usize, clip, v) as f32
                        }
                    };
                }
            }
        }
        if self.weighs_levels() {
            for (weight, p) in row.weight.iter_mut().zip(&*row.mask_prob) {
                if *weight > 0.0 {
                    let p = f64::from(*p);
                    let t = self.schedule.inverse(p).unwrap_or(p);
                    *weight *= self.weighting.at(&self.schedule, t, p) as f32;
                }
            }
        }
    }

    /// Returns whether w̃ is taken at the level of each block, and not averaged given its count.
    fn weighs_levels(&self) -> bool {
        self.time_conditioned && self.weighting != Weighting::Nelbo
    }

    /// p given k masked of n: Beta(k, n−k+1), restricted to the clip.
    pub(super) fn level_given_count(&self, k: usize, n: usize, (a, b): (f64, f64), v: f64) -> f64 {
        let (x, y) = (k as f64, (n - k + 1) as f64);
        let (pa, pb) = (
            self.schedule.mask_prob(a),
            self.schedule.mask_prob(b).min(1.0),
        );
        let (lo, hi) = (beta_reg(x, y, pa), beta_reg(x, y, pb));
        let goal = lo + (hi - lo) * v;
        let norm = ln_beta(x, y);
        let excess = |p: f64| {
            let slope = ((x - 1.0) * p.ln() + (y - 1.0) * (1.0 - p).ln() - norm).exp();
            (beta_reg(x, y, p) - goal, slope)
        };
        root(excess, (pa, pb), x / (x + y))
    }

    /// Loss weight of a masked token of a block of n noisable tokens that is noised twice, by a
    /// subset and by its complement: entry j−1 belongs to a view with j masked tokens.
    ///
    /// A view has j tokens with probability q(j) + q(n−j), and the two views are added up
    /// (docs/math.md §5).
    ///
    /// # Errors
    /// [`Error::Config`] for another estimator, a weighting at levels, or a count above the fitted
    /// ones.
    pub fn complementary_weights(&self, n: usize) -> Result<Vec<f64>> {
        let Estimator::Count { probs, .. } = &self.estimator else {
            return Err(Error::config(
                "estimator",
                "bernoulli or full",
                "count, for complementary views",
            ));
        };
        if self.weighs_levels() {
            return Err(Error::config(
                "time_conditioned",
                true,
                "false with a weighting, for complementary views",
            ));
        }
        if probs.as_ref().is_some_and(|q| q.len() < n) {
            return Err(Error::config("n", n, "at most the block size"));
        }
        let q = self.count_probs(n);
        let views = |j: usize| q[j - 1] + if j < n { q[n - j - 1] } else { 0.0 };
        Ok((1..=n)
            .map(|j| self.count_factor(j, n) / (j as f64 * views(j)))
            .collect())
    }

    /// q(k) of a block of n noisable tokens, k = 1..=n.
    fn count_probs(&self, n: usize) -> Vec<f64> {
        match &self.estimator {
            Estimator::Count {
                probs: Some(probs), ..
            } => {
                let total: f64 = probs[..n].iter().sum();
                probs[..n].iter().map(|x| x / total).collect()
            }
            _ => vec![1.0 / n as f64; n],
        }
    }

    fn make_table(&self, n: usize) -> CountTable {
        let q = self.count_probs(n);
        let mut sum = 0.0;
        let add = |x: &f64| {
            sum += x;
            sum
        };
        let given = matches!(&self.estimator, Estimator::Count { probs: Some(_), .. });
        let cumulative = given.then(|| q.iter().map(add).collect());
        let weight = (1..=n)
            .map(|k| (self.count_factor(k, n) / (k as f64 * q[k - 1])) as f32)
            .collect();
        CountTable { cumulative, weight }
    }

    /// ∫ Beta(p; k, n−k+1)·w̃ dp over the clip, divided by its width in t (docs/math.md §3, §4);
    /// without w̃ where it is taken at the level.
    pub(super) fn count_factor(&self, k: usize, n: usize) -> f64 {
        let (x, y) = (k as f64, (n - k + 1) as f64);
        let (pa, pb, width) = match self.clip {
            None => (0.0, 1.0, 1.0),
            Some((a, b)) => (
                self.schedule.mask_prob(a),
                self.schedule.mask_prob(b).min(1.0),
                b - a,
            ),
        };
        if self.weighting == Weighting::Nelbo || self.weighs_levels() {
            return match self.clip {
                None => 1.0,
                Some(_) => (beta_reg(x, y, pb) - beta_reg(x, y, pa)) / width,
            };
        }
        // p = (1 − cos θ)/2 takes the roots at both ends away; the midpoint rule then converges
        // faster than any power of the step.
        const NODES: usize = 8192;
        let (from, to) = ((1.0 - 2.0 * pa).acos(), (1.0 - 2.0 * pb).acos());
        let step = (to - from) / NODES as f64;
        let norm = ln_beta(x, y);
        let sum: f64 = (0..NODES)
            .map(|i| {
                let theta = from + (i as f64 + 0.5) * step;
                let p = 0.5 * (1.0 - theta.cos());
                let density = ((x - 1.0) * p.ln() + (y - 1.0) * (1.0 - p).ln() - norm).exp();
                let t = self.schedule.inverse(p).unwrap_or(p);
                density * self.weighting.at(&self.schedule, t, p) * 0.5 * theta.sin()
            })
            .sum();
        sum * step / width
    }
}
