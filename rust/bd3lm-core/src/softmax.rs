//! Cross-entropy of rows of logits and its gradient, in place: three reads of a row that stays in
//! the cache, where separate operations would each go through memory.

use crate::attention::{Isa, pool};
use crate::elementwise::Loops;
use crate::error::{Error, Result};
use crate::simd::limited;

/// A number as it is stored: `f32`, or the bits of a bf16 in an `i16`.
pub trait Stored: Copy + Send + Sync + Loops {
    /// Its value.
    fn get(self) -> f32;
    /// The nearest that can be stored.
    fn of(x: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }

    #[inline(always)]
    fn of(x: f32) -> Self {
        x
    }
}

impl Stored for i16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self as u16) << 16)
    }

    /// Round to nearest, ties to even.
    #[inline(always)]
    fn of(x: f32) -> Self {
        let bits = x.to_bits();
        (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16 as i16
    }
}

/// Lanes that are summed side by side, so that the compiler may use vectors.
const LANES: usize = 16;
/// Rows that one thread takes at a time.
const ROWS: usize = 8;

/// e^x for x <= 0 to about 1e-7, zero below -87; −∞ gives zero.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let y = if x > -87.0 { x * LOG2_E } else { -126.0 };
    let shifted = y + ROUND;
    let r = y - (shifted - ROUND);
    let mut p = 0.001_326_472_7_f32;
    const LN_2: f32 = std::f32::consts::LN_2;
    for c in [0.009_671_513, 0.055_507_336, 0.240_222_42, LN_2, 1.0] {
        p = p * r + c;
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    if x > -87.0 { p * scale } else { 0.0 }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// −log softmax(row)[target]; with a weight the row becomes weight·(softmax − one-hot).
#[inline(always)]
fn one_row<T: Stored>(row: &mut [T], target: usize, weight: Option<f32>) -> f32 {
    let goal = row[target].get();
    let mut tops = [f32::NEG_INFINITY; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            tops[i] = larger(chunk[i].get(), tops[i]);
        }
    }
    let rest = chunks.remainder().iter().map(|x| x.get());
    let top = tops
        .iter()
        .copied()
        .chain(rest)
        .fold(f32::NEG_INFINITY, larger);
    let mut sums = [0f32; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            sums[i] += exp(chunk[i].get() - top);
        }
    }
    let rest: f32 = chunks.remainder().iter().map(|x| exp(x.get() - top)).sum();
    let log_z = top + (sums.iter().sum::<f32>() + rest).ln();
    if let Some(weight) = weight {
        for x in row.iter_mut() {
            *x = T::of(weight * exp(x.get() - log_z));
        }
        // From the exact value, not from what was just rounded.
        row[target] = T::of(weight * (exp(goal - log_z) - 1.0));
    }
    log_z - goal
}

