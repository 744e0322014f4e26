//! Noise levels, masks and loss weights of a batch (docs/math.md §2 clip, §3, §4, §6).
//!
//! | module | contents |
//! | --- | --- |
//! | [`schedule`] | mask probability, NELBO weight and inverse of every noise schedule |
//! | [`weighting`] | training-only reweightings of the NELBO |
//! | `spec` | noise settings, and their checks |
//! | `bernoulli`, `count` | the estimators |
//! | `levels`, `choice`, `binomial` | levels and masks, subsets, truncated counts |

mod bernoulli;
mod binomial;
mod choice;
mod count;
mod levels;
mod root;
mod row;
pub mod schedule;
mod spec;
mod tables;
#[cfg(test)]
mod tests;
pub mod weighting;

pub use row::Scratch;
pub use schedule::{Schedule, ScheduleSettings};
pub use spec::{Estimator, NoiseKey, NoiseSettings, NoiseSpec};
pub use weighting::Weighting;

use levels::count_live;
use row::Row;

impl NoiseSpec {
    /// Noises one row of L tokens in blocks of S.
    ///
    /// * `ids`: the clean ids, read for frequency-informed masking alone.
    /// * `noisable`: 1 where a token may be noised.
    /// * `mask` `[L]` receives 1 where a token is masked.
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
}
