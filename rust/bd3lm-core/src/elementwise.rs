//! What a Transformer does to each number alone, in one pass over memory: GELU and its gradient,
//! and dropout with the sum that follows it.

use crate::attention::pool;
use crate::error::{Error, Result};
use crate::rng::{Domain, Stream};
use crate::simd::multiversion;
use crate::softmax::{Stored, exp};

/// Numbers that one thread takes at a time; a multiple of [`TILE`].
const CHUNK: usize = 1 << 14;
/// Numbers whose random bits are made together.
const TILE: usize = 256;

/// Slope of the logistic that stands in for GELU's tanh: 2·√(2/π).
const SLOPE: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

/// 1/(1+e^−z).
#[inline(always)]
fn logistic(z: f32) -> f32 {
    let e = exp(-z.abs());
    let s = 1.0 / (1.0 + e);
    if z >= 0.0 { s } else { e * s }
}

/// x·logistic(2√(2/π)·(x + 0.044715x³)).
#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    x * logistic(SLOPE * x * (1.0 + CUBIC * x * x))
}

multiversion! {
    /// [`gelu`] of a few numbers where they are, by the calling thread.
    pub(crate) fn gelu_in_place(x: &mut [f32]) {
        for x in x {
            *x = gelu_of(*x);
        }
    }
}

multiversion! {
    /// max(x, 0)² of a few numbers where they are, by the calling thread.
    pub(crate) fn squared_relu_in_place(x: &mut [f32]) {
        for x in x {
            let positive = if *x < 0.0 { 0.0 } else { *x }; // a NaN stays one
            *x = positive * positive;
        }
    }
}

multiversion! {
    /// x·logistic(x)·`by` of a few numbers where they are, by the calling thread.
    pub(crate) fn silu_times(x: &mut [f32], by: &[f32]) {
        for (x, by) in x.iter_mut().zip(by) {
            *x = *x * logistic(*x) * by;
        }
    }
}

/// `out` = GELU(`x`), tanh-approximated: x·logistic(2√(2/π)·(x + 0.044715x³)).
///
/// # Errors
/// Buffers of different sizes.
pub fn gelu<T: Stored>(x: &[T], out: &mut [T], threads: usize) -> Result<()> {
    same("out", x.len(), out.len())?;
    let out = Shared(out.as_mut_ptr());
    in_chunks(x.len(), threads, |first, size| {
        // SAFETY: chunks are disjoint and inside `out`, which is borrowed for the whole call.
        let out = unsafe { out.part(first, size) };
        T::gelu(&x[first..first + size], out);
    });
    Ok(())
}

/// `d_x` = `d_out`·GELU′(`x`).
///
/// # Errors
/// Buffers of different sizes.
pub fn gelu_backward<T: Stored>(x: &[T], d_out: &[T], d_x: &mut [T], threads: usize) -> Result<()> {
    same("d_out", x.len(), d_out.len())?;
    same("d_x", x.len(), d_x.len())?;
    let d_x = Shared(d_x.as_mut_ptr());
    in_chunks(x.len(), threads, |first, size| {
        // SAFETY: as in `gelu`.
        let d_x = unsafe { d_x.part(first, size) };
        let span = first..first + size;
        T::gelu_backward(&x[span.clone()], &d_out[span], d_x);
    });
    Ok(())
}

/// Which numbers dropout keeps: a function of (seed, position), so that the backward pass draws
/// them again instead of remembering them.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    seed: u64,
    /// Dropped where 16 random bits are below this.
    threshold: u16,
    /// One over the probability of being kept.
    scale: f32,
}

impl Dropout {
    /// Drops with probability `p`, to the nearest 2⁻¹⁶.
    ///
    /// # Errors
    /// `p` outside [0, 1).
    pub fn new(seed: u64, p: f64) -> Result<Self> {
        let threshold = (p * 65536.0).round();
        if !(0.0..65536.0).contains(&threshold) {
            return Err(Error::config("p", p, "must be in [0, 1)"));
        }
        let scale = (65536.0 / (65536.0 - threshold)) as f32;
        Ok(Dropout {
            seed,
            threshold: threshold as u16,
            scale,
        })
    }

