//! Noise levels, masks and loss weights of a batch (MATH §2 clip, §3, §4, §6), row by row.

mod binomial;
mod choice;
mod levels;
pub mod schedule;
pub mod weighting;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use statrs::function::beta::{beta_reg, ln_beta};

use crate::error::{Error, Result};
use crate::noise::schedule::{MIN_LEVEL, Schedule, root};
use crate::noise::weighting::Weighting;
use crate::random::Permutation;
use crate::random::{Domain, Stream, key_of};
use binomial::truncated_binomial;
use choice::Choice;
use levels::{compare, count_live, limit, limits, limits_by_frequency, narrow, place_levels};

/// How the masked positions of a block are chosen.
#[derive(Clone, Debug, PartialEq)]
pub enum Estimator {
    /// A level t a block, independent masks of probability p(t), weight w(t): the paper's.
    Bernoulli {
        /// Spread the levels over equal strata of the global batch.
        strata: bool,
    },
    /// A masked count k, a uniform subset of that size, weight 1/(k·q(k)).
    Count {
        /// q(k) for k = 1..=S; `None` is uniform. A block with fewer noisable tokens uses the
        /// same numbers restricted to what it has, renormalised.
        probs: Option<Vec<f64>>,
        /// `(j, r)`: draw k from the j-th of r equal shares of its distribution.
        stratum: Option<(u32, u32)>,
    },
    /// Every noisable token masked with weight 1 (t ≡ 1).
    Full,
}

/// Where a row stands, which is all that its randomness depends on.
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

/// Buffers that [`NoiseSpec::noise_row`] reuses from row to row.
#[derive(Default, Debug)]
pub struct Scratch {
    /// A word a token, of the row's mask stream.
    random: Vec<u32>,
    /// A word a block, of the row's level stream; then a second one for each where that is needed.
    levels: Vec<u32>,
    /// Noisable tokens of each block.
    live: Vec<u32>,
    /// The latest step's order of strata, with its size and key.
    permutation: Option<((u64, u64), Permutation)>,
    /// Number of each block's stratum.
    strata: Vec<u64>,
    t: Vec<f64>,
    p: Vec<f64>,
    w: Vec<f64>,
    /// Limit of each token's random word.
    limits: Vec<u32>,
    /// Blocks that no allowed count fits.
    unfit: Vec<usize>,
    choice: Choice,
}

impl Scratch {
    fn draw(&mut self, key: &NoiseKey, tokens: usize, levels: usize) {
        self.random.resize(tokens, 0);
        self.levels.resize(levels, 0);
        Stream::new(key.seed, Domain::Mask, key.step, key.row).fill(&mut self.random);
        Stream::new(key.seed, Domain::Level, key.step, key.row).fill(&mut self.levels);
    }
}

/// What to draw: immutable, checked when it is made, safe to share between threads.
#[derive(Clone, Debug)]
pub struct NoiseSpec {
    schedule: Schedule,
    estimator: Estimator,
    clip: Option<(f64, f64)>,
    resample: bool,
    weighting: Weighting,
    gamma: Option<Arc<[f32]>>,
    /// Count weights by n, made on demand: entry k−1 is the loss weight of a count k.
    tables: Arc<Mutex<HashMap<usize, Arc<CountTable>>>>,
}

#[derive(Debug)]
struct CountTable {
    /// Of q(k); `None` where it is uniform.
    cumulative: Option<Vec<f64>>,
    weight: Vec<f32>,
}

