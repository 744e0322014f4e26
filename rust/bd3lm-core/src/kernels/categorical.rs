//! Tokens from rows of logits: temperature, the k most probable, the nucleus, one uniform number
//! each (docs/math.md §8). A nucleus may hold most of a vocabulary, so nothing is sorted: where it ends is
//! found by a radix selection.

use crate::cpu::buffers::Parts;
use crate::cpu::multiversion::multiversion;
use crate::cpu::number::exp;
use crate::cpu::threads::parallel;
use crate::error::{Error, Result};

/// Transformation of the logits into the distribution of the draw.
#[derive(Clone, Copy, Debug)]
pub struct Shaping<'a> {
    /// Divides the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// Number of most probable tokens to draw from; None: all.
    pub top_k: Option<usize>,
    /// The smallest set of most probable tokens whose share reaches this; 1: all.
    pub top_p: f64,
    /// Ids that are never drawn.
    pub forbidden: &'a [usize],
}

impl Shaping<'_> {
    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let allowed = "a finite number of at least 0";
            return Err(Error::config("temperature", self.temperature, allowed));
        }
        if self.top_k == Some(0) {
            return Err(Error::config("top_k", 0, "at least 1"));
        }
        if self.top_p <= 0.0 || self.top_p.is_nan() {
            return Err(Error::config("top_p", self.top_p, "greater than 0"));
        }
        Ok(())
    }
}

/// Partial sums, so that the compiler can vectorise.
const LANES: usize = 16;
/// Tokens of a partial sum; a draw scans the sums, then one chunk.
const CHUNK: usize = 256;
/// Draws a token for every row of `shaped`, and its log-probability under `logits`.
///
/// Tokens of equal probability count in the order of their ids. The draw inverts the cumulative
/// distribution over ids.
///
/// * `logits` [R, V]: of the model itself; −∞ where a token is impossible.
/// * `shaped` [R, V]: logits of the draw; None: `logits`.
/// * `uniform` `[R]`, in [0, 1).
/// * `token`, `log_p` `[R]` receive the ids and their log-probabilities under `logits`, in nats.
///
/// # Errors
/// A buffer of another size, a forbidden id outside the vocabulary, or a row with a NaN or in which
/// no token is possible.
pub fn draw(
    logits: &[f32],
    shaped: Option<&[f32]>,
    uniform: &[f64],
    shaping: Shaping<'_>,
    token: &mut [i64],
    log_p: &mut [f64],
    threads: usize,
) -> Result<()> {
    let rows = uniform.len();
    if rows == 0 {
        return Ok(());
    }
    let vocab = logits.len() / rows;
    let fits = vocab > 0
        && logits.len() == vocab * rows
        && shaped.is_none_or(|s| s.len() == logits.len())
        && token.len() == rows
        && log_p.len() == rows;
    if !fits {
        let given = format!("{} logits for {rows} rows", logits.len());
        return Err(Error::config("logits", given, "whole rows"));
    }
    shaping.check()?;
    if let Some(u) = uniform.iter().find(|u| !(0.0..1.0).contains(*u)) {
        return Err(Error::config("uniform", u, "in [0, 1)"));
    }
    if let Some(id) = shaping.forbidden.iter().find(|id| **id >= vocab) {
        return Err(Error::config("forbidden", id, format!("below {vocab}")));
    }
    let (tokens, log_ps) = (Parts::new(token), Parts::new(log_p));
    parallel(threads, rows, |row| {
        let at = row * vocab..(row + 1) * vocab;
        let own = &logits[at.clone()];
        let drawn = one_row(own, shaped.map(|s| &s[at]), uniform[row], shaping);
        // SAFETY: no other item writes this row.
        let (token, log_p) = unsafe { (tokens.part(row, 1), log_ps.part(row, 1)) };
        (token[0], log_p[0]) = drawn;
    });
    if let Some(row) = token.iter().position(|id| *id < 0) {
        let allowed = "without NaN, with a token that is possible and not forbidden";
        return Err(Error::config("logits", format!("row {row}"), allowed));
    }
    Ok(())
}

