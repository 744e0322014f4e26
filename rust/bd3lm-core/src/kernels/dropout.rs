//! Fused bias, dropout and residual addition, forward and backward.

use crate::cpu::buffers::{Parts, check_len, in_groups, sum_of_groups, whole_rows};
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::Stored;
use crate::error::{Error, Result};
use crate::random::{Domain, Stream};

/// Elements of a tile of random bits: a word serves one element of either half.
const TILE: usize = 256;
/// Tiles generated per RNG call, to amortise its set-up.
const TILES: usize = 8;

/// A dropout mask, a function of (seed, position): the backward pass draws it again instead of
/// storing it.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    seed: u64,
    /// An element is dropped where its 16 random bits are below this.
    threshold: u16,
    /// One over the probability of being kept.
    scale: f32,
}

impl Dropout {
    /// Drops with probability `p`, rounded to a multiple of 2⁻¹⁶. p = 0 draws nothing.
    ///
    /// # Errors
    /// `p` outside [0, 1).
    pub fn new(seed: u64, p: f64) -> Result<Self> {
        let threshold = (p * 65536.0).round();
        if !(0.0..65536.0).contains(&threshold) {
            return Err(Error::config("p", p, "in [0, 1)"));
        }
        let scale = (65536.0 / (65536.0 - threshold)) as f32;
        Ok(Dropout {
            seed,
            threshold: threshold as u16,
            scale,
        })
    }

    /// Calls `f(position, column, factors)` for consecutive pieces of the rows of a group; factors
    /// are 0 or 1/(1−p).
    #[inline]
    fn pieces(
        &self,
        group: usize,
        size: usize,
        width: usize,
        mut f: impl FnMut(usize, usize, &[f32]),
    ) {
        let mut stream = Stream::new(self.seed, Domain::Dropout, 0, group as u64);
        let (mut bits, mut factors) = ([0u32; TILES * TILE / 2], [1f32; TILES * TILE]);
        let mut used = TILES;
        for row in (0..size).step_by(width) {
            for column in (0..width).step_by(TILE) {
                if used == TILES {
                    used = 0;
                    if self.threshold > 0 {
                        stream.fill(&mut bits);
                        keep(&bits, self.threshold, self.scale, &mut factors);
                    }
                }
                let tile = &factors[used * TILE..][..TILE.min(width - column)];
                used += 1;
                f(row + column, column, tile);
            }
        }
    }

    /// `out` = `h` + dropout(`x` + `bias`).
    ///
    /// * `h`, `x`, `out` [R, W]; `bias` `[W]`.
    ///
    /// # Errors
    /// Buffers that do not fit together.
    pub fn add<T: Stored>(
        &self,
        h: &[f32],
        x: &[T],
        bias: &[f32],
        out: &mut [f32],
        threads: usize,
    ) -> Result<()> {
        let width = bias.len();
        check_len("h", x.len(), h.len())?;
        check_len("out", x.len(), out.len())?;
        whole_rows("x", x.len(), width)?;
        let out = Parts::new(out);
        in_groups(x.len(), width, threads, |group, span| {
            // SAFETY: groups are disjoint and inside `out`, which is borrowed for the whole call.
            let out = unsafe { out.part(span.start, span.len()) };
            self.pieces(group, span.len(), width, |at, column, factors| {
                let here = at..at + factors.len();
                let (h, x) = (
                    &h[span.clone()][here.clone()],
                    &x[span.clone()][here.clone()],
                );
                let bias = &bias[column..column + factors.len()];
                scaled_sum(h, x, bias, factors, &mut out[here]);
            });
        });
        Ok(())
    }

    /// Gradients of the sum with respect to `x` and `bias`.
    ///
    /// * `d_out` [R, W]; `d_x` [R, W] and `d_bias` `[W]` are filled.
    ///
    /// # Errors
    /// Buffers that do not fit together.
    pub fn backward<T: Stored>(
        &self,
        d_out: &[f32],
        d_x: &mut [T],
        d_bias: &mut [f32],
        threads: usize,
    ) -> Result<()> {
        let width = d_bias.len();
        check_len("d_x", d_out.len(), d_x.len())?;
        whole_rows("d_out", d_out.len(), width)?;
        let d_x = Parts::new(d_x);
        sum_of_groups(
            d_out.len(),
            width,
            d_bias,
            threads,
            |group, span, d_bias| {
                // SAFETY: as in `add`.
                let d_x = unsafe { d_x.part(span.start, span.len()) };
                self.pieces(group, span.len(), width, |at, column, factors| {
                    let here = at..at + factors.len();
                    let d_bias = &mut d_bias[column..column + factors.len()];
                    scaled(
                        &d_out[span.clone()][here.clone()],
                        factors,
                        &mut d_x[here],
                        d_bias,
                    );
                });
            },
        );
        Ok(())
    }
}

multiversion! {
    /// 0 where 16 bits are below the threshold, else the scale.
    fn keep(bits: &[u32], threshold: u16, scale: f32, factors: &mut [f32]) {
        let (bits, _) = bits.as_chunks::<{ TILE / 2 }>();
        for (bits, factors) in bits.iter().zip(factors.chunks_exact_mut(TILE)) {
            let (low, high) = factors.split_at_mut(TILE / 2);
            for i in 0..TILE / 2 {
                low[i] = if (bits[i] as u16) < threshold { 0.0 } else { scale };
                high[i] = if ((bits[i] >> 16) as u16) < threshold { 0.0 } else { scale };
            }
        }
    }
}