#[inline(always)]
fn rows<T: Stored>(
    logits: &mut [T],
    vocab: usize,
    target: &[i64],
    weight: Option<&[f32]>,
    mask_id: usize,
    nll: &mut [f32],
) {
    for (i, row) in logits.chunks_exact_mut(vocab).enumerate() {
        row[mask_id] = T::of(f32::NEG_INFINITY);
        nll[i] = one_row(row, target[i] as usize, weight.map(|w| w[i]));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
fn rows_avx512<T: Stored>(
    logits: &mut [T],
    vocab: usize,
    target: &[i64],
    weight: Option<&[f32]>,
    mask_id: usize,
    nll: &mut [f32],
) {
    rows(logits, vocab, target, weight, mask_id, nll);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn rows_avx2<T: Stored>(
    logits: &mut [T],
    vocab: usize,
    target: &[i64],
    weight: Option<&[f32]>,
    mask_id: usize,
    nll: &mut [f32],
) {
    rows(logits, vocab, target, weight, mask_id, nll);
}

/// Cross-entropy of logits [R, V], the mask token excluded (MATH §5).
///
/// * `target` [R]: true ids, never `mask_id`.
/// * `weight` [R]: with it, `logits` become the gradient weight·(softmax − one-hot), zero at the
///   mask token; without it they keep their values but for the mask token's.
/// * `nll` [R] receives −log p of the targets, in nats.
///
/// # Errors
/// A buffer of another size, or an id outside the vocabulary.
pub fn cross_entropy<T: Stored>(
    logits: &mut [T],
    target: &[i64],
    weight: Option<&[f32]>,
    mask_id: usize,
    nll: &mut [f32],
    threads: usize,
) -> Result<()> {
    if target.is_empty() {
        return Ok(());
    }
    let vocab = logits.len() / target.len();
    let fits = logits.len() == vocab * target.len()
        && nll.len() == target.len()
        && weight.is_none_or(|w| w.len() == target.len());
    if !fits {
        let given = format!("{} logits for {} targets", logits.len(), target.len());
        let allowed = "needs whole rows, and a weight and a result for each";
        return Err(Error::config("logits", given, allowed));
    }
    let outside = |id: i64| !(0..vocab as i64).contains(&id) || id == mask_id as i64;
    if mask_id >= vocab {
        let allowed = format!("must be below the vocabulary of {vocab}");
        return Err(Error::config("mask_id", mask_id, allowed));
    }
    if let Some(id) = target.iter().find(|id| outside(**id)) {
        return Err(Error::TokenOutOfRange {
            id: *id,
            place: "the targets".into(),
            vocab_size: vocab as u64,
        });
    }
    let isa = limited(Isa::best());
    let parts = Parts {
        logits: logits.as_mut_ptr(),
        nll: nll.as_mut_ptr(),
    };
    pool::parallel(threads, target.len().div_ceil(ROWS), |item| {
        let span = item * ROWS..target.len().min((item + 1) * ROWS);
        // SAFETY: items are disjoint ranges of rows, inside both buffers as checked above, and
        // the buffers are borrowed for the whole call.
        let (logits, nll) = unsafe { parts.rows(span.start, span.len(), vocab) };
        let weight = weight.map(|w| &w[span.clone()]);
        let target = &target[span];
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has it, as `best` found.
            Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
                rows_avx512(logits, vocab, target, weight, mask_id, nll);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { rows_avx2(logits, vocab, target, weight, mask_id, nll) },
            _ => rows(logits, vocab, target, weight, mask_id, nll),
        }
    });
    Ok(())
}

/// The two buffers that threads share by rows.
struct Parts<T> {
    logits: *mut T,
    nll: *mut f32,
}

// SAFETY: threads take disjoint rows.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    /// # Safety
    /// The rows lie inside the buffers, and nobody else holds them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn rows(&self, first: usize, count: usize, vocab: usize) -> (&mut [T], &mut [f32]) {
        // SAFETY: as the caller promises.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.logits.add(first * vocab), count * vocab),
                std::slice::from_raw_parts_mut(self.nll.add(first), count),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Domain, Stream};

    fn logits(rows: usize, vocab: usize) -> Vec<f32> {
        let mut stream = Stream::new(1, Domain::Mask, 0, 0);
        (0..rows * vocab)
            .map(|_| (stream.next_f64() as f32 - 0.5) * 30.0)
            .collect()
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
        crate::simd::tests::at_each(equals_float64_here);
    }

    fn equals_float64_here() {
        for vocab in [3usize, 16, 17, 100, 1000] {
            let (rows, mask_id) = (11, vocab / 2);
            let original = logits(rows, vocab);
            let target: Vec<i64> = (0..rows)
                .map(|r| ((mask_id + 1 + r % (vocab - 1)) % vocab) as i64)
                .collect();
            let weight: Vec<f32> = (0..rows).map(|r| 0.3 * r as f32).collect();
            for (weight, threads) in [(None, 1), (Some(&weight[..]), 1), (Some(&weight[..]), 3)] {
                let (mut x, mut nll) = (original.clone(), vec![-1.0; rows]);
                cross_entropy(&mut x, &target, weight, mask_id, &mut nll, threads).unwrap();
                for r in 0..rows {
                    let row = &original[r * vocab..(r + 1) * vocab];
                    let goal = target[r] as usize;
                    let (expected, p) = reference(row, mask_id, goal);
                    assert!((f64::from(nll[r]) - expected).abs() < 3e-6 * (1.0 + expected));
                    let Some(weight) = weight else { continue };
                    for i in 0..vocab {
                        let onehot = f64::from(u8::from(i == goal));
                        let want = f64::from(weight[r]) * (p[i] - onehot);
                        let got = f64::from(x[r * vocab + i]);
                        assert!((got - want).abs() < 2e-6 * f64::from(weight[r]) + 1e-12);
                    }
                }
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
        crate::simd::tests::at_each(bf16_rows_here);
    }

    /// Logits lie between pages that no one may touch.
    #[test]
    fn nothing_beside_the_logits_is_touched() {
        use crate::attention::tests::guarded::Guarded;
        for (vocab, at_end) in [(3, true), (17, false), (1003, true)] {
            let mut wide = Guarded::new(&vec![0; 4 * 5 * vocab], at_end);
            let mut narrow = Guarded::new(&vec![0; 2 * 5 * vocab], at_end);
            let (weight, mut nll) = ([1.0; 5], [0.0; 5]);
            cross_entropy(wide.f32s(), &[1; 5], Some(&weight), 0, &mut nll, 2).unwrap();
            cross_entropy(narrow.i16s(), &[1; 5], Some(&weight), 0, &mut nll, 2).unwrap();
            assert!((nll[4] - ((vocab - 1) as f32).ln()).abs() < 1e-5);
        }
    }

    /// A long row whose gradient is the rounded one of the same logits in float32.
    fn bf16_rows_here() {
        let (vocab, mask_id) = (1003, 77);
        let bits: Vec<i16> = logits(2, vocab).into_iter().map(i16::of).collect();
        let wide: Vec<f32> = bits.iter().map(|x| x.get()).collect();
        let (mut x, mut y, mut nll, mut nll32) = (bits, wide, [0.0; 2], [0.0; 2]);
        cross_entropy(&mut x, &[1, 900], Some(&[2.0, 0.5]), mask_id, &mut nll, 1).unwrap();
        cross_entropy(&mut y, &[1, 900], Some(&[2.0, 0.5]), mask_id, &mut nll32, 1).unwrap();
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
        let mut nll = [0.0];
        cross_entropy(&mut row, &[1], Some(&[2.0]), 2, &mut nll, 1).unwrap();
        let p = 1f64.exp() / (1.0 + 1f64.exp());
        assert!((f64::from(nll[0]) + p.ln()).abs() < 1e-6);
        let want = [2.0 * (1.0 - p), 2.0 * (p - 1.0), 0.0];
        for (x, want) in row.iter().zip(want) {
            assert!((f64::from(x.get()) - want).abs() < 0.004);
        }
    }

    #[test]
    fn wrong_input_is_named() {
        let mut nll = [0.0; 2];
        let mut run = |n: usize, target: [i64; 2], mask_id| {
            let refused = cross_entropy(&mut vec![0f32; n], &target, None, mask_id, &mut nll, 1);
            refused.unwrap_err().to_string()
        };
        assert!(run(7, [0, 1], 2).contains("7 logits for 2 targets"));
        assert!(run(8, [0, 4], 2).contains("token id 4 in the targets"));
        assert!(run(8, [0, 2], 2).contains("token id 2"));
        assert!(run(8, [0, 1], 4).contains("mask_id = 4"));
    }
}
