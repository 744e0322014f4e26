//! Uniform subsets of a given size, a block at a time.

use crate::cpu::multiversion::multiversion;
use crate::random::unit;

/// Uniform subsets of given sizes: in each block the tokens of the k smallest random words.
#[derive(Default, Debug)]
pub(super) struct Choice {
    /// Size of each block's subset, at most its noisable tokens.
    pub(super) counts: Vec<u32>,
    /// The largest word in it, as a number in (0, 1); 0 for the empty one.
    pub(super) largest: Vec<f32>,
    keys: Vec<u64>,
}

impl Choice {
    pub(super) fn clear(&mut self) {
        self.counts.clear();
        self.largest.clear();
    }

    pub(super) fn run(
        &mut self,
        random: &[u32],
        noisable: &[u8],
        block_size: usize,
        mask: &mut [u8],
    ) {
        self.largest.resize(self.counts.len(), 0.0);
        if block_size <= MAX_RANKED {
            choose_ranked(
                &self.counts,
                random,
                noisable,
                block_size,
                mask,
                &mut self.largest,
            );
            return;
        }
        let blocks = (random.chunks(block_size))
            .zip(noisable.chunks(block_size))
            .zip(mask.chunks_mut(block_size));
        for (b, ((random, noisable), mask)) in blocks.enumerate() {
            let k = self.counts[b] as usize;
            if k == 0 {
                mask.fill(0);
                continue;
            }
            // The position below the word makes keys distinct.
            self.keys.clear();
            let words = random.iter().zip(noisable).enumerate();
            let live = words.filter(|(_, (_, n))| **n == 1);
            self.keys
                .extend(live.map(|(i, (r, _))| u64::from(*r) << 32 | i as u64));
            let (_, largest, _) = self.keys.select_nth_unstable(k - 1);
            let largest = *largest;
            self.largest[b] = unit((largest >> 32) as u32) as f32;
            let words = random.iter().zip(noisable).enumerate();
            for (m, (i, (r, n))) in mask.iter_mut().zip(words) {
                *m = u8::from(u64::from(*r) << 32 | i as u64 <= largest) & n;
            }
        }
    }
}

/// Largest block whose tokens are ranked by comparing all pairs, S² vectorised comparisons.
const MAX_RANKED: usize = 32;

multiversion! {
    fn choose_ranked(
        counts: &[u32],
        random: &[u32],
        noisable: &[u8],
        block_size: usize,
        mask: &mut [u8],
        largest: &mut [f32],
    ) {
        match block_size {
            4 => ranked::<4>(counts, random, noisable, mask, largest),
            8 => ranked::<8>(counts, random, noisable, mask, largest),
            16 => ranked::<16>(counts, random, noisable, mask, largest),
            32 => ranked::<32>(counts, random, noisable, mask, largest),
            s => {
                for (b, mask) in mask.chunks_mut(s).enumerate() {
                    let at = b * s..(b + 1) * s;
                    let (mut words, mut live) = ([0; MAX_RANKED], [0; MAX_RANKED]);
                    words[..s].copy_from_slice(&random[at.clone()]);
                    live[..s].copy_from_slice(&noisable[at]);
                    let mut out = [0; MAX_RANKED];
                    let count = counts[b];
                    largest[b] = choose_block(count, &words, &live, &mut out);
                    mask.copy_from_slice(&out[..s]);
                }
            }
        }
    }
}

#[inline(always)]
fn ranked<const S: usize>(
    counts: &[u32],
    random: &[u32],
    noisable: &[u8],
    mask: &mut [u8],
    largest: &mut [f32],
) {
    let blocks = (random.as_chunks::<S>().0.iter())
        .zip(noisable.as_chunks::<S>().0)
        .zip(mask.as_chunks_mut::<S>().0)
        .zip(counts.iter().zip(largest));
    for (((random, noisable), mask), (count, largest)) in blocks {
        *largest = choose_block(*count, random, noisable, mask);
    }
}

#[inline(always)]
fn choose_block<const S: usize>(
    count: u32,
    random: &[u32; S],
    noisable: &[u8; S],
    mask: &mut [u8; S],
) -> f32 {
    // 26 random bits above the position, so that keys are distinct; clean tokens come last.
    let mut keys = [0u32; S];
    for i in 0..S {
        let dead = u32::from(noisable[i] ^ 1) << 31;
        keys[i] = (random[i] >> 6 << 5) | i as u32 | dead;
    }
    let mut ranks = [0u32; S];
    for key in keys {
        for i in 0..S {
            ranks[i] += u32::from(key < keys[i]);
        }
    }
    // Arithmetic instead of a comparison or a maximum, which would compile to an
    // unpredictable branch a token.
    let mut largest = 0;
    for i in 0..S {
        mask[i] = (ranks[i].wrapping_sub(count) >> 31) as u8;
        let last = u32::from(ranks[i] + 1 == count);
        largest |= (keys[i] >> 5) & last.wrapping_neg();
    }
    let level = (largest as f32 + 0.5) * (1.0 / 67_108_864.0);
    if count == 0 { 0.0 } else { level }
}