multiversion! {
    /// `out` = `h` + `factors`·(`x` + `bias`).
    fn scaled_sum<T: Stored>(h: &[f32], x: &[T], bias: &[f32], factors: &[f32], out: &mut [f32]) {
        let size = out.len();
        let (h, x, bias, factors) =
            (&h[..size], &x[..size], &bias[..size], &factors[..size]);
        for i in 0..size {
            out[i] = h[i] + factors[i] * (x[i].get() + bias[i]);
        }
    }
}

multiversion! {
    /// `out` = `factors`·`x`, also added to `sum`.
    fn scaled<T: Stored>(x: &[f32], factors: &[f32], out: &mut [T], sum: &mut [f32]) {
        let size = out.len();
        let (x, factors, sum) = (&x[..size], &factors[..size], &mut sum[..size]);
        for i in 0..size {
            let d = factors[i] * x[i];
            out[i] = T::of(d);
            sum[i] += d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::buffers::CHUNK;

    fn grid(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 / n as f32 - 0.5) * 24.0).collect()
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        let (rows, width) = (501, 70);
        let (x, bias) = (grid(rows * width), grid(width));
        let narrow: Vec<i16> = x.iter().map(|x| i16::of(*x)).collect();
        let dropout = Dropout::new(5, 0.3).unwrap();
        let run = |threads| {
            let (mut sum, mut d_x) = (vec![0f32; x.len()], vec![0i16; x.len()]);
            let mut d_bias = vec![0f32; width];
            dropout.add(&x, &narrow, &bias, &mut sum, threads).unwrap();
            dropout
                .backward(&x, &mut d_x, &mut d_bias, threads)
                .unwrap();
            (sum, d_x, d_bias)
        };
        let results = crate::cpu::multiversion::tests::at_each(|| run(1));
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(run(3) == results[0]);
    }

    /// All buffers lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::cpu::guarded::Guarded;
        let dropout = Dropout::new(5, 0.3).unwrap();
        for (rows, width, at_end) in [(1, 1, true), (5, 255, false), (3, 1003, true)] {
            let new = |bytes: usize| Guarded::new(&vec![1; bytes * rows * width], at_end);
            let row = || Guarded::new(&vec![1; 4 * width], at_end);
            let (mut x, mut narrow, mut out) = (new(4), new(2), new(4));
            let (mut bias, mut d_bias) = (row(), row());
            dropout
                .add(x.f32s(), narrow.i16s(), bias.f32s(), out.f32s(), 2)
                .unwrap();
            dropout
                .backward(x.f32s(), narrow.i16s(), d_bias.f32s(), 2)
                .unwrap();
        }
    }

    #[test]
    fn dropout_keeps_its_share_and_its_mean_and_repeats_itself() {
        let width = 300;
        let n = width * 160;
        let dropout = Dropout::new(5, 0.1).unwrap();
        let (h, x, bias) = (vec![2.0f32; n], vec![0.75f32; n], vec![0.25f32; width]);
        let mut out = vec![0.0; n];
        dropout.add(&h, &x, &bias, &mut out, 3).unwrap();
        let kept = out.iter().filter(|v| **v > 2.0).count();
        let share = kept as f64 / n as f64;
        assert!((share - 0.9).abs() < 4.0 * (0.09 / n as f64).sqrt());
        let scale = 65536.0 / (65536.0 - 6554.0);
        assert!(
            out.iter()
                .all(|v| *v == 2.0 || (v - 2.0 - scale).abs() < 1e-6)
        );
        let (mut d_x, mut d_bias) = (vec![0.0f32; n], vec![9.0f32; width]);
        dropout
            .backward(&vec![1.0; n], &mut d_x, &mut d_bias, 1)
            .unwrap();
        for (d, v) in d_x.iter().zip(&out) {
            assert_eq!(*d > 0.0, *v > 2.0);
        }
        for (column, d) in d_bias.iter().enumerate() {
            let sum: f32 = d_x.iter().skip(column).step_by(width).sum();
            assert!((d - sum).abs() < 1e-3);
        }
        let mut other = vec![0.0; n];
        let again = Dropout::new(6, 0.1).unwrap();
        again.add(&h, &x, &bias, &mut other, 3).unwrap();
        let both = (0..n).filter(|i| out[*i] > 2.0 && other[*i] > 2.0).count();
        assert!((both as f64 / n as f64 - 0.81).abs() < 0.01);
        // Neighbours, halves of a tile, rows and groups are independent too.
        for lag in [1, TILE / 2, TILE, width, CHUNK / width * width] {
            let pairs = n - lag;
            let both = (0..pairs)
                .filter(|i| out[*i] > 2.0 && out[i + lag] > 2.0)
                .count();
            assert!((both as f64 / pairs as f64 - 0.81).abs() < 0.01, "{lag}");
        }
    }

    #[test]
    fn without_dropout_it_is_a_sum() {
        let (h, x) = ([1.0f32, 2.0, 3.0, 4.0], [0.5f32, -0.5, 1.0, 0.0]);
        let (mut out, mut d_x, mut d_bias) = ([0.0; 4], [0f32; 4], [0.0; 2]);
        let none = Dropout::new(1, 0.0).unwrap();
        none.add(&h, &x, &[10.0, 20.0], &mut out, 1).unwrap();
        assert_eq!(out, [11.5, 21.5, 14.0, 24.0]);
        none.backward(&h, &mut d_x, &mut d_bias, 1).unwrap();
        assert_eq!((d_x, d_bias), (h, [4.0, 6.0]));
    }

    #[test]
    fn wrong_input_is_named() {
        let dropout = Dropout::new(0, 0.5).unwrap();
        let wrong = dropout.backward(&[0f32; 3], &mut [0i16; 4], &mut [0.0; 3], 1);
        assert!(wrong.unwrap_err().to_string().contains("3 elements long"));
        assert!(Dropout::new(0, 1.0).is_err() && Dropout::new(0, -0.5).is_err());
    }
}
