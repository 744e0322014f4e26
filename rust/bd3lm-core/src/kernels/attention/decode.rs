//! Decoding: few queries over a long cache, bound by one read of K and V. Lanes are keys, because
//! there are too few queries to fill a vector.

use super::backend::{Backend, MAX_W};
use super::forward::{Head, Queries};
use super::layout::row_units;
use super::tiles::Tile;
use crate::cpu::scratch::{self, Scratch};
use crate::cpu::simd::Simd;
use crate::kernels::product::product;
use std::f32::consts::{LN_2, LOG2_E};

/// Queries of all heads on one head of keys, at most.
pub(super) const MAX_ROWS: usize = 16;
/// Keys that are transposed at once.
pub(super) const KEYS: usize = 64;

/// # Safety
/// As [`super::forward::forward`]; `queries.len()` times the rows of a tile is at most MAX_ROWS.
pub(super) unsafe fn decode<B: Backend>(head: &Head, queries: &[Queries], tiles: &[Tile]) {
    let width = head.k.width;
    let ld = row_units(width, 1);
    let in_place = head.k.is_whole() && head.v.is_whole();
    let lengths = [
        MAX_ROWS * ld,
        KEYS * ld,
        ld * KEYS,
        KEYS * ld,
        MAX_ROWS * KEYS,
        MAX_ROWS * ld,
    ];
    scratch::with(&lengths, |scratch: &mut Scratch<'_>| {
        let [q, k, kt, v, s, out] = lengths.map(|len| scratch.take(len));
        for tile in tiles {
            let rows = tile.rows * queries.len();
            let padded = rows.next_multiple_of(4);
            debug_assert!(padded <= MAX_ROWS);
            let (mut max, mut sum) = ([B::FLOOR; MAX_ROWS], [0f32; MAX_ROWS]);
            // SAFETY: MAX_ROWS rows at `q` and `out`; the queries of the tile exist.
            unsafe {
                q.write_bytes(0, MAX_ROWS * ld);
                out.write_bytes(0, MAX_ROWS * ld);
                for (h, queries) in queries.iter().enumerate() {
                    let to = q.add(h * tile.rows * ld);
                    B::rows(&queries.q, tile.first, tile.rows, tile.rows, to, ld);
                }
                let scale = head.scale * LOG2_E;
                for i in 0..rows * ld {
                    *q.add(i) *= scale;
                }
            }
            for stream in &tile.streams {
                let span = stream.span(0, tile.rows);
                // The interval of every row; rows that only fill up see nothing.
                let (mut lo, mut hi) = ([0; MAX_ROWS], [0; MAX_ROWS]);
                for r in 0..rows {
                    lo[r] = stream.lo[r % tile.rows];
                    hi[r] = stream.hi[r % tile.rows];
                }
                let mut key = span.lo as usize;
                while key < span.hi as usize {
                    let left = span.hi as usize - key;
                    // Whole vectors of keys are read in place; the rest is padded.
                    let whole = left / (2 * MAX_W) * (2 * MAX_W);
                    let direct = in_place && whole > 0;
                    let n = KEYS.min(if direct { whole } else { left });
                    let keys = n.next_multiple_of(2 * MAX_W);
                    // SAFETY: keys .. key + n exist; the pieces hold KEYS rows of ld.
                    unsafe {
                        let (k, ld_k) = if direct {
                            head.k.line(key)
                        } else {
                            B::rows(&head.k, key, n, keys, k, ld);
                            (k.cast_const(), ld)
                        };
                        let (v, ld_v) = if direct {
                            head.v.line(key)
                        } else {
                            B::rows(&head.v, key, n, keys, v, ld);
                            (v.cast_const(), ld)
                        };
                        B::decode(&mut DecodeStep {
                            rows: padded,
                            keys,
                            first: key as i32,
                            lo: &lo,
                            hi: &hi,
                            full: (span.full_lo, span.full_hi),
                            width,
                            ld,
                            q,
                            k,
                            ld_k,
                            kt,
                            v,
                            ld_v,
                            s,
                            out,
                            max: &mut max,
                            sum: &mut sum,
                        });
                    }
                    key += n;
                }
            }
            for (h, queries) in queries.iter().enumerate() {
                let at = h * tile.rows;
                let mut factors = [0f32; MAX_ROWS];
                for (i, factor) in factors.iter_mut().enumerate().take(tile.rows) {
                    let (max, sum) = (max[at + i], sum[at + i]);
                    let seen = sum > 0.0 || sum.is_nan();
                    *factor = if seen { 1.0 / sum } else { 0.0 };
                    let lse = if seen {
                        (max + sum.log2()) * LN_2
                    } else {
                        f32::NEG_INFINITY
                    };
                    // SAFETY: a query of the tile.
                    unsafe { *queries.lse.add(tile.first + i) = lse };
                }
                // SAFETY: the rows of the tile exist in `out`, and factors for them.
                unsafe {
                    let from = out.add(at * ld);
                    let n = tile.rows;
                    B::unpack(from, ld, &queries.out, tile.first, n, factors.as_ptr());
                }
            }
        }
    });
}

