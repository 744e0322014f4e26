//! Fused bias and activation of the MLP, forward and backward.

use crate::cpu::buffers::{Parts, check_len, in_groups, sum_of_groups, whole_rows};
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::{Stored, exp_inside};
use crate::error::{Result, named};

/// Slope of the logistic function that replaces GELU's tanh: 2·√(2/π).
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
    /// GELU in place, on the calling thread.
    fn gelu_in_place(x: &mut [f32]) {
        for x in x {
            *x = gelu_of(*x);
        }
    }
}

multiversion! {
    /// max(x, 0)² in place, on the calling thread.
    fn squared_relu_in_place(x: &mut [f32]) {
        for x in x {
            *x = squared_relu_with_slope(*x).0;
        }
    }
}

multiversion! {
    /// x·logistic(x)·`by` in place, on the calling thread.
    pub(crate) fn silu_times(x: &mut [f32], by: &[f32]) {
        for (x, by) in x.iter_mut().zip(by) {
            *x = *x * logistic(*x) * by;
        }
    }
}

/// An activation of each feature alone, between the two products of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·Φ(x), tanh-approximated: x·logistic(2√(2/π)·(x + 0.044715x³)).
    Gelu,
    /// max(x, 0)².
    SquaredRelu,
}

impl Activation {
    /// Every activation by its name.
    pub const ALL: [(&'static str, Activation); 2] = [
        ("gelu", Activation::Gelu),
        ("relu2", Activation::SquaredRelu),
    ];

    /// The activation of this name.
    ///
    /// # Errors
    /// An unknown name.
    pub fn parse(name: &str) -> Result<Self> {
        named("activation", name, &Activation::ALL)
    }

    /// Applies it in place, on the calling thread.
    pub(crate) fn in_place(self, x: &mut [f32]) {
        match self {
            Activation::Gelu => gelu_in_place(x),
            Activation::SquaredRelu => squared_relu_in_place(x),
        }
    }
}

/// `out` = f(`x` + `bias`).
///
/// * `x`, `out` [R, W]; `bias` `[W]`.
///
/// # Errors
/// Buffers that do not fit together.
pub fn activate<T: Stored>(
    f: Activation,
    x: &[T],
    bias: &[f32],
    out: &mut [T],
    threads: usize,
) -> Result<()> {
    let width = bias.len();
    check_len("out", x.len(), out.len())?;
    whole_rows("x", x.len(), width)?;
    let out = Parts::new(out);
    in_groups(x.len(), width, threads, |_, span| {
        // SAFETY: groups are disjoint and inside `out`, which is borrowed for the whole call.
        let out = unsafe { out.part(span.start, span.len()) };
        activate_rows(f, &x[span], bias, out);
    });
    Ok(())
}

/// Recomputes the activation, and the gradients of its inputs.
///
/// * `x` [R, W]; `bias` `[W]`.
/// * `d` [R, W]: the gradient of f(`x` + `bias`), which becomes that of `x`.
/// * `out` [R, W] receives f(`x` + `bias`), and `d_bias` `[W]` the sum of the gradient over rows.
///
/// # Errors
/// Buffers that do not fit together.
pub fn activate_backward<T: Stored>(
    f: Activation,
    (x, bias): (&[T], &[f32]),
    d: &mut [T],
    out: &mut [T],
    d_bias: &mut [f32],
    threads: usize,
) -> Result<()> {
    let width = bias.len();
    check_len("d", x.len(), d.len())?;
    check_len("out", x.len(), out.len())?;
    check_len("d_bias", width, d_bias.len())?;
    whole_rows("x", x.len(), width)?;
    let (d, out) = (Parts::new(d), Parts::new(out));
    sum_of_groups(x.len(), width, d_bias, threads, |_, span, d_bias| {
        // SAFETY: as in `activate`.
        let (d, out) = unsafe {
            (
                d.part(span.start, span.len()),
                out.part(span.start, span.len()),
            )
        };
        activate_rows_backward(f, (&x[span], bias), d, out, d_bias);
    });
    Ok(())
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

multiversion! {
    fn activate_rows<T: Stored>(f: Activation, x: &[T], bias: &[f32], out: &mut [T]) {
        let rows = out.chunks_exact_mut(bias.len()).zip(x.chunks_exact(bias.len()));
        for (out, x) in rows {
            match f {
                Activation::Gelu => for ((out, x), b) in out.iter_mut().zip(x).zip(bias) {
                    *out = T::of(gelu_of(x.get() + b));
                },
                Activation::SquaredRelu => for ((out, x), b) in out.iter_mut().zip(x).zip(bias) {
                    *out = T::of(squared_relu_with_slope(x.get() + b).0);
                },
            }
        }
    }
}

multiversion! {
    /// Adds to `d_bias`.
    fn activate_rows_backward<T: Stored>(
        f: Activation,
        inputs: (&[T], &[f32]),
        d: &mut [T],
        out: &mut [T],
        d_bias: &mut [f32],
    ) {
        let (x, bias) = inputs;
        for start in (0..x.len()).step_by(bias.len()) {
            let inputs = (&x[start..], bias);
            let (d, out) = (&mut d[start..], &mut out[start..]);
            match f {
                Activation::Gelu => row_backward(gelu_with_slope, inputs, d, out, d_bias),
                Activation::SquaredRelu => {
                    row_backward(squared_relu_with_slope, inputs, d, out, d_bias);
                }
            }
        }
    }
}

#[inline(always)]
fn row_backward<T: Stored>(
    f: impl Fn(f32) -> (f32, f32),
    (x, bias): (&[T], &[f32]),
    d: &mut [T],
    out: &mut [T],
    d_bias: &mut [f32],
) {
    let width = bias.len();
    let (x, d) = (&x[..width], &mut d[..width]);
    let (out, d_bias) = (&mut out[..width], &mut d_bias[..width]);
    for i in 0..width {
        let (value, slope) = f(x[i].get() + bias[i]);
        let gradient = d[i].get() * slope;
        out[i] = T::of(value);
        d[i] = T::of(gradient);
        d_bias[i] += gradient;
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
        let both: [(Activation, Exact); 2] = [
            (Activation::Gelu, reference),
            (Activation::SquaredRelu, relu2),
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
        let run = |threads| {
            let (mut a, mut b) = (vec![0f32; x.len()], narrow.clone());
            let (mut out, mut d_bias) = (vec![0i16; x.len()], vec![0f32; width]);
            let gelu = Activation::Gelu;
            activate(gelu, &x, &bias, &mut a, threads).unwrap();
            let inputs = (&narrow[..], &bias[..]);
            activate_backward(gelu, inputs, &mut b, &mut out, &mut d_bias, threads).unwrap();
            let mut c = a.clone();
            squared_relu_in_place(&mut c);
            silu_times(&mut c, &x);
            (a, b, c, out, d_bias)
        };
        let results = crate::cpu::multiversion::tests::at_each(|| run(1));
        assert_eq!(results.len(), 3);
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(results[0].2.iter().any(|x| *x != 0.0));
        assert!(run(3) == results[0]);
    }

    /// All buffers lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::cpu::guarded::Guarded;
        let f = Activation::Gelu;
        for (rows, width, at_end) in [(1, 1, true), (5, 255, false), (3, 1003, true)] {
            let new = |bytes: usize| Guarded::new(&vec![1; bytes * rows * width], at_end);
            let row = || Guarded::new(&vec![1; 4 * width], at_end);
            let (mut x, mut out) = (new(4), new(4));
            let (mut bias, mut d_bias) = (row(), row());
            crate::cpu::multiversion::tests::at_each(|| {
                activate(f, new(4).f32s(), row().f32s(), new(4).f32s(), 1).unwrap();
            });
            let inputs = (&*x.f32s(), &*bias.f32s());
            activate_backward(f, inputs, new(4).f32s(), out.f32s(), d_bias.f32s(), 2).unwrap();
        }
    }

    #[test]
    fn gelu_of_bf16_is_the_rounded_one() {
        let bits: Vec<i16> = grid(4000).into_iter().map(i16::of).collect();
        let wide: Vec<f32> = bits.iter().map(|x| x.get()).collect();
        let (mut narrow, mut out) = (vec![0i16; 4000], vec![0f32; 4000]);
        activate(Activation::Gelu, &bits, &[0.0; 40], &mut narrow, 1).unwrap();
        activate(Activation::Gelu, &wide, &[0.0; 40], &mut out, 1).unwrap();
        for (a, b) in narrow.iter().zip(out) {
            assert_eq!(*a, i16::of(b));
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let gelu = |x: usize, width: usize, out: usize| {
            let (x, bias) = (vec![0f32; x], vec![0f32; width]);
            let mut out = vec![0f32; out];
            let refused = activate(Activation::Gelu, &x, &bias, &mut out, 1);
            refused.unwrap_err().to_string()
        };
        assert!(gelu(4, 2, 3).contains("out = 3 elements"));
        assert!(gelu(3, 2, 3).contains("x = 3 elements: must be whole rows of 2"));
        assert!(gelu(3, 0, 3).contains("must be whole rows of 0"));
    }
}
