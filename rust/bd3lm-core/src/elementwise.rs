//! What a Transformer does to each number alone, in one pass over memory: the bias and activation
//! after a product, the bias, dropout and sum after another, and the gradients of both.

use crate::attention::{pool, scratch};
use crate::error::{Error, Result};
use crate::rng::{Domain, Stream};
use crate::simd::multiversion;
use crate::softmax::{Stored, exp_inside};
use std::ops::Range;

/// Numbers, about, that one thread takes at a time.
const CHUNK: usize = 1 << 14;
/// Numbers whose random bits lie together: two in a word, from either half of the tile.
const TILE: usize = 256;
/// Tiles whose bits are made together: short calls are mostly preparation.
const TILES: usize = 8;

/// Slope of the logistic that stands in for GELU's tanh: 2·√(2/π).
const SLOPE: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

/// 1/(1+e^−z).
#[inline(always)]
fn logistic(z: f32) -> f32 {
    1.0 / (1.0 + exp_inside((-z).clamp(-87.0, 87.0)))
}

/// x·logistic(2√(2/π)·(x + 0.044715x³)).
#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    x * logistic(SLOPE * x * (CUBIC * x).mul_add(x, 1.0))
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
            *x = squared_relu_with_slope(*x).0;
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

/// What the MLP does to a feature between its two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pointwise {
    /// x·Φ(x), tanh-approximated: x·logistic(2√(2/π)·(x + 0.044715x³)).
    Gelu,
    /// max(x, 0)².
    SquaredRelu,
}

/// `out` = f(`x` + `bias`).
///
/// * `x`, `out` [R, W]; `bias` [W].
///
/// # Errors
/// Buffers that do not fit together.
pub fn activate<T: Stored>(
    f: Pointwise,
    x: &[T],
    bias: &[f32],
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    let width = bias.len();
    same("out", x.len(), out.len())?;
    whole_rows("x", x.len(), width)?;
    let out = Shared(out.as_mut_ptr());
    in_groups(x.len(), width, threads, |_, span| {
        // SAFETY: groups are disjoint and inside `out`, which is borrowed for the whole call.
        let out = unsafe { out.part(span.start, span.len()) };
        T::activate(f, &x[span], bias, out);
    });
    Ok(())
}