/// The distribution that [`draw`] draws from, for every row of `logits` [R, V].
///
/// * `mass` [R, V] receives a multiple of the probability of each token.
/// * `total` `[R]` receives the sums of its rows, each at least 1.
///
/// # Errors
/// As of [`draw`].
pub fn distribution(
    logits: &[f32],
    shaping: Shaping<'_>,
    mass: &mut [f32],
    total: &mut [f64],
    threads: usize,
) -> Result<()> {
    let rows = total.len();
    if rows == 0 {
        return Ok(());
    }
    let vocab = logits.len() / rows;
    if vocab == 0 || logits.len() != vocab * rows || mass.len() != logits.len() {
        let given = format!("{} logits for {rows} rows", logits.len());
        return Err(Error::config("logits", given, "whole rows"));
    }
    shaping.check()?;
    if let Some(id) = shaping.forbidden.iter().find(|id| **id >= vocab) {
        return Err(Error::config("forbidden", id, format!("below {vocab}")));
    }
    let (out, totals) = (Parts::new(mass), Parts::new(total));
    parallel(threads, rows, |row| {
        // SAFETY: no other item writes this row.
        let (mass, total) = unsafe { (out.part(row * vocab, vocab), totals.part(row, 1)) };
        let mut chunks = vec![0f64; vocab.div_ceil(CHUNK)];
        let source = &logits[row * vocab..(row + 1) * vocab];
        let top = shaped_mass(source, shaping, mass, &mut chunks);
        if !top.is_finite() {
            total[0] = 0.0;
        } else if shaping.temperature == 0.0 {
            mass.fill(0.0);
            let first = first_highest(source, top, shaping.forbidden);
            total[0] = first.map_or(0.0, |id| {
                mass[id] = 1.0;
                1.0
            });
        } else {
            keep_shaped(mass, shaping);
            sum_chunks(mass, &mut chunks);
            total[0] = chunks.iter().sum();
        }
    });
    match total.iter().position(|sum| *sum <= 0.0) {
        None => Ok(()),
        Some(row) => {
            let allowed = "without NaN, with a token that is possible and not forbidden";
            Err(Error::config("logits", format!("row {row}"), allowed))
        }
    }
}

/// Masses of the tempered logits without the forbidden ids, the largest being 1, and their sums by
/// chunk; returns the largest logit. A temperature of 0 is taken for 1.
fn shaped_mass(source: &[f32], shaping: Shaping<'_>, mass: &mut [f32], chunks: &mut [f64]) -> f32 {
    let mut top = f32::NEG_INFINITY;
    if shaping.forbidden.is_empty() {
        highest(source, &mut top);
    } else {
        let mut allowed = source.to_vec();
        for &id in shaping.forbidden {
            allowed[id] = f32::NEG_INFINITY;
        }
        highest(&allowed, &mut top);
    }
    let scale = match shaping.temperature {
        0.0 => 1.0,
        t => 1.0 / t,
    };
    exponentials(source, top, scale, mass, chunks);
    for &id in shaping.forbidden {
        mass[id] = 0.0;
    }
    top
}

/// Zeroes the masses outside top-k and nucleus.
fn keep_shaped(mass: &mut [f32], shaping: Shaping<'_>) {
    if shaping.top_k.is_some() || shaping.top_p < 1.0 {
        keep_most_probable(mass, shaping.top_k, shaping.top_p);
    }
}

/// The first allowed id whose logit is `top`.
fn first_highest(source: &[f32], top: f32, forbidden: &[usize]) -> Option<usize> {
    (0..source.len()).find(|id| source[*id] == top && !forbidden.contains(id))
}

/// Token and log-probability; −1 where no token is possible.
fn one_row(
    logits: &[f32],
    shaped: Option<&[f32]>,
    uniform: f64,
    shaping: Shaping<'_>,
) -> (i64, f64) {
    let mut mass = vec![0f32; logits.len()];
    let mut chunks = vec![0f64; logits.len().div_ceil(CHUNK)];
    let mut top = f32::NEG_INFINITY;
    highest(logits, &mut top);
    exponentials(logits, top, 1.0, &mut mass, &mut chunks);
    let log_z = f64::from(top) + chunks.iter().sum::<f64>().ln();

    let source = shaped.unwrap_or(logits);
    if shaped.is_some() || !shaping.forbidden.is_empty() || shaping.temperature != 1.0 {
        top = shaped_mass(source, shaping, &mut mass, &mut chunks);
    }
    if !top.is_finite() {
        return (-1, f64::NAN);
    }
    let token = if shaping.temperature == 0.0 {
        first_highest(source, top, shaping.forbidden)
    } else {
        keep_shaped(&mut mass, shaping);
        sum_chunks(&mass, &mut chunks);
        invert(&mass, &chunks, uniform)
    };
    match token {
        Some(id) => (id as i64, f64::from(logits[id]) - log_z),
        None => (-1, f64::NAN),
    }
}

