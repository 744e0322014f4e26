//! One row of an estimator, and the buffers that rows reuse.

use super::choice::Choice;
use super::spec::NoiseKey;
use crate::random::{Domain, Permutation, Stream};

/// Buffers that [`super::NoiseSpec::noise_row`] reuses from row to row.
#[derive(Default, Debug)]
pub struct Scratch {
    /// Words of the row's mask stream, one a token.
    pub(super) random: Vec<u32>,
    /// Words of the row's level stream, one a block; some estimators use a second one a block.
    pub(super) levels: Vec<u32>,
    /// Noisable tokens of each block.
    pub(super) live: Vec<u32>,
    /// Order of strata of the latest step, with its size and key.
    pub(super) permutation: Option<((u64, u64), Permutation)>,
    /// Number of each block's stratum.
    pub(super) strata: Vec<u64>,
    pub(super) t: Vec<f64>,
    pub(super) p: Vec<f64>,
    pub(super) w: Vec<f64>,
    /// Limit of each token's random word.
    pub(super) limits: Vec<u32>,
    /// Blocks that no allowed count fits.
    pub(super) unfit: Vec<usize>,
    pub(super) choice: Choice,
}

impl Scratch {
    /// Fills the random words of a row. `key.row` is its number in the global batch, so nothing
    /// depends on how the batch is cut.
    pub(super) fn draw(&mut self, key: &NoiseKey, tokens: usize, levels: usize) {
        self.random.resize(tokens, 0);
        self.levels.resize(levels, 0);
        Stream::new(key.seed, Domain::Mask, key.step, key.row).fill(&mut self.random);
        Stream::new(key.seed, Domain::Level, key.step, key.row).fill(&mut self.levels);
    }
}

/// Inputs and outputs of one row.
pub(super) struct Row<'a> {
    pub(super) block_size: usize,
    pub(super) ids: &'a [i64],
    pub(super) noisable: &'a [u8],
    pub(super) mask: &'a mut [u8],
    pub(super) mask_prob: &'a mut [f32],
    pub(super) weight: &'a mut [f32],
}
