//! Fused cross-entropy of logits and its gradient, in place: all passes over a row stay in cache.

use crate::cpu::buffers::{Parts, check_len, sum_of_groups};
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::{Stored, exp};
use crate::cpu::scratch;
use crate::error::{Error, Result};

/// Partial sums, so that the compiler can vectorise.
const LANES: usize = 16;

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// −log softmax(row + bias)[target] in nats; with a weight the row becomes weight·(softmax −
/// one-hot), and is added to `d_bias`. `room` `[V]` holds e^x meanwhile.
#[inline(always)]
fn one_row<T: Stored>(
    row: &mut [T],
    bias: &[f32],
    target: usize,
    weight: Option<f32>,
    mask_id: Option<usize>,
    room: &mut [f32],
    d_bias: &mut [f32],
) -> f32 {
    let vocab = row.len();
    let (bias, room, d_bias) = (&bias[..vocab], &mut room[..vocab], &mut d_bias[..vocab]);
    for i in 0..vocab {
        room[i] = row[i].get() + bias[i];
    }
    if let Some(id) = mask_id {
        room[id] = f32::NEG_INFINITY;
    }
    let goal = room[target];
    let (lanes, rest) = room.as_chunks_mut::<LANES>();
    let mut tops = [f32::NEG_INFINITY; LANES];
    for lane in &*lanes {
        for i in 0..LANES {
            tops[i] = larger(lane[i], tops[i]);
        }
    }
    let each = tops.iter().chain(&*rest).copied();
    let top = each.fold(f32::NEG_INFINITY, larger);
    let mut sums = [0f32; LANES];
    for lane in lanes {
        for i in 0..LANES {
            lane[i] = exp(lane[i] - top);
            sums[i] += lane[i];
        }
    }
    let mut z: f32 = sums.iter().sum();
    for x in rest {
        *x = exp(*x - top);
        z += *x;
    }
    if let Some(weight) = weight {
        let scale = weight / z;
        room[target] -= z;
        for i in 0..vocab {
            let d = scale * room[i];
            row[i] = T::of(d);
            d_bias[i] += d;
        }
    }
    top + z.ln() - goal
}

/// Rows of one thread, and their results.
struct Rows<'a, T> {
    logits: &'a mut [T],
    bias: &'a [f32],
    target: &'a [i64],
    weight: Option<&'a [f32]>,
    mask_id: Option<usize>,
    nll: &'a mut [f32],
    /// Scratch of one row.
    room: &'a mut [f32],
    d_bias: &'a mut [f32],
}

multiversion! {
    fn rows<T: Stored>(part: Rows<'_, T>) {
        for (i, row) in part.logits.chunks_exact_mut(part.bias.len()).enumerate() {
            part.nll[i] = one_row(
                row,
                part.bias,
                part.target[i] as usize,
                part.weight.map(|w| w[i]),
                part.mask_id,
                part.room,
                part.d_bias,
            );
        }
    }
}

/// Targets of [`cross_entropy`].
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// True ids `[R]`, never `mask_id`.
    pub ids: &'a [i64],
    /// Weight of each row `[R]`; None: no gradients.
    pub weight: Option<&'a [f32]>,
    /// The id whose probability is zero, if there is one.
    pub mask_id: Option<usize>,
}