    /// Calls `f(position, factor)` for tiles of a chunk: the factors are 0 or 1/(1−p).
    #[inline]
    fn tiles(&self, first: usize, size: usize, mut f: impl FnMut(usize, &[f32])) {
        let chunk = (first / CHUNK) as u64;
        let mut stream = Stream::new(self.seed, Domain::Dropout, 0, chunk);
        let (mut bits, mut factors) = ([0u32; TILE / 2], [0f32; TILE]);
        for start in (0..size).step_by(TILE) {
            stream.fill(&mut bits);
            keep(&bits, self.threshold, self.scale, &mut factors);
            let end = size.min(start + TILE);
            f(start, &factors[..end - start]);
        }
    }

    /// `out` = `h` + dropout(`x`).
    ///
    /// # Errors
    /// Buffers of different sizes.
    pub fn add<T: Stored>(
        &self,
        h: &[f32],
        x: &[T],
        out: &mut [f32],
        threads: usize,
    ) -> Result<()> {
        same("h", x.len(), h.len())?;
        same("out", x.len(), out.len())?;
        let out = Shared(out.as_mut_ptr());
        in_chunks(x.len(), threads, |first, size| {
            // SAFETY: as in `gelu`.
            let out = unsafe { out.part(first, size) };
            self.tiles(first, size, |at, factors| {
                let span = first + at..first + at + factors.len();
                let out = &mut out[at..at + factors.len()];
                T::scaled_sum(&h[span.clone()], &x[span], factors, out);
            });
        });
        Ok(())
    }

    /// `d_x` = the gradient of the sum with respect to `x`, given its own.
    ///
    /// # Errors
    /// Buffers of different sizes.
    pub fn backward<T: Stored>(&self, d_out: &[f32], d_x: &mut [T], threads: usize) -> Result<()> {
        same("d_x", d_out.len(), d_x.len())?;
        let d_x = Shared(d_x.as_mut_ptr());
        in_chunks(d_out.len(), threads, |first, size| {
            // SAFETY: as in `gelu`.
            let d_x = unsafe { d_x.part(first, size) };
            self.tiles(first, size, |at, factors| {
                let d_out = &d_out[first + at..first + at + factors.len()];
                T::scaled(d_out, factors, &mut d_x[at..at + factors.len()]);
            });
        });
        Ok(())
    }
}

multiversion! {
    /// 0 where 16 bits are below the threshold, else the scale.
    fn keep(bits: &[u32], threshold: u16, scale: f32, factors: &mut [f32]) {
        let (low, high) = factors.split_at_mut(bits.len());
        for i in 0..bits.len() {
            low[i] = if (bits[i] as u16) < threshold { 0.0 } else { scale };
            high[i] = if ((bits[i] >> 16) as u16) < threshold { 0.0 } else { scale };
        }
    }
}

/// The loops over numbers that are stored in one width, compiled for each instruction set.
pub trait Loops: Sized {
    /// See [`gelu`].
    fn gelu(x: &[Self], out: &mut [Self]);
    /// See [`gelu_backward`].
    fn gelu_backward(x: &[Self], d_out: &[Self], d_x: &mut [Self]);
    /// `out` = `h` + `factors`·`x`.
    fn scaled_sum(h: &[f32], x: &[Self], factors: &[f32], out: &mut [f32]);
    /// `out` = `factors`·`x`.
    fn scaled(x: &[f32], factors: &[f32], out: &mut [Self]);
}

