//! Counter-based random streams (Philox4x32-10, Salmon et al. 2011).
//!
//! The numbers of a row are a function of (seed, step, row) alone, never of worker, rank, thread or
//! micro-batch. Only strata also read the number of rows of the global batch.

use crate::cpu::multiversion::multiversion;

const M0: u64 = 0xD251_1F53;
const M1: u64 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Use of a stream; streams of different domains never share a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Noise levels and masked counts: one draw or two a block.
    Level = 1,
    /// Masked positions: one draw a position.
    Mask = 2,
    /// Assignment of strata to (row, block).
    Strata = 3,
    /// Order of the rows of an epoch.
    Order = 4,
    /// Dropout masks: 16 bits an element.
    Dropout = 5,
}

/// The ten rounds of Philox4x32.
#[inline]
pub fn philox(mut c: [u32; 4], mut k: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = M0 * u64::from(c[0]);
        let p1 = M1 * u64::from(c[2]);
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [k[0].wrapping_add(W0), k[1].wrapping_add(W1)];
    }
    c
}

/// A 64-bit finaliser (SplitMix64): spreads a key over all bits.
#[inline]
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A key for one (seed, domain, step), for permutations and streams.
#[inline]
pub fn key_of(seed: u64, domain: Domain, step: u64) -> u64 {
    mix(mix(seed ^ (u64::from(domain as u32) << 56)) ^ step)
}

/// A number in (0, 1) from 32 bits.
#[inline(always)]
pub fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) * (1.0 / 4_294_967_296.0)
}

/// The random numbers of one row at one step, read in order.
#[derive(Clone, Debug)]
pub struct Stream {
    key: [u32; 2],
    row: [u32; 2],
    block: u64,
    buffer: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream of a row: `row` is its index in the global batch.
    pub fn new(seed: u64, domain: Domain, step: u64, row: u64) -> Self {
        let key = key_of(seed, domain, step);
        Stream {
            key: [key as u32, (key >> 32) as u32],
            row: [row as u32, (row >> 32) as u32],
            block: 0,
            buffer: [0; 4],
            used: 4,
        }
    }

    #[inline]
    fn counter(&self, block: u64) -> [u32; 4] {
        [block as u32, (block >> 32) as u32, self.row[0], self.row[1]]
    }

    /// The next 32 bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = philox(self.counter(self.block), self.key);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// A double in [0, 1) with 53 random bits.
    #[inline]
    pub fn next_f64(&mut self) -> f64 {
        let high = u64::from(self.next_u32() >> 5);
        let low = u64::from(self.next_u32() >> 6);
        ((high << 26) | low) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Fills a slice with whole blocks of four, from the next fresh one on.
    pub fn fill(&mut self, out: &mut [u32]) {
        self.used = 4;
        fill_blocks(self.key, self.row, self.block, out);
        self.block += out.len().div_ceil(4) as u64;
    }
}

multiversion! {
    fn fill_blocks(key: [u32; 2], row: [u32; 2], first: u64, out: &mut [u32]) {
        const LANES: usize = 8;
        const LOW: u64 = 0xFFFF_FFFF;
        let mut block = first;
        let mut chunks = out.chunks_exact_mut(4 * LANES);
        // The compiler vectorises over lanes. A lane is 64 bits wide because the multiplication
        // reads and writes 64 bits; the upper half is masked off where it would count.
        #[allow(clippy::needless_range_loop)]
        for chunk in &mut chunks {
            let mut c = [[0u64; LANES]; 4];
            for lane in 0..LANES {
                let at = block + lane as u64;
                c[0][lane] = at;
                c[1][lane] = at >> 32;
            }
            c[2] = [u64::from(row[0]); LANES];
            c[3] = [u64::from(row[1]); LANES];
            let mut k = key;
            for _ in 0..10 {
                let (k0, k1) = (u64::from(k[0]), u64::from(k[1]));
                for lane in 0..LANES {
                    let p0 = M0 * (c[0][lane] & LOW);
                    let p1 = M1 * (c[2][lane] & LOW);
                    c[0][lane] = (p1 >> 32) ^ c[1][lane] ^ k0;
                    c[1][lane] = p1;
                    c[2][lane] = (p0 >> 32) ^ c[3][lane] ^ k1;
                    c[3][lane] = p0;
                }
                k = [k[0].wrapping_add(W0), k[1].wrapping_add(W1)];
            }
            for lane in 0..LANES {
                for word in 0..4 {
                    chunk[4 * lane + word] = c[word][lane] as u32;
                }
            }
            block += LANES as u64;
        }
        for group in chunks.into_remainder().chunks_mut(4) {
            let words = philox([block as u32, (block >> 32) as u32, row[0], row[1]], key);
            block += 1;
            group.copy_from_slice(&words[..group.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer tests of the Random123 distribution.
    #[test]
    fn philox_known_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn fill_equals_one_by_one() {
        for n in [1, 3, 4, 63, 64, 65, 200] {
            let mut filled = vec![0; n];
            Stream::new(7, Domain::Mask, 3, 11).fill(&mut filled);
            let mut stream = Stream::new(7, Domain::Mask, 3, 11);
            let single: Vec<u32> = (0..n).map(|_| stream.next_u32()).collect();
            assert_eq!(filled, single);
        }
    }

    #[test]
    fn streams_differ_in_every_coordinate() {
        let first = |seed, domain, step, row| Stream::new(seed, domain, step, row).next_u32();
        let base = first(1, Domain::Mask, 1, 1);
        assert_ne!(base, first(2, Domain::Mask, 1, 1));
        assert_ne!(base, first(1, Domain::Level, 1, 1));
        assert_ne!(base, first(1, Domain::Mask, 2, 1));
        assert_ne!(base, first(1, Domain::Mask, 1, 2));
    }

    #[test]
    fn doubles_fill_the_unit_interval() {
        let mut stream = Stream::new(0, Domain::Level, 0, 0);
        let draws: Vec<f64> = (0..20_000).map(|_| stream.next_f64()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        assert!((mean - 0.5).abs() < 0.01);
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
    }
}