/// One run of keys against all rows of a decoding step.
pub(super) struct DecodeStep<'a> {
    /// Queries, a multiple of 4.
    pub rows: usize,
    /// Keys, a multiple of 2 W; those that do not exist are rows of zeros that no query sees.
    pub keys: usize,
    pub first: i32,
    pub lo: &'a [i32; MAX_ROWS],
    pub hi: &'a [i32; MAX_ROWS],
    /// Keys that all rows see.
    pub full: (i32, i32),
    pub width: usize,
    /// Row length of q and out.
    pub ld: usize,
    pub q: *const f32,
    pub k: *const f32,
    /// Row length of k.
    pub ld_k: usize,
    /// Scratch for K^T.
    pub kt: *mut f32,
    pub v: *const f32,
    /// Row length of v.
    pub ld_v: usize,
    /// Scratch for scores.
    pub s: *mut f32,
    pub out: *mut f32,
    pub max: &'a mut [f32; MAX_ROWS],
    pub sum: &'a mut [f32; MAX_ROWS],
}

/// Scores, softmax and output of a run of keys.
///
/// # Safety
/// As [`Backend::decode`].
#[inline(always)]
pub(super) unsafe fn decode_step<S: Simd>(x: &mut DecodeStep<'_>) {
    // SAFETY: by the contract of `Backend::decode`.
    unsafe {
        for r in (0..x.keys).step_by(S::W) {
            for c in (0..x.width).step_by(S::W) {
                S::transpose(
                    x.k.add(r * x.ld_k + c),
                    x.ld_k,
                    x.kt.add(c * KEYS + r),
                    KEYS,
                );
            }
        }
        let hidden = S::splat(f32::NEG_INFINITY);
        let partial = x.first < x.full.0 || x.first + x.keys as i32 > x.full.1;
        for r in (0..x.rows).step_by(4) {
            for c in (0..x.keys).step_by(2 * S::W) {
                let zero = [[S::splat(0.0); 2]; 4];
                let (q, kt) = (x.q.add(r * x.ld), x.kt.add(c));
                let acc = product::<S, 4, 2>(q, (x.ld, 1), kt, KEYS, x.width, zero);
                for (i, acc) in acc.iter().enumerate() {
                    for (n, &score) in acc.iter().enumerate() {
                        let at = c + n * S::W;
                        let mut score = score;
                        if partial {
                            // lo <= first + lane < hi, as a comparison of lanes with one key.
                            let lane = |bound: i32| std::array::from_fn(|l| bound - l as i32);
                            let lo: [i32; MAX_W] = lane(x.lo[r + i]);
                            let hi: [i32; MAX_W] = lane(x.hi[r + i]);
                            let seen = S::inside(lo.as_ptr(), hi.as_ptr(), x.first + at as i32);
                            score = S::keep(seen, score, hidden);
                        }
                        S::store(x.s.add((r + i) * KEYS + at), score);
                    }
                }
            }
        }
        for r in 0..x.rows {
            let s = x.s.add(r * KEYS);
            let mut top = hidden;
            for c in (0..x.keys).step_by(S::W) {
                top = S::max(top, S::load(s.add(c)));
            }
            let new = x.max[r].max(S::top(top));
            let shrink = S::top(S::exp2(S::splat(x.max[r] - new)));
            let mut sum = S::splat(0.0);
            for c in (0..x.keys).step_by(S::W) {
                let p = S::exp2(S::sub(S::load(s.add(c)), S::splat(new)));
                sum = S::add(sum, p);
                S::store(s.add(c), p);
            }
            x.max[r] = new;
            x.sum[r] = x.sum[r] * shrink + S::sum(sum);
            if shrink != 1.0 {
                for c in 0..x.ld {
                    *x.out.add(r * x.ld + c) *= shrink;
                }
            }
        }
        for r in (0..x.rows).step_by(4) {
            let s = x.s.add(r * KEYS);
            for c in (0..x.width).step_by(2 * S::W) {
                let out = x.out.add(r * x.ld + c);
                let v = x.v.add(c);
                if c + S::W < x.width {
                    add_rows::<S, 2>(s, (v, x.ld_v), x.keys, (out, x.ld));
                } else {
                    add_rows::<S, 1>(s, (v, x.ld_v), x.keys, (out, x.ld));
                }
            }
        }
    }
}

/// `out[i][..N * W] += sum_j p[i][j] v[j][..N * W]` for 4 rows.
#[inline(always)]
unsafe fn add_rows<S: Simd, const N: usize>(
    p: *const f32,
    (v, ld_v): (*const f32, usize),
    keys: usize,
    (out, ld): (*mut f32, usize),
) {
    // SAFETY: by the contract of `Backend::decode`.
    unsafe {
        let mut acc = [[S::splat(0.0); N]; 4];
        for (i, row) in acc.iter_mut().enumerate() {
            for (n, x) in row.iter_mut().enumerate() {
                *x = S::load(out.add(i * ld + n * S::W));
            }
        }
        let acc = product::<S, 4, N>(p, (KEYS, 1), v, ld_v, keys, acc);
        for (i, row) in acc.iter().enumerate() {
            for (n, x) in row.iter().enumerate() {
                S::store(out.add(i * ld + n * S::W), *x);
            }
        }
    }
}
