//! LayerNorm and RMSNorm of the rows of the residual stream, forward and backward.

use crate::cpu::buffers::{Parts, check_len, in_groups, sum_of_groups, whole_rows};
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::Stored;
use crate::error::Result;

/// Partial sums, so that the compiler can vectorise.
const LANES: usize = 16;

/// Sum over a row, in an order that depends on its width alone.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let (lanes, rest) = x.as_chunks::<LANES>();
    let mut sums = [0f32; LANES];
    for lane in lanes {
        for i in 0..LANES {
            sums[i] += f(lane[i]);
        }
    }
    sums.iter().sum::<f32>() + rest.iter().map(|&x| f(x)).sum::<f32>()
}

/// Σ (`x` − `mean`)·`by` over a row, in an order that depends on its width alone.
#[inline(always)]
fn sum_along(x: &[f32], mean: f32, by: &[f32]) -> f32 {
    let ((lanes, rest), (by, by_rest)) = (x.as_chunks::<LANES>(), by.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (lane, by) in lanes.iter().zip(by) {
        for i in 0..LANES {
            sums[i] += (lane[i] - mean) * by[i];
        }
    }
    let rest = rest.iter().zip(by_rest).map(|(x, by)| (x - mean) * by);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

/// Mean (zero unless `centred`) and reciprocal standard deviation of a row.
#[inline(always)]
fn moments(row: &[f32], centred: bool, eps: f32) -> (f32, f32) {
    let count = row.len() as f32;
    let mean = if centred {
        sum(row, |x| x) / count
    } else {
        0.0
    };
    let variance = sum(row, |x| (x - mean) * (x - mean)) / count;
    (mean, 1.0 / (variance + eps).sqrt())
}

multiversion! {
    /// Normalises rows in place, on the calling thread.
    pub(crate) fn normalise(rows: &mut [f32], weight: &[f32], bias: &[f32], centred: bool, eps: f32) {
        for row in rows.chunks_exact_mut(weight.len()) {
            let (mean, scale) = moments(row, centred, eps);
            for ((x, w), b) in row.iter_mut().zip(weight).zip(bias) {
                *x = (*x - mean) * scale * w + b;
            }
        }
    }
}

/// Parameters of a norm of rows `[W]`.
#[derive(Clone, Copy)]
pub struct Norm<'a> {
    /// Scale `[W]`.
    pub weight: &'a [f32],
    /// Shift `[W]`.
    pub bias: &'a [f32],
    /// LayerNorm; otherwise RMSNorm, whose mean is zero.
    pub centred: bool,
    /// Added to the variance.
    pub eps: f32,
}

/// Inputs of the backward pass.
#[derive(Clone, Copy)]
pub struct Inputs<'a, T> {
    /// Gradient of the result [R, W].
    pub d_out: &'a [T],
    /// Input of the forward pass [R, W].
    pub x: &'a [f32],
    /// Weight of [`Norm`] `[W]`.
    pub weight: &'a [f32],
    /// Same as in [`Norm`].
    pub centred: bool,
    /// Mean and reciprocal deviation of each row [R, 2], from the forward pass.
    pub moments: &'a [f32],
    /// Gradient of `x` through the residual connection [R, W], added to the result; or empty.
    pub residual: &'a [f32],
}

impl Norm<'_> {
    /// Normalises rows.
    ///
    /// * `x` [R, W]; `out` [R, W] receives the result.
    /// * `moments` [R, 2] receives mean and reciprocal deviation of each row.
    ///
    /// # Errors
    /// Buffers that do not fit together.
    pub fn forward<T: Stored>(
        &self,
        x: &[f32],
        out: &mut [T],
        moments: &mut [f32],
        threads: usize,
    ) -> Result<()> {
        let width = self.weight.len();
        check_len("bias", width, self.bias.len())?;
        check(width, x.len(), moments.len())?;
        check_len("out", x.len(), out.len())?;
        let (out, moments) = (Parts::new(out), Parts::new(moments));
        in_groups(x.len(), width, threads, |_, span| {
            let (first, rows) = (span.start / width, span.len() / width);
            // SAFETY: groups are disjoint ranges of rows, inside both buffers as checked above,
            // and the buffers are borrowed for the whole call.
            let (out, moments) = unsafe {
                (
                    out.part(span.start, span.len()),
                    moments.part(2 * first, 2 * rows),
                )
            };
            normalise_rows(self, &x[span], out, moments);
        });
        Ok(())
    }
}