multiversion! {
    /// The largest logit; NaN if one is.
    fn highest(logits: &[f32], top: &mut f32) {
        let (mut tops, mut wrong) = ([f32::NEG_INFINITY; LANES], [false; LANES]);
        let mut chunks = logits.chunks_exact(LANES);
        for chunk in &mut chunks {
            for i in 0..LANES {
                tops[i] = if chunk[i] > tops[i] { chunk[i] } else { tops[i] };
                wrong[i] |= chunk[i].is_nan();
            }
        }
        let rest = chunks.remainder();
        *top = rest.iter().chain(&tops).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        if wrong.contains(&true) || rest.iter().any(|x| x.is_nan()) {
            *top = f32::NAN;
        }
    }
}

multiversion! {
    /// e^((x - top)·scale) of every logit, and their sums.
    fn exponentials(
        logits: &[f32], top: f32, scale: f32, mass: &mut [f32], chunks: &mut [f64],
    ) {
        for (mass, &x) in mass.iter_mut().zip(logits) {
            *mass = exp(((x - top) * scale).min(0.0));
        }
        sum_chunks(mass, chunks);
    }
}

multiversion! {
    /// Sums of CHUNK masses each, in float64, which keeps the smallest next to the largest.
    fn sum_chunks(mass: &[f32], chunks: &mut [f64]) {
        for (sum, chunk) in chunks.iter_mut().zip(mass.chunks(CHUNK)) {
            let mut lanes = [0f64; LANES];
            let mut parts = chunk.chunks_exact(LANES);
            for part in &mut parts {
                for i in 0..LANES {
                    lanes[i] += f64::from(part[i]);
                }
            }
            let rest: f64 = parts.remainder().iter().map(|&m| f64::from(m)).sum();
            *sum = lanes.iter().sum::<f64>() + rest;
        }
    }
}

/// End of a run of tokens in falling order of mass.
struct Cut {
    /// Bits of the least mass that is kept.
    bits: u32,
    /// Number of kept tokens of exactly that mass.
    equal: usize,
    /// Mass of all that is kept.
    kept: f64,
}

/// Zeroes every mass outside the `top_k` most probable tokens and outside their nucleus. The token
/// with which the nucleus reaches `top_p` is kept.
fn keep_most_probable(mass: &mut [f32], top_k: Option<usize>, top_p: f64) {
    let most = top_k.unwrap_or(usize::MAX);
    let goal = match top_k {
        _ if top_p >= 1.0 => f64::INFINITY,
        Some(_) => top_p * cut(mass, most, f64::INFINITY).kept,
        None => {
            let mut sums = vec![0f64; mass.len().div_ceil(CHUNK)];
            sum_chunks(mass, &mut sums);
            top_p * sums.iter().sum::<f64>()
        }
    };
    let cut = cut(mass, most, goal);
    let mut equal = 0;
    clear_below(mass, cut.bits, &mut equal);
    if equal > cut.equal {
        let ties = mass.iter_mut().filter(|m| m.to_bits() == cut.bits);
        ties.skip(cut.equal).for_each(|m| *m = 0.0);
    }
}

multiversion! {
    /// Zeroes masses of smaller bits, and counts those of exactly these bits.
    fn clear_below(mass: &mut [f32], bits: u32, equal: &mut usize) {
        let mut count = 0u32;
        for m in mass.iter_mut() {
            let own = m.to_bits();
            count += u32::from(own == bits);
            *m = if own >= bits { *m } else { 0.0 };
        }
        *equal = count as usize;
    }
}

