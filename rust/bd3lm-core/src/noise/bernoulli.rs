//! The `bernoulli` estimator: a level a block, and independent masks at that level. `resample`
//! draws their number from a truncated binomial.

use super::binomial::truncated_binomial;
use super::levels::{compare, limit, limits, limits_by_frequency, narrow, place_levels};
use super::row::{Row, Scratch};
use super::spec::{NoiseKey, NoiseSpec};
use super::weighting::Weighting;
use crate::random::{Domain, Permutation, key_of, unit};

impl NoiseSpec {
    pub(super) fn bernoulli(
        &self,
        key: &NoiseKey,
        strata: bool,
        row: Row<'_>,
        scratch: &mut Scratch,
    ) {
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
}