impl NoiseSpec {
    /// Checks that the parts go together.
    ///
    /// `clip` restricts t to U[a, b], with a = 0 meaning 1e-3 and U[1, 1] meaning
    /// [`Estimator::Full`]. `resample` also forces each block's masked share into [a, b].
    /// `gamma` is a factor for each token id (frequency-informed masking).
    ///
    /// # Errors
    /// [`Error::Config`] naming the field and what is allowed.
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
                    "needs 0 <= a <= b <= 1 and b > 0",
                ));
            }
            if a == 1.0 {
                // Every share is 1, which is what resampling would ask for.
                (estimator, clip, resample) = (Estimator::Full, None, false);
            } else if estimator == Estimator::Full {
                return Err(Error::config(
                    "clip",
                    shown,
                    "the full estimator masks everything; a clip goes with bernoulli or count",
                ));
            } else {
                let a = a.max(MIN_LEVEL);
                if a >= b {
                    return Err(Error::config(
                        "clip",
                        shown,
                        format!(
                            "needs a < b, and a is at least {MIN_LEVEL}; [1, 1] masks everything"
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
                "goes with the bernoulli estimator and a clip",
            ));
        }
        if gamma.is_some() && (!bernoulli || resample) {
            return Err(Error::config(
                "gamma",
                "given",
                "frequency-informed masking goes with the bernoulli estimator, without resample",
            ));
        }
        if let Some(gamma) = &gamma
            && !gamma.iter().all(|g| g.is_finite() && *g > 0.0)
        {
            return Err(Error::config(
                "gamma",
                "given",
                "every factor must be greater than 0",
            ));
        }
        if !schedule.is_monotone() && (clip.is_some() || !bernoulli) {
            return Err(Error::config(
                "paper_weights",
                true,
                "goes with the bernoulli estimator and no clip: its p(t) has no inverse",
            ));
        }
        if let Estimator::Count { probs, stratum } = &estimator {
            if let Some(q) = probs
                && (q.is_empty() || !q.iter().all(|x| x.is_finite() && *x > 0.0))
            {
                return Err(Error::config(
                    "count_probs",
                    "given",
                    "every q(k) must be greater than 0",
                ));
            }
            if let Some((j, r)) = stratum
                && j >= r
            {
                return Err(Error::config(
                    "stratum",
                    format!("({j}, {r})"),
                    "needs index < number",
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
            tables: Arc::default(),
        })
    }

    /// The schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The estimator; a clip of [1, 1] has become [`Estimator::Full`].
    pub fn estimator(&self) -> &Estimator {
        &self.estimator
    }

    /// Checks what depends on the rows, once a batch.
    ///
    /// # Errors
    /// A block size that is 0 or does not divide the rows, a clip that no k/S fits, q of another
    /// length than S, or a factor table that is shorter than the vocabulary.
    pub fn check(&self, seq_len: usize, block_size: usize) -> Result<()> {
        if block_size == 0 || !seq_len.is_multiple_of(block_size) {
            return Err(Error::config(
                "block_size",
                block_size,
                format!("must divide seq_len = {seq_len}"),
            ));
        }
        if self.resample {
            let (lo, hi) = self.count_bounds(block_size);
            if lo > hi || hi == 0 {
                let (a, b) = self.clip.unwrap_or((0.0, 1.0));
                return Err(Error::config(
                    "clip",
                    format!("[{a}, {b}]"),
                    format!("holds no k/{block_size} of k >= 1, so resample leaves no loss"),
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

    /// Noises one row of L tokens in blocks of S.
    ///
    /// * `ids`: the clean ids, read for frequency-informed masking alone.
    /// * `noisable`: 1 where a token may be noised.
    /// * `mask` [L] receives 1 where a token is masked.
    /// * `mask_prob` [L/S] receives the level p of each block.
    /// * `weight` [L/S] receives the loss weight of each block's masked tokens: w(t), or
    ///   1/(k·q(k)), times the reweighting. A block with nothing to noise gets 0.
    #[allow(clippy::too_many_arguments)]
    pub fn noise_row(
        &self,
        key: &NoiseKey,
        ids: &[i64],
        noisable: &[u8],
        block_size: usize,
        mask: &mut [u8],
        mask_prob: &mut [f32],
        weight: &mut [f32],
        scratch: &mut Scratch,
    ) {
        if self.estimator == Estimator::Full {
            mask.copy_from_slice(noisable);
            mask_prob.fill(1.0);
            weight.fill(1.0);
            return;
        }
        let blocks = mask.len() / block_size;
        let counted = matches!(self.estimator, Estimator::Count { .. });
        let second = self.resample || (counted && self.clip.is_some());
        scratch.draw(key, mask.len(), blocks * if second { 2 } else { 1 });
        scratch.live.resize(blocks, 0);
        count_live(noisable, block_size, &mut scratch.live);
        let row = Row {
            block_size,
            ids,
            noisable,
            mask,
            mask_prob,
            weight,
        };
        match &self.estimator {
            Estimator::Bernoulli { strata } => self.bernoulli(key, *strata, row, scratch),
            Estimator::Count { stratum, .. } => self.count(*stratum, row, scratch),
            Estimator::Full => unreachable!("returned above"),
        }
    }

    /// The level interval of t.
    fn interval(&self) -> (f64, f64) {
        self.clip.unwrap_or((MIN_LEVEL, 1.0))
    }

    fn bernoulli(&self, key: &NoiseKey, strata: bool, row: Row<'_>, scratch: &mut Scratch) {
        let blocks = row.weight.len();
        scratch.strata.clear();
        scratch.strata.resize(blocks, 0);
        let mut total = 1;
        if strata {
            total = key.rows * blocks as u64;
            // All rows of a step share it.
            let of = (total, key_of(key.seed, Domain::Strata, key.step));
            let permutation = match &scratch.permutation {
                Some((known, permutation)) if *known == of => permutation,
                _ => {
                    &scratch
                        .permutation
                        .insert((of, Permutation::new(of.0, of.1)))
                        .1
                }
            };
            permutation.fill(key.row * blocks as u64, &mut scratch.strata);
        }
        for values in [&mut scratch.t, &mut scratch.p, &mut scratch.w] {
            values.resize(blocks, 0.0);
        }
        place_levels(
            &scratch.strata,
            &scratch.levels,
            total as f64,
            self.interval(),
            &mut scratch.t,
        );
        self.schedule
            .fill(&scratch.t, &mut scratch.p, &mut scratch.w);
        if self.weighting != Weighting::Nelbo {
            for ((t, p), w) in scratch.t.iter().zip(&scratch.p).zip(&mut scratch.w) {
                *w *= self.weighting.at(&self.schedule, *t, *p);
            }
        }
        narrow(&scratch.p, row.mask_prob);
        narrow(&scratch.w, row.weight);
        if self.resample {
            self.resample(row, scratch);
            return;
        }
        scratch.limits.resize(row.mask.len(), 0);
        match &self.gamma {
            None => limits(&scratch.p, row.block_size, &mut scratch.limits),
            Some(gamma) => {
                let blocks = (row.ids.chunks(row.block_size))
                    .zip(row.noisable.chunks(row.block_size))
                    .zip(scratch.limits.chunks_mut(row.block_size));
                for (block, p) in blocks.zip(&scratch.p) {
                    let ((ids, noisable), limits) = block;
                    limits_by_frequency(*p, gamma, ids, noisable, limits);
                }
            }
        }
        compare(&scratch.random, &scratch.limits, row.noisable, row.mask);
        for (weight, live) in row.weight.iter_mut().zip(&scratch.live) {
            *weight = if *live == 0 { 0.0 } else { *weight };
        }
    }

    /// Masks whose number in each block is binomial, truncated to the clip.
    fn resample(&self, row: Row<'_>, scratch: &mut Scratch) {
        let blocks = row.weight.len();
        let s = row.block_size;
        let full = self.count_bounds(s);
        let choice = &mut scratch.choice;
        choice.clear();
        scratch.unfit.clear();
        for (b, n) in scratch.live.iter().enumerate() {
            let n = *n as usize;
            if n == 0 {
                row.weight[b] = 0.0;
            }
            let (lo, hi) = if n == s { full } else { self.count_bounds(n) };
            let u = unit(scratch.levels[blocks + b]);
            let k = if lo <= hi {
                truncated_binomial(n, scratch.p[b], lo, hi, u)
            } else {
                scratch.unfit.push(b);
                0
            };
            choice.counts.push(k as u32);
        }
        choice.run(&scratch.random, row.noisable, s, row.mask);
        // A short block that no k fits has plain Bernoulli masks.
        for b in &scratch.unfit {
            let limit = limit(scratch.p[*b]);
            let at = b * s..(b + 1) * s;
            let words = (scratch.random[at.clone()].iter()).zip(&row.noisable[at.clone()]);
            for (mask, (word, n)) in row.mask[at].iter_mut().zip(words) {
                *mask = u8::from(*word <= limit) & n;
            }
        }
    }

    fn count(&self, stratum: Option<(u32, u32)>, row: Row<'_>, scratch: &mut Scratch) {
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
                _ => &table.insert((n, self.table(n))).1,
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
        let Some(clip) = self.clip else {
            // The k-th smallest of n uniform numbers is Beta(k, n−k+1), whichever they are.
            row.mask_prob.copy_from_slice(&choice.largest);
            return;
        };
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

    /// p given k masked of n: Beta(k, n−k+1), restricted to the clip.
    fn level_given_count(&self, k: usize, n: usize, (a, b): (f64, f64), v: f64) -> f64 {
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

    fn table(&self, n: usize) -> Arc<CountTable> {
        let mut tables = self.tables.lock().unwrap_or_else(|e| e.into_inner());
        tables
            .entry(n)
            .or_insert_with(|| Arc::new(self.make_table(n)))
            .clone()
    }

    fn make_table(&self, n: usize) -> CountTable {
        let q: Vec<f64> = match &self.estimator {
            Estimator::Count {
                probs: Some(probs), ..
            } => {
                let total: f64 = probs[..n].iter().sum();
                probs[..n].iter().map(|x| x / total).collect()
            }
            _ => vec![1.0 / n as f64; n],
        };
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

    /// ∫ Beta(p; k, n−k+1)·w̃ dp over the clip, divided by its width in t (MATH §3, §4).
    fn count_factor(&self, k: usize, n: usize) -> f64 {
        let (x, y) = (k as f64, (n - k + 1) as f64);
        let (pa, pb, width) = match self.clip {
            None => (0.0, 1.0, 1.0),
            Some((a, b)) => (
                self.schedule.mask_prob(a),
                self.schedule.mask_prob(b).min(1.0),
                b - a,
            ),
        };
        if self.weighting == Weighting::Nelbo {
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

    /// Counts k with a ≤ k/n ≤ b; a bound at 1e-3 or 1 does not bind. Empty when lo > hi.
    fn count_bounds(&self, n: usize) -> (usize, usize) {
        let (a, b) = self.interval();
        let slack = 1e-9; // 0.3·10 is 3, whatever the floating-point product says
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

/// One row: what is noised, and where the noise goes.
struct Row<'a> {
    block_size: usize,
    ids: &'a [i64],
    noisable: &'a [u8],
    mask: &'a mut [u8],
    mask_prob: &'a mut [f32],
    weight: &'a mut [f32],
}

/// A number in (0, 1) from 32 bits.
#[inline(always)]
fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) * (1.0 / 4_294_967_296.0)
}

#[cfg(test)]
mod tests;
