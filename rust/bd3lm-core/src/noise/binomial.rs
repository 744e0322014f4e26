//! Draws from a binomial distribution truncated to an interval.

/// Largest n whose binomial coefficients are tabulated.
const MAX_TABLE: usize = 32;

pub(super) const CHOOSE: [[f64; MAX_TABLE + 1]; MAX_TABLE + 1] = {
    let mut table = [[0.0; MAX_TABLE + 1]; MAX_TABLE + 1];
    let mut n = 0;
    while n <= MAX_TABLE {
        table[n][0] = 1.0;
        let mut k = 1;
        while k <= n {
            table[n][k] = table[n - 1][k - 1] + table[n - 1][k];
            k += 1;
        }
        n += 1;
    }
    table
};

/// Binomial(n, p) conditioned on lo ≤ k ≤ hi, by inverting its distribution at `u`.
pub(super) fn truncated_binomial(n: usize, p: f64, lo: usize, hi: usize, u: f64) -> usize {
    if p >= 1.0 || lo == hi {
        return hi;
    }
    if n > MAX_TABLE {
        return truncated_binomial_of_many(n, p, lo, hi, u);
    }
    // Most blocks are small, and need no array of the largest size.
    if hi - lo < 8 {
        invert::<8>(n, p, lo, hi, u)
    } else {
        invert::<{ MAX_TABLE + 1 }>(n, p, lo, hi, u)
    }
}

/// The same from tabulated coefficients, for at most `ROOM` counts.
#[inline(always)]
fn invert<const ROOM: usize>(n: usize, p: f64, lo: usize, hi: usize, u: f64) -> usize {
    // Unnormalised, with the powers counted from the end where they are 1: nothing overflows, and
    // the sum is at least 1.
    let mut mass = [0.0; ROOM];
    let mass = &mut mass[..=hi - lo];
    let choose = &CHOOSE[n][lo..=hi];
    let (mut power, mut sum) = (1.0, 0.0);
    if p <= 0.5 {
        let ratio = p / (1.0 - p);
        for (m, c) in mass.iter_mut().zip(choose) {
            *m = c * power;
            sum += *m;
            power *= ratio;
        }
    } else {
        let ratio = (1.0 - p) / p;
        for (m, c) in mass.iter_mut().zip(choose).rev() {
            *m = c * power;
            sum += *m;
            power *= ratio;
        }
    }
    lo + quantile(mass, u * sum)
}

fn truncated_binomial_of_many(n: usize, p: f64, lo: usize, hi: usize, u: f64) -> usize {
    // Outwards from the most probable count, so that no sum underflows to zero.
    let ratio = p / (1.0 - p);
    let mode = (((n + 1) as f64 * p) as usize).clamp(lo, hi);
    let up = |k: usize| (n - k) as f64 / (k + 1) as f64 * ratio; // P(k+1)/P(k)
    let mut mass = vec![0.0; hi - lo + 1];
    mass[mode - lo] = 1.0;
    for k in mode..hi {
        mass[k + 1 - lo] = mass[k - lo] * up(k);
    }
    for k in (lo..mode).rev() {
        mass[k - lo] = mass[k + 1 - lo] / up(k);
    }
    let goal = u * mass.iter().sum::<f64>();
    lo + quantile(&mass, goal)
}

/// The first place at which the running sum of `mass` passes `goal`, or the last.
fn quantile(mass: &[f64], goal: f64) -> usize {
    // Counts to the end: a branch at the crossing would be mispredicted.
    let (mut sum, mut below) = (0.0, 0);
    for m in mass {
        sum += m;
        below += usize::from(sum <= goal);
    }
    below.min(mass.len() - 1)
}