macro_rules! loops {
    ($t:ty) => {
        impl Loops for $t {
            fn gelu(x: &[Self], out: &mut [Self]) {
                multiversion! {
                    fn run(x: &[$t], out: &mut [$t]) {
                        for (out, x) in out.iter_mut().zip(x) {
                            *out = <$t>::of(gelu_of(x.get()));
                        }
                    }
                }
                run(x, out);
            }

            fn gelu_backward(x: &[Self], d_out: &[Self], d_x: &mut [Self]) {
                multiversion! {
                    fn run(x: &[$t], d_out: &[$t], d_x: &mut [$t]) {
                        for ((d_x, d_out), x) in d_x.iter_mut().zip(d_out).zip(x) {
                            let x = x.get();
                            let square = CUBIC * x * x;
                            let s = logistic(SLOPE * x * (1.0 + square));
                            let slope = SLOPE * (1.0 + 3.0 * square);
                            *d_x = <$t>::of(d_out.get() * s * (1.0 + x * (1.0 - s) * slope));
                        }
                    }
                }
                run(x, d_out, d_x);
            }

            fn scaled_sum(h: &[f32], x: &[Self], factors: &[f32], out: &mut [f32]) {
                multiversion! {
                    fn run(h: &[f32], x: &[$t], factors: &[f32], out: &mut [f32]) {
                        for (((out, h), x), f) in out.iter_mut().zip(h).zip(x).zip(factors) {
                            *out = h + f * x.get();
                        }
                    }
                }
                run(h, x, factors, out);
            }

            fn scaled(x: &[f32], factors: &[f32], out: &mut [Self]) {
                multiversion! {
                    fn run(x: &[f32], factors: &[f32], out: &mut [$t]) {
                        for ((out, x), f) in out.iter_mut().zip(x).zip(factors) {
                            *out = <$t>::of(f * x);
                        }
                    }
                }
                run(x, factors, out);
            }
        }
    };
}

loops!(f32);
loops!(i16);

/// Checks a buffer's size.
///
/// # Errors
/// It holds another number of values.
pub(crate) fn same(name: &'static str, wanted: usize, got: usize) -> Result<()> {
    if wanted == got {
        return Ok(());
    }
    Err(Error::config(
        name,
        format!("{got} numbers"),
        format!("needs {wanted}"),
    ))
}

/// `f(first, size)` for each chunk of `len` numbers.
fn in_chunks(len: usize, threads: usize, f: impl Fn(usize, usize) + Sync) {
    pool::parallel(threads, len.div_ceil(CHUNK), |item| {
        let first = item * CHUNK;
        f(first, CHUNK.min(len - first));
    });
}

/// A buffer that threads share by chunks.
struct Shared<T>(*mut T);

