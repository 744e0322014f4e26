//! A keyed permutation of `0..n`, evaluated one index at a time: shuffling without a table.

use crate::cpu::multiversion::multiversion;
use crate::random::mix;

/// A pseudo-random bijection of `0..n`, fixed by its key: a Feistel network over the next power of
/// two, walked until it lands inside (fewer than two walks on average).
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    left_bits: u32,
    right_bits: u32,
    rounds: usize,
    keys: [u32; MAX_ROUNDS],
}

/// Rounds over a large domain, and over one whose halves hold few bits: with 8 rounds the places of
/// an index are visibly uneven at 3 bits. Both are even, so that halves of unequal width end where
/// they began.
const ROUNDS: usize = 8;
const MAX_ROUNDS: usize = 20;
const SMALL_BITS: u32 = 8;

impl Permutation {
    /// The permutation of `0..n` named by `key`; `n` of 0 permutes nothing.
    ///
    /// # Panics
    /// Where `n` is above 2⁶³.
    pub fn new(n: u64, key: u64) -> Self {
        assert!(n <= 1 << 63, "a permutation of {n}");
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut state = mix(key);
        let keys = std::array::from_fn(|_| {
            state = mix(state);
            state as u32
        });
        Permutation {
            n,
            left_bits: bits / 2,
            right_bits: bits - bits / 2,
            rounds: if bits < SMALL_BITS {
                MAX_ROUNDS
            } else {
                ROUNDS
            },
            keys,
        }
    }