/// Cross-entropy of logits [R, V], the mask token excluded (docs/math.md §5).
///
/// * `logits` keep their values, but with a weight they become the gradient
///   weight·(softmax − one-hot), zero at the mask token.
/// * `bias` `[V]` is added to them first.
/// * `nll` `[R]` receives −log p of the targets, in nats.
/// * `d_bias` `[V]` receives the sum of the gradients, zero without a weight.
///
/// # Errors
/// A buffer of another size, or an id outside the vocabulary.
pub fn cross_entropy<T: Stored>(
    logits: &mut [T],
    bias: &[f32],
    targets: Targets<'_>,
    nll: &mut [f32],
    d_bias: &mut [f32],
    threads: usize,
) -> Result<()> {
    let Targets {
        ids,
        weight,
        mask_id,
    } = targets;
    let vocab = bias.len();
    let fits = logits.len() == vocab * ids.len()
        && nll.len() == ids.len()
        && weight.is_none_or(|w| w.len() == ids.len());
    if !fits {
        let given = format!(
            "{} logits of {vocab} for {} targets",
            logits.len(),
            ids.len()
        );
        let allowed = "whole rows, with a weight and a result for each";
        return Err(Error::config("logits", given, allowed));
    }
    check_len("d_bias", vocab, d_bias.len())?;
    if let Some(id) = mask_id.filter(|id| *id >= vocab) {
        let allowed = format!("below the vocabulary of {vocab}");
        return Err(Error::config("mask_id", id, allowed));
    }
    let masked = mask_id.map(|id| id as i64);
    let outside = |id: i64| !(0..vocab as i64).contains(&id) || Some(id) == masked;
    if let Some(id) = ids.iter().find(|id| outside(**id)) {
        return Err(Error::TokenOutOfRange {
            id: *id,
            place: "the targets".into(),
            vocab_size: vocab as u64,
        });
    }
    let (logits, nll) = (Parts::new(logits), Parts::new(nll));
    sum_of_groups(
        ids.len() * vocab,
        vocab,
        d_bias,
        threads,
        |_, span, d_bias| {
            let rows_here = span.start / vocab..span.end / vocab;
            scratch::with(&[vocab], |scratch| {
                // SAFETY: groups are disjoint ranges of rows, inside both buffers as checked above,
                // and the buffers are borrowed for the whole call.
                let (logits, nll) = unsafe {
                    (
                        logits.part(span.start, span.len()),
                        nll.part(rows_here.start, rows_here.len()),
                    )
                };
                let part = Rows {
                    logits,
                    bias,
                    target: &ids[rows_here.clone()],
                    weight: weight.map(|w| &w[rows_here]),
                    mask_id,
                    nll,
                    room: scratch.slice(vocab),
                    d_bias,
                };
                rows(part);
            });
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Domain, Stream};

    fn logits(rows: usize, vocab: usize) -> Vec<f32> {
        let mut stream = Stream::new(1, Domain::Mask, 0, 0);
        (0..rows * vocab)
            .map(|_| (stream.next_f64() as f32 - 0.5) * 30.0)
            .collect()
    }

    /// Cross-entropy on one thread, without a bias.
    fn plain<T: Stored>(
        x: &mut [T],
        ids: &[i64],
        weight: Option<&[f32]>,
        mask_id: impl Into<Option<usize>>,
    ) -> Result<Vec<f32>> {
        let vocab = x.len() / ids.len();
        let (mut nll, mut d_bias) = (vec![0.0; ids.len()], vec![0.0; vocab]);
        let targets = Targets {
            ids,
            weight,
            mask_id: mask_id.into(),
        };
        let zeros = vec![0.0; vocab];
        cross_entropy(x, &zeros, targets, &mut nll, &mut d_bias, 1)?;
        Ok(nll)
    }

    fn reference(row: &[f32], mask_id: usize, target: usize) -> (f64, Vec<f64>) {
        let live = |i: usize| {
            if i == mask_id {
                0.0
            } else {
                f64::from(row[i]).exp()
            }
        };
        let z: f64 = (0..row.len()).map(live).sum();
        let p: Vec<f64> = (0..row.len()).map(|i| live(i) / z).collect();
        (-p[target].ln(), p)
    }

    #[test]
    fn equals_float64() {
        crate::cpu::multiversion::tests::at_each(equals_float64_here);
    }

    fn equals_float64_here() {
        for vocab in [3usize, 16, 17, 100, 1000] {
            let (rows, mask_id) = (11, vocab / 2);
            let original = logits(rows, vocab);
            let target: Vec<i64> = (0..rows)
                .map(|r| ((mask_id + 1 + r % (vocab - 1)) % vocab) as i64)
                .collect();
            let weight: Vec<f32> = (0..rows).map(|r| 0.3 * r as f32).collect();
            let bias: Vec<f32> = (0..vocab).map(|i| (i % 5) as f32 - 2.0).collect();
            for (weight, threads) in [(None, 1), (Some(&weight[..]), 1), (Some(&weight[..]), 3)] {
                let (mut x, mut nll) = (original.clone(), vec![-1.0; rows]);
                let targets = Targets {
                    ids: &target,
                    weight,
                    mask_id: Some(mask_id),
                };
                let mut d_bias = vec![9.0; vocab];
                cross_entropy(&mut x, &bias, targets, &mut nll, &mut d_bias, threads).unwrap();
                if weight.is_none() {
                    assert!(x == original && d_bias.iter().all(|d| *d == 0.0));
                }
                let mut sum = vec![0f64; vocab];
                for r in 0..rows {
                    let row = &original[r * vocab..(r + 1) * vocab];
                    let row: Vec<f32> = row.iter().zip(&bias).map(|(x, b)| x + b).collect();
                    let goal = target[r] as usize;
                    let (expected, p) = reference(&row, mask_id, goal);
                    assert!((f64::from(nll[r]) - expected).abs() < 3e-6 * (1.0 + expected));
                    let Some(weight) = weight else { continue };
                    for i in 0..vocab {
                        let onehot = f64::from(u8::from(i == goal));
                        let want = f64::from(weight[r]) * (p[i] - onehot);
                        let got = f64::from(x[r * vocab + i]);
                        assert!((got - want).abs() < 2e-6 * f64::from(weight[r]) + 1e-12);
                        sum[i] += want;
                    }
                }
                let close = |(d, want): (&f32, &f64)| (f64::from(*d) - want).abs() < 2e-5;
                assert!(d_bias.iter().zip(&sum).all(close));
            }
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for x in [
            0.0f32,
            1.0,
            -1.5,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
            3.4e38,
            1e-40,
        ] {
            assert_eq!(
                <i16 as Stored>::of(x).get(),
                half::bf16::from_f32(x).to_f32()
            );
        }
        assert_eq!(
            <i16 as Stored>::of(f32::NEG_INFINITY).get(),
            f32::NEG_INFINITY
        );
        crate::cpu::multiversion::tests::at_each(bf16_rows_here);
    }

    /// Logits lie between inaccessible pages.
    #[test]
    fn nothing_beside_the_logits_is_touched() {
        use crate::cpu::guarded::Guarded;
        for (vocab, at_end) in [(3, true), (17, false), (1003, true)] {
            let mut wide = Guarded::new(&vec![0; 4 * 5 * vocab], at_end);
            let mut narrow = Guarded::new(&vec![0; 2 * 5 * vocab], at_end);
            plain(wide.f32s(), &[1; 5], Some(&[1.0; 5]), 0).unwrap();
            let nll = plain(narrow.i16s(), &[1; 5], Some(&[1.0; 5]), 0).unwrap();
            assert!((nll[4] - ((vocab - 1) as f32).ln()).abs() < 1e-5);
        }
    }

    /// A long row whose gradient is the rounded one of the same logits in float32.
    fn bf16_rows_here() {
        let (vocab, mask_id) = (1003, 77);
        let bits: Vec<i16> = logits(2, vocab).into_iter().map(i16::of).collect();
        let wide: Vec<f32> = bits.iter().map(|x| x.get()).collect();
        let (mut x, mut y) = (bits, wide);
        let nll = plain(&mut x, &[1, 900], Some(&[2.0, 0.5]), mask_id).unwrap();
        let nll32 = plain(&mut y, &[1, 900], Some(&[2.0, 0.5]), mask_id).unwrap();
        for (a, b) in nll.iter().zip(nll32) {
            assert!((a - b).abs() < 2e-5, "{a} {b}");
        }
        for (a, b) in x.iter().zip(y) {
            assert!(
                (a.get() - b).abs() <= b.abs() / 128.0 + 1e-9,
                "{} {b}",
                a.get()
            );
        }
        let mut row = [0i16, 0x3F80, -16512]; // 0, 1, -4
        let nll = plain(&mut row, &[1], Some(&[2.0]), 2).unwrap();
        let p = 1f64.exp() / (1.0 + 1f64.exp());
        assert!((f64::from(nll[0]) + p.ln()).abs() < 1e-6);
        let want = [2.0 * (1.0 - p), 2.0 * (p - 1.0), 0.0];
        for (x, want) in row.iter().zip(want) {
            assert!((f64::from(x.get()) - want).abs() < 0.004);
        }
    }

    #[test]
    fn without_a_mask_token_every_id_has_a_share() {
        let mut row = [0f32; 4];
        let nll = plain(&mut row, &[3], Some(&[1.0]), None).unwrap();
        assert!((nll[0] - 4f32.ln()).abs() < 1e-6);
        assert_eq!(row, [0.25, 0.25, 0.25, -0.75]);
    }

    #[test]
    fn wrong_input_is_named() {
        let run = |n: usize, target: [i64; 2], mask_id| {
            let refused = plain(&mut vec![0f32; n], &target, None, mask_id);
            refused.unwrap_err().to_string()
        };
        assert!(run(7, [0, 1], 2).contains("7 logits of 3 for 2 targets"));
        assert!(run(8, [0, 4], 2).contains("token id 4 in the targets"));
        assert!(run(8, [0, 2], 2).contains("token id 2"));
        assert!(run(8, [0, 1], 4).contains("mask_id = 4"));
    }
}