// SAFETY: threads take disjoint chunks.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// The part lies inside the buffer, and nobody else holds it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, first: usize, size: usize) -> &mut [T] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 / n as f32 - 0.5) * 24.0).collect()
    }

    fn reference(x: f64) -> (f64, f64) {
        let c = (2.0 / std::f64::consts::PI).sqrt();
        let t = (c * (x + 0.044715 * x.powi(3))).tanh();
        let slope = 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x);
        (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + slope)
    }

    #[test]
    fn gelu_equals_float64() {
        for n in [1usize, 17, 1000, CHUNK + 5] {
            let x = grid(n);
            let d_out: Vec<f32> = (0..n).map(|i| 1.0 + (i % 7) as f32).collect();
            let (mut out, mut d_x) = (vec![9.0; n], vec![9.0; n]);
            gelu(&x, &mut out, 2).unwrap();
            gelu_backward(&x, &d_out, &mut d_x, 2).unwrap();
            for i in 0..n {
                let (want, slope) = reference(f64::from(x[i]));
                assert!((f64::from(out[i]) - want).abs() < 2e-6, "{}", x[i]);
                let want = f64::from(d_out[i]) * slope;
                assert!((f64::from(d_x[i]) - want).abs() < 2e-5, "{}", x[i]);
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x = grid(1003);
        let narrow: Vec<i16> = x.iter().map(|x| i16::of(*x)).collect();
        let dropout = Dropout::new(5, 0.3).unwrap();
        let results = crate::simd::tests::at_each(|| {
            let (mut a, mut b, mut c) = (vec![0f32; 1003], vec![0i16; 1003], vec![0f32; 1003]);
            gelu(&x, &mut a, 1).unwrap();
            gelu_backward(&narrow, &narrow, &mut b, 1).unwrap();
            dropout.add(&x, &narrow, &mut c, 1).unwrap();
            let mut d = a.clone();
            squared_relu_in_place(&mut d);
            silu_times(&mut d, &x);
            (a, b, c, d)
        });
        assert_eq!(results.len(), 3);
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(results[0].3.iter().any(|x| *x != 0.0));
    }

    /// Numbers and results lie between pages that no one may touch.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::attention::tests::guarded::Guarded;
        let dropout = Dropout::new(5, 0.3).unwrap();
        for (n, at_end) in [(1, true), (255, false), (1003, true), (CHUNK + 3, true)] {
            let new = |width: usize| Guarded::new(&vec![1; width * n], at_end);
            let (mut x, mut narrow, mut out) = (new(4), new(2), new(4));
            crate::simd::tests::at_each(|| gelu(new(4).f32s(), new(4).f32s(), 1).unwrap());
            gelu_backward(x.f32s(), new(4).f32s(), out.f32s(), 2).unwrap();
            dropout.add(x.f32s(), narrow.i16s(), out.f32s(), 2).unwrap();
            dropout.backward(x.f32s(), narrow.i16s(), 2).unwrap();
        }
    }

    #[test]
    fn gelu_of_bf16_is_the_rounded_one() {
        let bits: Vec<i16> = grid(4000).into_iter().map(i16::of).collect();
        let wide: Vec<f32> = bits.iter().map(|x| x.get()).collect();
        let (mut narrow, mut out) = (vec![0i16; 4000], vec![0f32; 4000]);
        gelu(&bits, &mut narrow, 1).unwrap();
        gelu(&wide, &mut out, 1).unwrap();
        for (a, b) in narrow.iter().zip(out) {
            assert_eq!(*a, i16::of(b));
        }
    }

    #[test]
    fn dropout_keeps_its_share_and_its_mean_and_repeats_itself() {
        let n = 3 * CHUNK + 77;
        let dropout = Dropout::new(5, 0.1).unwrap();
        let (h, x) = (vec![2.0f32; n], vec![1.0f32; n]);
        let mut out = vec![0.0; n];
        dropout.add(&h, &x, &mut out, 3).unwrap();
        let kept = out.iter().filter(|v| **v > 2.0).count();
        let share = kept as f64 / n as f64;
        assert!((share - 0.9).abs() < 4.0 * (0.09 / n as f64).sqrt());
        let scale = 65536.0 / (65536.0 - 6554.0);
        assert!(
            out.iter()
                .all(|v| *v == 2.0 || (v - 2.0 - scale).abs() < 1e-6)
        );
        let mut d_x = vec![0.0f32; n];
        dropout.backward(&x, &mut d_x, 1).unwrap();
        for (d, v) in d_x.iter().zip(&out) {
            assert_eq!(*d > 0.0, *v > 2.0);
        }
        let mut other = vec![0.0; n];
        let again = Dropout::new(6, 0.1).unwrap();
        again.add(&h, &x, &mut other, 3).unwrap();
        let both = (0..n).filter(|i| out[*i] > 2.0 && other[*i] > 2.0).count();
        assert!((both as f64 / n as f64 - 0.81).abs() < 0.01);
        // Neighbours, halves of a tile and chunks are independent too.
        for lag in [1, TILE / 2, TILE, CHUNK] {
            let pairs = n - lag;
            let both = (0..pairs)
                .filter(|i| out[*i] > 2.0 && out[i + lag] > 2.0)
                .count();
            assert!((both as f64 / pairs as f64 - 0.81).abs() < 0.01, "{lag}");
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let message = |r: Result<()>| r.unwrap_err().to_string();
        assert!(message(gelu(&[0f32; 3], &mut [0f32; 2], 1)).contains("out = 2 numbers"));
        let dropout = Dropout::new(0, 0.5).unwrap();
        assert!(message(dropout.backward(&[0f32; 3], &mut [0i16; 4], 1)).contains("needs 3"));
        assert!(Dropout::new(0, 1.0).is_err() && Dropout::new(0, -0.5).is_err());
    }
}