    /// Number of indices.
    pub fn len(&self) -> u64 {
        self.n
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// The place of index `i < n`.
    #[inline]
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mut x = i;
        loop {
            x = self.forward(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// The index at place `j < n`.
    pub fn inverse(&self, j: u64) -> u64 {
        debug_assert!(j < self.n);
        let mut x = j;
        loop {
            x = self.backward(x);
            if x < self.n {
                return x;
            }
        }
    }

    /// The places of the indices from `first` on.
    pub fn fill(&self, first: u64, out: &mut [u64]) {
        debug_assert!(first + out.len() as u64 <= self.n);
        if self.n <= 1 << 32 {
            fill_narrow(self, first as u32, out);
        } else {
            for (i, place) in out.iter_mut().enumerate() {
                *place = self.at(first + i as u64);
            }
        }
    }

    #[inline]
    fn forward(&self, x: u64) -> u64 {
        let (mut lb, mut rb) = (self.left_bits, self.right_bits);
        let (mut l, mut r) = ((x >> rb) as u32, x as u32 & low(rb));
        for key in &self.keys[..self.rounds] {
            (l, r) = (r, (l ^ scramble(r ^ key)) & low(lb));
            (lb, rb) = (rb, lb);
        }
        (u64::from(l) << rb) | u64::from(r)
    }

    fn backward(&self, x: u64) -> u64 {
        let (mut lb, mut rb) = (self.left_bits, self.right_bits);
        let (mut l, mut r) = ((x >> rb) as u32, x as u32 & low(rb));
        for key in self.keys[..self.rounds].iter().rev() {
            // One forward round took (l', r') to (r', l' ^ F(r')).
            (l, r) = ((r ^ scramble(l ^ key)) & low(rb), l);
            (lb, rb) = (rb, lb);
        }
        (u64::from(l) << rb) | u64::from(r)
    }
}

multiversion! {
    fn fill_narrow(permutation: &Permutation, first: u32, out: &mut [u64]) {
        const LANES: usize = 32;
        let p = permutation;
        let (left, right) = (low(p.left_bits), low(p.right_bits));
        let last = (p.n - 1) as u32;
        for (chunk, places) in out.chunks_mut(LANES).enumerate() {
            let mut x = [0u32; LANES];
            for (lane, x) in x.iter_mut().enumerate() {
                // Lanes beyond the end stay inside the domain.
                *x = last.min(first.wrapping_add((chunk * LANES + lane) as u32));
            }
            // The loop below is then compiled over whole vectors; else the first pass shuffles lanes.
            let mut x = std::hint::black_box(x);
            let mut inside = [0u32; LANES];
            let mut found = [false; LANES];
            loop {
                let mut l = x.map(|x| x >> p.right_bits);
                let mut r = x.map(|x| x & right);
                for pair in p.keys[..p.rounds].as_chunks::<2>().0 {
                    for lane in 0..LANES {
                        l[lane] = (l[lane] ^ scramble(r[lane] ^ pair[0])) & left;
                    }
                    for lane in 0..LANES {
                        r[lane] = (r[lane] ^ scramble(l[lane] ^ pair[1])) & right;
                    }
                }
                let mut all = true;
                for lane in 0..LANES {
                    x[lane] = l[lane] << p.right_bits | r[lane];
                    let now = x[lane] <= last;
                    inside[lane] = if found[lane] { inside[lane] } else { x[lane] };
                    found[lane] |= now;
                    all &= found[lane];
                }
                if all {
                    break;
                }
            }
            for (place, x) in places.iter_mut().zip(inside) {
                *place = u64::from(x);
            }
        }
    }
}

/// A 32-bit hash of two multiplications (the constants are Wellons's `lowbias32`).
#[inline(always)]
fn scramble(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

#[inline(always)]
fn low(bits: u32) -> u32 {
    ((1u64 << bits) - 1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_a_bijection(n in 1u64..3000, key: u64) {
            let p = Permutation::new(n, key);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let j = p.at(i);
                prop_assert!(!std::mem::replace(&mut seen[j as usize], true));
                prop_assert_eq!(p.inverse(j), i);
            }
        }

        #[test]
        fn many_at_once_are_one_by_one(n in 1u64..5000, key: u64, a: prop::sample::Index, b: prop::sample::Index) {
            let p = Permutation::new(n, key);
            let (a, b) = (a.index(n as usize + 1) as u64, b.index(n as usize + 1) as u64);
            let range = a.min(b)..a.max(b);
            let mut places = vec![0; (range.end - range.start) as usize];
            p.fill(range.start, &mut places);
            prop_assert_eq!(places, range.map(|i| p.at(i)).collect::<Vec<_>>());
        }

        #[test]
        fn large_domains_invert(n in 1u64 << 33..1 << 40, key: u64, i: u64) {
            let p = Permutation::new(n, key);
            prop_assert_eq!(p.inverse(p.at(i % n)), i % n);
        }
    }

    /// Each index lands in each place equally often over the keys (chi-square, 25 degrees).
    #[test]
    fn keys_spread_every_index() {
        let (n, keys) = (6u64, 6000u64);
        let mut counts = [[0f64; 6]; 6];
        for key in 0..keys {
            let p = Permutation::new(n, key);
            for i in 0..n {
                counts[i as usize][p.at(i) as usize] += 1.0;
            }
        }
        let expected = keys as f64 / n as f64;
        let chi: f64 = counts
            .iter()
            .flatten()
            .map(|c| (c - expected).powi(2) / expected)
            .sum();
        // 0.1% point
        assert!(chi < 52.6, "chi-square {chi}");
    }

    /// Each pair of neighbours comes to each pair of places equally often (chi-square).
    #[test]
    fn keys_spread_every_pair() {
        for (n, keys, limit) in [(4u64, 6000u64, 31.3), (8, 11_200, 93.2), (9, 14_400, 113.6)] {
            let mut counts = vec![0f64; (n * n) as usize];
            for key in 0..keys {
                let p = Permutation::new(n, key);
                counts[(p.at(0) * n + p.at(1)) as usize] += 1.0;
            }
            let pairs = (n * (n - 1)) as f64;
            let expected = keys as f64 / pairs;
            let chi: f64 = (0..n * n)
                .filter(|i| i / n != i % n)
                .map(|i| (counts[i as usize] - expected).powi(2) / expected)
                .sum();
            // 0.1% points of 11, 55 and 71 degrees
            assert!(chi < limit, "n = {n}: chi-square {chi}");
        }
    }
}