/// Tokens that share ten bits of their mass: their number and total mass.
#[derive(Clone, Copy, Default)]
struct Bin {
    mass: f64,
    count: usize,
}

/// Bins of ten bits. The bits of a positive float32 order like its value; those of masses up to 1
/// fill three levels.
const BINS: usize = 1 << 10;

/// Finds the end of the most probable tokens, up to `most` of them and until their mass reaches
/// `goal`: a radix selection, bin by bin, then inside the bin where they end.
fn cut(mass: &[f32], most: usize, goal: f64) -> Cut {
    let mut cut = Cut {
        bits: 0,
        equal: 0,
        kept: 0.0,
    };
    let (mut taken, mut members) = (0, Vec::new());
    for shift in [20, 10, 0] {
        let values = if shift == 20 { mass } else { &members };
        let bins = histogram(values, shift);
        let (mut last, mut before) = (0, (cut.kept, taken));
        for (at, bin) in bins
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, bin)| bin.count > 0)
        {
            (last, before) = (at, (cut.kept, taken));
            cut.kept += bin.mass;
            taken += bin.count;
            if cut.kept >= goal || taken >= most {
                break;
            }
        }
        // If rounding lets no bin reach the goal, stop at the last non-empty bin.
        (cut.kept, taken) = before;
        cut.bits |= (last as u32) << shift;
        if shift > 0 {
            members = filter(values, shift, last);
        } else {
            let m = f64::from(f32::from_bits(cut.bits));
            while cut.equal < bins[last].count && cut.kept < goal && taken < most {
                cut.kept += m;
                cut.equal += 1;
                taken += 1;
            }
        }
    }
    cut
}

#[inline(always)]
fn bin_of(m: f32, shift: u32) -> usize {
    (m.to_bits() >> shift) as usize % BINS
}

/// Mass and count of every bin.
fn histogram(values: &[f32], shift: u32) -> Vec<Bin> {
    /// Neighbours often fall into one bin; separate copies break the dependency.
    const COPIES: usize = 4;
    let mut bins = vec![Bin::default(); COPIES * BINS];
    for part in values.chunks(COPIES) {
        for (copy, &m) in part.iter().enumerate() {
            let bin = &mut bins[copy * BINS + bin_of(m, shift)];
            bin.mass += f64::from(m);
            bin.count += 1;
        }
    }
    let (sums, others) = bins.split_at_mut(BINS);
    for copy in others.chunks(BINS) {
        for (sum, bin) in sums.iter_mut().zip(copy) {
            sum.mass += bin.mass;
            sum.count += bin.count;
        }
    }
    bins.truncate(BINS);
    bins
}

/// The values of one bin, without an unpredictable branch.
fn filter(values: &[f32], shift: u32, bin: usize) -> Vec<f32> {
    let mut members = vec![0f32; values.len()];
    let mut count = 0;
    for &m in values {
        members[count] = m;
        count += usize::from(bin_of(m, shift) == bin);
    }
    members.truncate(count);
    members
}