/// The activation again, and the gradients of what went into it.
///
/// * `x` [R, W]; `bias` [W].
/// * `d` [R, W]: the gradient of f(`x` + `bias`), which becomes that of `x`.
/// * `out` [R, W] receives f(`x` + `bias`), and `d_bias` [W] the sum of the gradient over rows.
///
/// # Errors
/// Buffers that do not fit together.
pub fn activate_backward<T: Stored>(
    f: Pointwise,
    (x, bias): (&[T], &[f32]),
    d: &mut [T],
    out: &mut [T],
    d_bias: &mut [f32],
    threads: usize,
) -> Result<()> {
    let width = bias.len();
    same("d", x.len(), d.len())?;
    same("out", x.len(), out.len())?;
    same("d_bias", width, d_bias.len())?;
    whole_rows("x", x.len(), width)?;
    let (d, out) = (Shared(d.as_mut_ptr()), Shared(out.as_mut_ptr()));
    sum_of_groups(x.len(), width, d_bias, threads, |_, span, d_bias| {
        // SAFETY: as in `activate`.
        let (d, out) = unsafe {
            (
                d.part(span.start, span.len()),
                out.part(span.start, span.len()),
            )
        };
        T::activate_backward(f, (&x[span], bias), d, out, d_bias);
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
    /// Drops with probability `p`, to the nearest 2⁻¹⁶; none are drawn for p = 0.
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

    /// Calls `f(position, column, factors)` for pieces of the rows of a group, from its start on:
    /// the factors are 0 or 1/(1−p).
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
    /// * `h`, `x`, `out` [R, W]; `bias` [W].
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
        same("h", x.len(), h.len())?;
        same("out", x.len(), out.len())?;
        whole_rows("x", x.len(), width)?;
        let out = Shared(out.as_mut_ptr());
        in_groups(x.len(), width, threads, |group, span| {
            // SAFETY: as in `activate`.
            let out = unsafe { out.part(span.start, span.len()) };
            self.pieces(group, span.len(), width, |at, column, factors| {
                let here = at..at + factors.len();
                let (h, x) = (
                    &h[span.clone()][here.clone()],
                    &x[span.clone()][here.clone()],
                );
                let bias = &bias[column..column + factors.len()];
                T::scaled_sum(h, x, bias, factors, &mut out[here]);
            });
        });
        Ok(())
    }

    /// Gradients of the sum with respect to `x` and `bias`, given its own.
    ///
    /// * `d_out` [R, W]; `d_x` [R, W] and `d_bias` [W] are filled.
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
        same("d_x", d_out.len(), d_x.len())?;
        whole_rows("d_out", d_out.len(), width)?;
        let d_x = Shared(d_x.as_mut_ptr());
        sum_of_groups(
            d_out.len(),
            width,
            d_bias,
            threads,
            |group, span, d_bias| {
                // SAFETY: as in `activate`.
                let d_x = unsafe { d_x.part(span.start, span.len()) };
                self.pieces(group, span.len(), width, |at, column, factors| {
                    let here = at..at + factors.len();
                    let d_bias = &mut d_bias[column..column + factors.len()];
                    T::scaled(
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

/// `sum` += `x`, or `sum` = `x` if it is the `first`.
///
/// # Errors
/// Buffers of different sizes.
pub fn add_to<T: Stored>(sum: &mut [f32], x: &[T], first: bool, threads: usize) -> Result<()> {
    same("sum", x.len(), sum.len())?;
    let sum = Shared(sum.as_mut_ptr());
    in_groups(x.len(), 1, threads, |_, span| {
        // SAFETY: as in `activate`.
        let sum = unsafe { sum.part(span.start, span.len()) };
        T::add_to(sum, &x[span], first);
    });
    Ok(())
}

/// The loops over numbers that are stored in one width, compiled for each instruction set.
pub trait Loops: Sized {
    /// See [`activate`].
    fn activate(f: Pointwise, x: &[Self], bias: &[f32], out: &mut [Self]);
    /// See [`activate_backward`]; adds to `d_bias`.
    fn activate_backward(
        f: Pointwise,
        inputs: (&[Self], &[f32]),
        d: &mut [Self],
        out: &mut [Self],
        d_bias: &mut [f32],
    );
    /// `out` = `h` + `factors`·(`x` + `bias`).
    fn scaled_sum(h: &[f32], x: &[Self], bias: &[f32], factors: &[f32], out: &mut [f32]);
    /// `out` = `factors`·`x`, also added to `sum`.
    fn scaled(x: &[f32], factors: &[f32], out: &mut [Self], sum: &mut [f32]);
    /// See [`add_to`].
    fn add_to(sum: &mut [f32], x: &[Self], first: bool);
}

/// GELU and its slope at `x`.
#[inline(always)]
fn gelu_with_slope(x: f32) -> (f32, f32) {
    let square = CUBIC * x * x;
    let s = logistic(SLOPE * x * (1.0 + square));
    let slope = square.mul_add(3.0 * SLOPE, SLOPE);
    (x * s, s * (x * (1.0 - s)).mul_add(slope, 1.0))
}

/// max(x, 0)² and its slope at `x`; a NaN stays one.
#[inline(always)]
fn squared_relu_with_slope(x: f32) -> (f32, f32) {
    let positive = if x < 0.0 { 0.0 } else { x };
    (positive * positive, 2.0 * positive)
}

macro_rules! loops {
    ($t:ty) => {
        impl Loops for $t {
            fn activate(f: Pointwise, x: &[Self], bias: &[f32], out: &mut [Self]) {
                multiversion! {
                    fn run(f: Pointwise, x: &[$t], bias: &[f32], out: &mut [$t]) {
                        let rows = out.chunks_exact_mut(bias.len()).zip(x.chunks_exact(bias.len()));
                        for (out, x) in rows {
                            match f {
                                Pointwise::Gelu => for ((out, x), b) in out.iter_mut().zip(x).zip(bias) {
                                    *out = <$t>::of(gelu_of(x.get() + b));
                                },
                                Pointwise::SquaredRelu => for ((out, x), b) in out.iter_mut().zip(x).zip(bias) {
                                    *out = <$t>::of(squared_relu_with_slope(x.get() + b).0);
                                },
                            }
                        }
                    }
                }
                run(f, x, bias, out);
            }

            fn activate_backward(
                f: Pointwise,
                inputs: (&[Self], &[f32]),
                d: &mut [Self],
                out: &mut [Self],
                d_bias: &mut [f32],
            ) {
                #[inline(always)]
                fn row(
                    f: impl Fn(f32) -> (f32, f32),
                    (x, bias): (&[$t], &[f32]),
                    d: &mut [$t],
                    out: &mut [$t],
                    d_bias: &mut [f32],
                ) {
                    let width = bias.len();
                    let (x, d) = (&x[..width], &mut d[..width]);
                    let (out, d_bias) = (&mut out[..width], &mut d_bias[..width]);
                    for i in 0..width {
                        let (value, slope) = f(x[i].get() + bias[i]);
                        let gradient = d[i].get() * slope;
                        out[i] = <$t>::of(value);
                        d[i] = <$t>::of(gradient);
                        d_bias[i] += gradient;
                    }
                }
                multiversion! {
                    fn run(
                        f: Pointwise,
                        inputs: (&[$t], &[f32]),
                        d: &mut [$t],
                        out: &mut [$t],
                        d_bias: &mut [f32],
                    ) {
                        let (x, bias) = inputs;
                        for start in (0..x.len()).step_by(bias.len()) {
                            let inputs = (&x[start..], bias);
                            let (d, out) = (&mut d[start..], &mut out[start..]);
                            match f {
                                Pointwise::Gelu => row(gelu_with_slope, inputs, d, out, d_bias),
                                Pointwise::SquaredRelu => {
                                    row(squared_relu_with_slope, inputs, d, out, d_bias);
                                }
                            }
                        }
                    }
                }
                run(f, inputs, d, out, d_bias);
            }

            fn scaled_sum(h: &[f32], x: &[Self], bias: &[f32], factors: &[f32], out: &mut [f32]) {
                multiversion! {
                    fn run(h: &[f32], x: &[$t], bias: &[f32], factors: &[f32], out: &mut [f32]) {
                        let size = out.len();
                        let (h, x, bias, factors) =
                            (&h[..size], &x[..size], &bias[..size], &factors[..size]);
                        for i in 0..size {
                            out[i] = h[i] + factors[i] * (x[i].get() + bias[i]);
                        }
                    }
                }
                run(h, x, bias, factors, out);
            }

            fn scaled(x: &[f32], factors: &[f32], out: &mut [Self], sum: &mut [f32]) {
                multiversion! {
                    fn run(x: &[f32], factors: &[f32], out: &mut [$t], sum: &mut [f32]) {
                        let size = out.len();
                        let (x, factors, sum) = (&x[..size], &factors[..size], &mut sum[..size]);
                        for i in 0..size {
                            let d = factors[i] * x[i];
                            out[i] = <$t>::of(d);
                            sum[i] += d;
                        }
                    }
                }
                run(x, factors, out, sum);
            }

            fn add_to(sum: &mut [f32], x: &[Self], first: bool) {
                multiversion! {
                    fn run(sum: &mut [f32], x: &[$t], first: bool) {
                        for (sum, x) in sum.iter_mut().zip(x) {
                            *sum = if first { x.get() } else { *sum + x.get() };
                        }
                    }
                }
                run(sum, x, first);
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

/// Checks that there are whole rows.
///
/// # Errors
/// There are not.
pub(crate) fn whole_rows(name: &'static str, len: usize, width: usize) -> Result<()> {
    if width > 0 && len.is_multiple_of(width) {
        return Ok(());
    }
    let allowed = format!("needs whole rows of {width}");
    Err(Error::config(name, format!("{len} numbers"), allowed))
}

/// `f(group, span)` for groups of whole rows, which one thread takes at a time.
pub(crate) fn in_groups(
    len: usize,
    width: usize,
    threads: usize,
    f: impl Fn(usize, Range<usize>) + Sync,
) {
    let size = (CHUNK / width).max(1) * width;
    pool::parallel(threads, len.div_ceil(size), |group| {
        f(group, group * size..len.min((group + 1) * size));
    });
}

/// As [`in_groups`], with room that each group adds a row to; `total` is their sum, in an order
/// that does not depend on the number of threads.
pub(crate) fn sum_of_groups(
    len: usize,
    width: usize,
    total: &mut [f32],
    threads: usize,
    f: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
) {
    /// More would cost more than they even out.
    const PARTS: usize = 32;
    let size = (CHUNK / width).max(1) * width;
    let groups = len.div_ceil(size);
    let together = groups.div_ceil(PARTS).max(1);
    let parts = groups.div_ceil(together);
    scratch::with(&[parts * total.len()], |scratch| {
        let sums = scratch.slice(parts * total.len());
        sums.fill(0.0);
        let shared = Shared(sums.as_mut_ptr());
        pool::parallel(threads, parts, |part| {
            // SAFETY: each part has a row of its own.
            let sum = unsafe { shared.part(part * total.len(), total.len()) };
            for group in part * together..groups.min((part + 1) * together) {
                f(group, group * size..len.min((group + 1) * size), sum);
            }
        });
        total.fill(0.0);
        for sum in sums.chunks_exact(total.len()) {
            total.iter_mut().zip(sum).for_each(|(total, x)| *total += x);
        }
    });
}

/// A buffer that threads share by groups.
pub(crate) struct Shared<T>(pub *mut T);

// SAFETY: threads take disjoint parts.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// The part lies inside the buffer, and nobody else holds it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, first: usize, size: usize) -> &mut [T] {
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
    fn activations_equal_float64() {
        let relu2 = |x: f64| (x.max(0.0).powi(2), 2.0 * x.max(0.0));
        type Exact = fn(f64) -> (f64, f64);
        let both: [(Pointwise, Exact); 2] = [
            (Pointwise::Gelu, reference),
            (Pointwise::SquaredRelu, relu2),
        ];
        for (f, exact) in both {
            for (rows, width) in [(1, 1), (3, 17), (1, 1000), (300, 70)] {
                let x = grid(rows * width);
                let bias: Vec<f32> = (0..width).map(|i| (i % 3) as f32 - 1.0).collect();
                let d_out: Vec<f32> = (0..x.len()).map(|i| 1.0 + (i % 7) as f32).collect();
                let (mut out, mut again) = (vec![9.0; x.len()], vec![9.0; x.len()]);
                let (mut d, mut d_bias) = (d_out.clone(), vec![9.0; width]);
                activate(f, &x, &bias, &mut out, 2).unwrap();
                activate_backward(f, (&x, &bias), &mut d, &mut again, &mut d_bias, 2).unwrap();
                let (mut sums, mut sizes) = (vec![0f64; width], vec![0f64; width]);
                for i in 0..x.len() {
                    let (want, slope) = exact(f64::from(x[i] + bias[i % width]));
                    let size = 1.0 + want.abs();
                    assert!((f64::from(out[i]) - want).abs() < 2e-6 * size, "{}", x[i]);
                    assert!((f64::from(again[i]) - want).abs() < 2e-6 * size, "{}", x[i]);
                    let want = f64::from(d_out[i]) * slope;
                    assert!((f64::from(d[i]) - want).abs() < 2e-5 * size, "{}", x[i]);
                    sums[i % width] += want;
                    sizes[i % width] += want.abs() + 1.0;
                }
                for i in 0..width {
                    assert!((f64::from(d_bias[i]) - sums[i]).abs() < 2e-5 * sizes[i]);
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        let (rows, width) = (501, 70);
        let x = grid(rows * width);
        let bias = grid(width);
        let narrow: Vec<i16> = x.iter().map(|x| i16::of(*x)).collect();
        let dropout = Dropout::new(5, 0.3).unwrap();
        let run = |threads| {
            let (mut a, mut b, mut c) = (vec![0f32; x.len()], narrow.clone(), vec![0f32; x.len()]);
            let (mut out, mut d_bias) =
                (vec![0i16; x.len()], [vec![0f32; width], vec![0f32; width]]);
            let gelu = Pointwise::Gelu;
            activate(gelu, &x, &bias, &mut a, threads).unwrap();
            let inputs = (&narrow[..], &bias[..]);
            activate_backward(gelu, inputs, &mut b, &mut out, &mut d_bias[0], threads).unwrap();
            dropout.add(&x, &narrow, &bias, &mut c, threads).unwrap();
            dropout
                .backward(&x, &mut out, &mut d_bias[1], threads)
                .unwrap();
            add_to(&mut c, &narrow, false, threads).unwrap();
            let mut d = a.clone();
            squared_relu_in_place(&mut d);
            silu_times(&mut d, &x);
            (a, b, c, d, out, d_bias)
        };
        let results = crate::simd::tests::at_each(|| run(1));
        assert_eq!(results.len(), 3);
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(results[0].3.iter().any(|x| *x != 0.0));
        assert!(run(3) == results[0]);
    }

    /// Numbers and results lie between pages that no one may touch.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::attention::tests::guarded::Guarded;
        let dropout = Dropout::new(5, 0.3).unwrap();
        let f = Pointwise::Gelu;
        for (rows, width, at_end) in [(1, 1, true), (5, 255, false), (3, 1003, true)] {
            let new = |bytes: usize| Guarded::new(&vec![1; bytes * rows * width], at_end);
            let row = || Guarded::new(&vec![1; 4 * width], at_end);
            let (mut x, mut narrow, mut out) = (new(4), new(2), new(4));
            let (mut bias, mut d_bias) = (row(), row());
            crate::simd::tests::at_each(|| {
                activate(f, new(4).f32s(), row().f32s(), new(4).f32s(), 1).unwrap();
            });
            let inputs = (&*x.f32s(), &*bias.f32s());
            activate_backward(f, inputs, new(4).f32s(), out.f32s(), d_bias.f32s(), 2).unwrap();
            dropout
                .add(x.f32s(), narrow.i16s(), bias.f32s(), out.f32s(), 2)
                .unwrap();
            dropout
                .backward(x.f32s(), narrow.i16s(), d_bias.f32s(), 2)
                .unwrap();
            add_to(x.f32s(), narrow.i16s(), false, 2).unwrap();
        }
    }

    #[test]
    fn gelu_of_bf16_is_the_rounded_one() {
        let bits: Vec<i16> = grid(4000).into_iter().map(i16::of).collect();
        let wide: Vec<f32> = bits.iter().map(|x| x.get()).collect();
        let (mut narrow, mut out) = (vec![0i16; 4000], vec![0f32; 4000]);
        activate(Pointwise::Gelu, &bits, &[0.0; 40], &mut narrow, 1).unwrap();
        activate(Pointwise::Gelu, &wide, &[0.0; 40], &mut out, 1).unwrap();
        for (a, b) in narrow.iter().zip(out) {
            assert_eq!(*a, i16::of(b));
        }
    }

    #[test]
    fn the_first_is_put_and_the_others_are_added() {
        let (x, mut total) = ([i16::of(1.5), i16::of(-2.0)], [9.0f32, f32::NAN]);
        add_to(&mut total, &x, true, 1).unwrap();
        assert_eq!(total, [1.5, -2.0]);
        add_to(&mut total, &[1.0f32, 0.25], false, 1).unwrap();
        assert_eq!(total, [2.5, -1.75]);
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
        let message = |r: Result<()>| r.unwrap_err().to_string();
        let gelu = |x: usize, width: usize, out: usize| {
            let (x, bias) = (vec![0f32; x], vec![0f32; width]);
            message(activate(
                Pointwise::Gelu,
                &x,
                &bias,
                &mut vec![0f32; out],
                1,
            ))
        };
        assert!(gelu(4, 2, 3).contains("out = 3 numbers"));
        assert!(gelu(3, 2, 3).contains("x = 3 numbers: needs whole rows of 2"));
        assert!(gelu(3, 0, 3).contains("needs whole rows of 0"));
        let dropout = Dropout::new(0, 0.5).unwrap();
        let wrong = dropout.backward(&[0f32; 3], &mut [0i16; 4], &mut [0.0; 3], 1);
        assert!(message(wrong).contains("needs 3"));
        assert!(Dropout::new(0, 1.0).is_err() && Dropout::new(0, -0.5).is_err());
    }
}
