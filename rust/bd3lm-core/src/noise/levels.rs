//! Levels of blocks, and independent masks of tokens.

use crate::cpu::multiversion::multiversion;
use crate::random::unit;

/// Words up to this one occur with probability p, to within 2⁻³².
#[inline(always)]
pub(super) fn limit(p: f64) -> u32 {
    // Adding 2⁵² rounds to an integer; unlike a conversion, it vectorises.
    let word = (p * 4_294_967_296.0 - 1.0).clamp(0.0, 4_294_967_295.0);
    (word + 4_503_599_627_370_496.0).to_bits() as u32
}

multiversion! {
    /// Number of noisable tokens of each block.
    pub(super) fn count_live(noisable: &[u8], block_size: usize, out: &mut [u32]) {
        #[inline(always)]
        fn add<const S: usize>(noisable: &[u8], out: &mut [u32]) {
            for (block, n) in noisable.as_chunks::<S>().0.iter().zip(out) {
                *n = block.iter().map(|x| u32::from(*x)).sum();
            }
        }
        match block_size {
            4 => {
                for (block, n) in noisable.as_chunks::<4>().0.iter().zip(out) {
                    // The highest byte receives the sum of all four.
                    *n = u32::from_le_bytes(*block).wrapping_mul(0x0101_0101) >> 24;
                }
            }
            8 => add::<8>(noisable, out),
            16 => add::<16>(noisable, out),
            _ => {
                for (block, n) in noisable.chunks(block_size).zip(out) {
                    *n = block.iter().map(|x| u32::from(*x)).sum();
                }
            }
        }
    }
}

multiversion! {
    /// t = b − (b−a)·(stratum + u)/total.
    pub(super) fn place_levels(strata: &[u64], words: &[u32], total: f64, interval: (f64, f64), t: &mut [f64]) {
        let (a, b) = interval;
        let scale = (b - a) / total;
        for ((t, stratum), word) in t.iter_mut().zip(strata).zip(words) {
            *t = (b - scale * (*stratum as f64 + unit(*word))).max(a);
        }
    }
}

multiversion! {
    pub(super) fn narrow(from: &[f64], to: &mut [f32]) {
        for (a, b) in to.iter_mut().zip(from) {
            *a = *b as f32;
        }
    }
}

multiversion! {
    /// The limit of each block for each of its tokens.
    pub(super) fn limits(p: &[f64], block_size: usize, out: &mut [u32]) {
        #[inline(always)]
        fn spread<const S: usize>(p: &[f64], out: &mut [u32]) {
            for (block, p) in out.as_chunks_mut::<S>().0.iter_mut().zip(p) {
                *block = [limit(*p); S];
            }
        }
        match block_size {
            1 => spread::<1>(p, out),
            2 => spread::<2>(p, out),
            4 => spread::<4>(p, out),
            8 => spread::<8>(p, out),
            16 => spread::<16>(p, out),
            _ => {
                for (block, p) in out.chunks_mut(block_size).zip(p) {
                    block.fill(limit(*p));
                }
            }
        }
    }
}

multiversion! {
    /// Masks the noisable tokens whose word is within its limit.
    pub(super) fn compare(random: &[u32], limits: &[u32], noisable: &[u8], mask: &mut [u8]) {
        for (((m, r), l), n) in mask.iter_mut().zip(random).zip(limits).zip(noisable) {
            *m = u8::from(r <= l) & n;
        }
    }
}

/// Limits for masks of probability p^{c·γ}, with c such that their mean over the block's noisable
/// tokens is p (docs/math.md §6).
pub(super) fn limits_by_frequency(
    p: f64,
    gamma: &[f32],
    ids: &[i64],
    noisable: &[u8],
    out: &mut [u32],
) {
    let factor = |id: i64| f64::from(gamma.get(id as usize).copied().unwrap_or(1.0));
    let log_p = p.ln();
    let n = noisable.iter().map(|x| f64::from(*x)).sum::<f64>();
    let mean = |c: f64| -> f64 {
        let pairs = ids.iter().zip(noisable).filter(|(_, n)| **n == 1);
        pairs
            .map(|(id, _)| (c * factor(*id) * log_p).exp())
            .sum::<f64>()
            / n
    };
    let c = if p >= 1.0 || n == 0.0 {
        1.0
    } else {
        bisect_decreasing(mean, p)
    };
    for (limit_of, id) in out.iter_mut().zip(ids) {
        *limit_of = limit((c * factor(*id) * log_p).exp());
    }
}

/// The c > 0 at which a decreasing function takes the value `goal`.
fn bisect_decreasing(f: impl Fn(f64) -> f64, goal: f64) -> f64 {
    let (mut lo, mut hi) = (0.0f64, 1.0f64);
    while f(hi) > goal && hi < 1e6 {
        hi *= 2.0;
    }
    for _ in 0..60 {
        let mid = 0.5 * (lo + hi);
        if f(mid) > goal {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    0.5 * (lo + hi)
}