/// First token whose cumulative mass exceeds `uniform` of the total.
fn invert(mass: &[f32], chunks: &[f64], uniform: f64) -> Option<usize> {
    let goal = uniform * chunks.iter().sum::<f64>();
    let mut before = 0.0;
    // Rounding may leave the goal beyond the last token: then it is the last with any mass.
    let mut last = None;
    for (at, (part, &sum)) in mass.chunks(CHUNK).zip(chunks).enumerate() {
        if sum == 0.0 {
            continue;
        }
        if before + sum > goal {
            let mut cumulative = before;
            for (i, &m) in part.iter().enumerate() {
                cumulative += f64::from(m);
                if m > 0.0 {
                    last = Some(at * CHUNK + i);
                    if cumulative > goal {
                        return last;
                    }
                }
            }
            return last;
        }
        before += sum;
        last = part.iter().rposition(|&m| m > 0.0).map(|i| at * CHUNK + i);
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Domain, Stream};

    const PLAIN: Shaping<'_> = Shaping {
        temperature: 1.0,
        top_k: None,
        top_p: 1.0,
        forbidden: &[],
    };

    fn numbers(count: usize, seed: u64) -> Vec<f64> {
        let mut stream = Stream::new(seed, Domain::Mask, 0, 0);
        (0..count).map(|_| stream.next_f64()).collect()
    }

    /// The definition, by sorting in float64.
    fn reference(row: &[f32], uniform: f64, how: Shaping<'_>) -> usize {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut p: Vec<f64> = row
            .iter()
            .map(|&x| ((f64::from(x) - f64::from(top)) / f64::from(how.temperature)).exp())
            .collect();
        for &id in how.forbidden {
            p[id] = 0.0;
        }
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
        order.truncate(how.top_k.unwrap_or(p.len()));
        let goal = how.top_p * order.iter().map(|&i| p[i]).sum::<f64>();
        let mut before = 0.0;
        let mut kept = vec![0.0; p.len()];
        for i in order {
            if how.top_p < 1.0 && before >= goal {
                break;
            }
            kept[i] = p[i];
            before += p[i];
        }
        let goal = uniform * kept.iter().sum::<f64>();
        let mut cumulative = 0.0;
        let crossed = kept.iter().position(|m| {
            cumulative += m;
            cumulative > goal
        });
        crossed.unwrap()
    }

    fn run(logits: &[f32], uniform: &[f64], how: Shaping<'_>, threads: usize) -> Vec<i64> {
        let (mut token, mut log_p) = (vec![-9; uniform.len()], vec![0.0; uniform.len()]);
        draw(logits, None, uniform, how, &mut token, &mut log_p, threads).unwrap();
        token
    }

    #[test]
    fn equals_the_definition() {
        for vocab in [1usize, 5, 16, 255, 256, 1000, 5003] {
            let rows = 40;
            let spread = numbers(rows * vocab, 1);
            let logits: Vec<f32> = spread.iter().map(|x| (x * 8.0) as f32).collect();
            let uniform = numbers(rows, 2);
            let forbidden = [0, vocab / 2];
            for (temperature, top_k, top_p, forbidden) in [
                (1.0, None, 1.0, &[][..]),
                (1.0, None, 0.9, &[]),
                (0.7, Some(3), 1.0, &[]),
                (1.3, Some(50), 0.5, &[]),
                (1.0, Some(1), 0.3, &[]),
                (1.0, None, 1e-9, &[]),
                (1.0, None, 0.95, &forbidden[..]),
            ] {
                if vocab < 3 && !forbidden.is_empty() {
                    continue;
                }
                let how = Shaping {
                    temperature,
                    top_k,
                    top_p,
                    forbidden,
                };
                let one = run(&logits, &uniform, how, 1);
                assert_eq!(one, run(&logits, &uniform, how, 3));
                for r in 0..rows {
                    let row = &logits[r * vocab..(r + 1) * vocab];
                    let expected = reference(row, uniform[r], how);
                    assert_eq!(one[r] as usize, expected, "V {vocab}, row {r}, {how:?}");
                }
            }
        }
    }

    #[test]
    fn equal_probabilities_count_in_the_order_of_ids() {
        let how = Shaping {
            top_p: 0.5,
            ..PLAIN
        };
        let grid: Vec<f64> = (0..1000).map(|i| (f64::from(i) + 0.5) / 1000.0).collect();
        let tokens = run(&vec![1.5; 8 * 1000], &grid, how, 1);
        let counts = (0..8).map(|id| tokens.iter().filter(|t| **t == id).count());
        assert_eq!(counts.collect::<Vec<_>>(), [250, 250, 250, 250, 0, 0, 0, 0]);
    }

    #[test]
    fn the_crossing_token_stays_and_the_ends_are_safe() {
        let logits: Vec<f32> = [0.5f64, 0.3, 0.2].map(|p| p.ln() as f32).to_vec();
        let how = |top_p| Shaping { top_p, ..PLAIN };
        // 0.5 is below 0.6: the second token crosses, and stays.
        assert_eq!(run(&logits, &[0.999_999], how(0.6), 1), [1]);
        assert_eq!(run(&logits, &[0.999_999], how(0.4), 1), [0]);
        assert_eq!(run(&logits, &[1.0 - 1e-16], PLAIN, 1), [2]);
        assert_eq!(
            run(&[0.0, f32::NEG_INFINITY], &[1.0 - 1e-16], PLAIN, 1),
            [0]
        );
        assert_eq!(run(&[f32::NEG_INFINITY, 0.0], &[0.0], PLAIN, 1), [1]);
        let greedy = Shaping {
            temperature: 0.0,
            forbidden: &[1],
            ..PLAIN
        };
        assert_eq!(run(&[1.0, 9.0, 3.0, 3.0], &[0.9], greedy, 1), [2]);
        // A forbidden token so probable that the others underflow.
        let without = Shaping {
            forbidden: &[0],
            ..PLAIN
        };
        assert_eq!(run(&[500.0, 1.0, -300.0], &[0.5], without, 1), [1]);
    }

    #[test]
    fn the_tail_behind_a_heavy_token_is_hit_token_by_token() {
        // One token of nearly all the mass in front of 50,000 of 1e-9 each, whose sum a float32
        // next to one would lose.
        let (vocab, tail) = (50_257usize, 1e-9f64);
        let mut logits = vec![tail.ln() as f32; vocab];
        logits[0] = 0.0;
        let m = f64::from(exp(logits[1]));
        let total = 1.0 + m * (vocab - 1) as f64;
        let wanted = [1usize, 2, 254, 255, 256, 257, 25_000, vocab - 2, vocab - 1];
        let uniform = wanted.map(|id| (1.0 + m * (id as f64 - 0.5)) / total);
        let logits = logits.repeat(wanted.len());
        let tokens = run(&logits, &uniform, PLAIN, 1);
        assert_eq!(tokens, wanted.map(|id| id as i64));
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let vocab = 777;
        let logits: Vec<f32> = numbers(vocab, 3)
            .iter()
            .map(|x| (x * 20.0) as f32)
            .collect();
        let other: Vec<f32> = logits.iter().map(|x| -x).collect();
        let (mut token, mut log_p) = ([0; 1], [0.0; 1]);
        let how = Shaping {
            temperature: 0.3,
            top_p: 0.8,
            ..PLAIN
        };
        draw(
            &logits,
            Some(&other),
            &[0.4],
            how,
            &mut token,
            &mut log_p,
            1,
        )
        .unwrap();
        let z: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let expected = f64::from(logits[token[0] as usize]) - z.ln();
        assert!(
            (log_p[0] - expected).abs() < 1e-5,
            "{} {expected}",
            log_p[0]
        );
        assert_eq!(token[0] as usize, reference(&other, 0.4, how));
    }

    #[test]
    fn every_instruction_set_draws_the_same() {
        let logits: Vec<f32> = (0..3 * 1003)
            .map(|i| (i * i % 701) as f32 / 100.0)
            .collect();
        let shaping = Shaping {
            temperature: 0.7,
            top_k: Some(400),
            top_p: 0.9,
            forbidden: &[3],
        };
        let results = crate::cpu::multiversion::tests::at_each(|| {
            let (mut token, mut log_p) = ([0; 3], [0.0; 3]);
            let uniform = [0.1, 0.5, 0.999];
            draw(&logits, None, &uniform, shaping, &mut token, &mut log_p, 1).unwrap();
            (token, log_p)
        });
        assert!(results.iter().all(|r| *r == results[0]));
    }

    #[test]
    fn wrong_input_is_named() {
        let (mut token, mut log_p) = ([0; 2], [0.0; 2]);
        let mut run = |logits: &[f32], forbidden: &[usize]| {
            let how = Shaping { forbidden, ..PLAIN };
            draw(logits, None, &[0.5; 2], how, &mut token, &mut log_p, 1)
                .unwrap_err()
                .to_string()
        };
        assert!(run(&[0.0; 5], &[]).contains("5 logits for 2 rows"));
        assert!(run(&[0.0; 6], &[3]).contains("forbidden = 3"));
        assert!(run(&[0.0; 4], &[0, 1]).contains("row 0"));
        assert!(run(&[f32::NEG_INFINITY; 4], &[]).contains("row 0"));
        assert!(run(&[0.0, 1.0, 0.0, f32::NAN], &[]).contains("row 1: must be without NaN"));
        assert!(run(&[0.0, f32::INFINITY, 0.0, 0.0], &[]).contains("row 0"));
    }
}