impl<T: Stored> Inputs<'_, T> {
    /// Gradients of [`Norm::forward`].
    ///
    /// * `d_x` [R, W] receives that of `x`, `d_weight` and `d_bias` `[W]` those of weight and bias.
    ///
    /// # Errors
    /// Buffers that do not fit together.
    pub fn gradients(
        &self,
        d_x: &mut [f32],
        d_weight: &mut [f32],
        d_bias: &mut [f32],
        threads: usize,
    ) -> Result<()> {
        let (width, size) = (self.weight.len(), self.x.len());
        check(width, size, self.moments.len())?;
        check_len("d_out", size, self.d_out.len())?;
        check_len("d_x", size, d_x.len())?;
        check_len("d_weight", width, d_weight.len())?;
        check_len("d_bias", width, d_bias.len())?;
        if !self.residual.is_empty() {
            check_len("residual", size, self.residual.len())?;
        }
        let d_x = Parts::new(d_x);
        let mut sums = vec![0.0; 2 * width];
        sum_of_groups(size, width, &mut sums, threads, |_, span, sums| {
            let rows = span.start / width..span.end / width;
            // SAFETY: as in `forward`.
            let d_x = unsafe { d_x.part(span.start, span.len()) };
            let part = Inputs {
                d_out: &self.d_out[span.clone()],
                x: &self.x[span.clone()],
                moments: &self.moments[2 * rows.start..2 * rows.end],
                residual: self.residual.get(span).unwrap_or_default(),
                ..*self
            };
            normalise_rows_backward(&part, d_x, sums);
        });
        d_weight.copy_from_slice(&sums[..width]);
        d_bias.copy_from_slice(&sums[width..]);
        Ok(())
    }
}

fn check(width: usize, x: usize, moments: usize) -> Result<()> {
    whole_rows("x", x, width)?;
    check_len("moments", 2 * (x / width), moments)
}

multiversion! {
    /// See [`Norm::forward`].
    fn normalise_rows<T: Stored>(norm: &Norm<'_>, x: &[f32], out: &mut [T], found: &mut [f32]) {
            let width = norm.weight.len();
        let (weight, bias) = (&norm.weight[..width], &norm.bias[..width]);
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
        for ((x, out), found) in rows.zip(found.chunks_exact_mut(2)) {
            let (mean, scale) = moments(x, norm.centred, norm.eps);
            for i in 0..width {
                out[i] = T::of((x[i] - mean) * scale * weight[i] + bias[i]);
            }
            found.copy_from_slice(&[mean, scale]);
        }
    }
}

multiversion! {
    /// See [`Inputs::gradients`]; adds to `sums`, those of the weight before those of the bias.
    fn normalise_rows_backward<T: Stored>(inputs: &Inputs<'_, T>, d_x: &mut [f32], sums: &mut [f32]) {
        let width = inputs.weight.len();
        let weight = &inputs.weight[..width];
        let (d_weight, d_bias) = sums.split_at_mut(width);
        let d_bias = &mut d_bias[..width];
        for (row, found) in inputs.moments.chunks_exact(2).enumerate() {
            let span = row * width..(row + 1) * width;
            let (mean, scale) = (found[0], found[1]);
            let (x, d_out) = (&inputs.x[span.clone()], &inputs.d_out[span.clone()]);
            let d_x = &mut d_x[span.clone()];
            // First the gradient of the normalised numbers.
            for i in 0..width {
                let (normed, d) = ((x[i] - mean) * scale, d_out[i].get());
                d_weight[i] += d * normed;
                d_bias[i] += d;
                d_x[i] = d * weight[i];
            }
            let count = width as f32;
            let along = sum_along(x, mean, d_x) * scale / count;
            let level = if inputs.centred { sum(d_x, |d| d) / count } else { 0.0 };
            if inputs.residual.is_empty() {
                for i in 0..width {
                    let normed = (x[i] - mean) * scale;
                    d_x[i] = scale * (d_x[i] - level - normed * along);
                }
            } else {
                let residual = &inputs.residual[span];
                for i in 0..width {
                    let normed = (x[i] - mean) * scale;
                    d_x[i] = residual[i] + scale * (d_x[i] - level - normed * along);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 300.0 - 1.5)
            .collect()
    }

    #[test]
    fn known_norms() {
        let weight = [2.0, 1.0, 1.0];
        let mut rows = vec![1.0, 2.0, 3.0, -4.0, 0.0, 4.0];
        normalise(&mut rows, &weight, &[0.5, 0.0, 0.0], true, 0.0);
        let unit = 1.5f32.sqrt(); // 1 over the deviation of -1, 0, 1
        for (x, y) in rows
            .iter()
            .zip([0.5 - 2.0 * unit, 0.0, unit, 0.5 - 2.0 * unit, 0.0, unit])
        {
            assert!((x - y).abs() < 1e-6);
        }
        let mut row = vec![3.0, 0.0, -4.0];
        normalise(&mut row, &[1.0; 3], &[0.0; 3], false, 0.0);
        let root = (25f32 / 3.0).sqrt();
        assert!((row[0] - 3.0 / root).abs() < 1e-6 && (row[2] + 4.0 / root).abs() < 1e-6);
    }

    /// Σ `d_out`·norm(`x`), in float64.
    fn objective(x: &[f64], weight: &[f64], bias: &[f64], d_out: &[f32], centred: bool) -> f64 {
        let width = weight.len();
        let mut total = 0.0;
        for (x, d) in x.chunks(width).zip(d_out.chunks(width)) {
            let count = width as f64;
            let mean = if centred {
                x.iter().sum::<f64>() / count
            } else {
                0.0
            };
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
            let scale = 1.0 / (variance + 1e-5).sqrt();
            for i in 0..width {
                total += f64::from(d[i]) * ((x[i] - mean) * scale * weight[i] + bias[i]);
            }
        }
        total
    }

    #[test]
    fn gradients_equal_differences_in_float64() {
        for (width, rows, centred) in [(1, 3, false), (5, 4, true), (19, 3, false), (70, 5, true)] {
            let x = numbers(width * rows, 1);
            let (weight, bias) = (numbers(width, 2), numbers(width, 3));
            let (d_out, residual) = (numbers(width * rows, 4), numbers(width * rows, 5));
            let norm = Norm {
                weight: &weight,
                bias: &bias,
                centred,
                eps: 1e-5,
            };
            let (mut out, mut moments) = (vec![0f32; x.len()], vec![0f32; 2 * rows]);
            norm.forward(&x, &mut out, &mut moments, 2).unwrap();
            let mut expected = x.clone();
            normalise(&mut expected, &weight, &bias, centred, 1e-5);
            assert_eq!(out, expected);
            let (mut d_x, mut d_w, mut d_b) =
                (vec![0f32; x.len()], vec![9f32; width], vec![9f32; width]);
            let inputs = Inputs {
                d_out: &d_out[..],
                x: &x,
                weight: norm.weight,
                centred: norm.centred,
                moments: &moments,
                residual: &residual,
            };
            inputs.gradients(&mut d_x, &mut d_w, &mut d_b, 2).unwrap();
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let point = [wide(&x), wide(&weight), wide(&bias)];
            for (which, got) in [(0, &d_x), (1, &d_w), (2, &d_b)] {
                for i in 0..got.len() {
                    let at = |step: f64| {
                        let mut moved = point.clone();
                        moved[which][i] += step;
                        objective(&moved[0], &moved[1], &moved[2], &d_out, centred)
                    };
                    let mut want = (at(1e-5) - at(-1e-5)) / 2e-5;
                    if which == 0 {
                        want += f64::from(residual[i]);
                    }
                    let got = f64::from(got[i]);
                    assert!(
                        (got - want).abs() < 2e-4 * (1.0 + want.abs()),
                        "{width} {which} {i}: {got} {want}"
                    );
                }
            }
            let alone = Inputs {
                residual: &[],
                ..inputs
            };
            let mut again = vec![0f32; x.len()];
            alone.gradients(&mut again, &mut d_w, &mut d_b, 1).unwrap();
            for i in 0..x.len() {
                assert!((d_x[i] - again[i] - residual[i]).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        let (width, rows) = (70, 1000);
        let (x, weight) = (numbers(width * rows, 1), numbers(width, 2));
        let narrow: Vec<i16> = numbers(width * rows, 3)
            .iter()
            .map(|x| i16::of(*x))
            .collect();
        let norm = Norm {
            weight: &weight,
            bias: &weight,
            centred: true,
            eps: 1e-5,
        };
        let run = |threads| {
            let (mut out, mut moments) = (vec![0i16; x.len()], vec![0f32; 2 * rows]);
            norm.forward(&x, &mut out, &mut moments, threads).unwrap();
            let (mut d_x, mut d_w, mut d_b) =
                (vec![0f32; x.len()], vec![0f32; width], vec![0f32; width]);
            let inputs = Inputs {
                d_out: &narrow[..],
                x: &x,
                weight: norm.weight,
                centred: norm.centred,
                moments: &moments,
                residual: &x,
            };
            inputs
                .gradients(&mut d_x, &mut d_w, &mut d_b, threads)
                .unwrap();
            (out, moments, d_x, d_w, d_b)
        };
        let results = crate::cpu::multiversion::tests::at_each(|| run(1));
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(run(3) == results[0]);
    }

    /// All buffers lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_buffers_is_touched() {
        use crate::cpu::guarded::Guarded;
        for (width, rows, at_end) in [(1, 1, true), (17, 3, false), (67, 5, true)] {
            let new =
                |numbers: usize, bytes: usize| Guarded::new(&vec![1; numbers * bytes], at_end);
            let (mut x, mut weight) = (new(width * rows, 4), new(width, 4));
            let (mut out, mut moments) = (new(width * rows, 2), new(2 * rows, 4));
            let (mut d_x, mut d_w, mut d_b) = (new(width * rows, 4), new(width, 4), new(width, 4));
            let (x, weight) = (&*x.f32s(), &*weight.f32s());
            let norm = Norm {
                weight,
                bias: weight,
                centred: true,
                eps: 1e-5,
            };
            norm.forward(x, out.i16s(), moments.f32s(), 2).unwrap();
            let inputs = Inputs {
                d_out: &*out.i16s(),
                x,
                weight,
                centred: true,
                moments: &*moments.f32s(),
                residual: x,
            };
            inputs
                .gradients(d_x.f32s(), d_w.f32s(), d_b.f32s(), 2)
                .unwrap();
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let norm = Norm {
            weight: &[1.0; 3],
            bias: &[0.0; 3],
            centred: true,
            eps: 1e-5,
        };
        let run = |x: usize, out: usize, moments: usize| {
            let (mut out, mut moments) = (vec![0f32; out], vec![0f32; moments]);
            norm.forward(&vec![0.0; x], &mut out, &mut moments, 1)
                .unwrap_err()
                .to_string()
        };
        assert!(run(7, 7, 4).contains("x = 7 elements: must be whole rows of 3"));
        assert!(run(6, 5, 4).contains("out = 5 elements"));
        assert!(run(6, 6, 3).contains("moments = 3 elements"));
    }
}
