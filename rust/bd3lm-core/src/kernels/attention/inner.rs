//! The inner loops, written once over [`Simd`] and compiled for each instruction set.
//!
//! Scores are transposed: a row is a key, the lanes are queries. K and V are then broadcast in their
//! own layout, the softmax needs no horizontal sums, and a mask is one comparison of the key's
//! index with the interval of each lane.

// One index runs over several arrays of vectors.
#![allow(clippy::needless_range_loop)]

use super::backend::{Backend, Gradients, NV, Operand, Run, Softmax, ZIP_ROW, tile_row};
use crate::cpu::simd::Simd;
use crate::kernels::product::product;

#[inline(always)]
pub(super) unsafe fn scores<S: Simd, const MR: usize, const N: usize, const LD: usize>(
    run: &Run,
    k: *const f32,
    q: *const f32,
    s: *mut f32,
    max: *mut f32,
) {
    // SAFETY: by the contract of `Backend::scores`.
    unsafe {
        let hidden = S::splat(f32::NEG_INFINITY);
        let mut m = [hidden; N];
        let mut row = 0;
        while row < run.keys {
            let zero = [[S::splat(0.0); N]; MR];
            let mut acc =
                product::<S, MR, N>(k.add(row * LD), (LD, 1), q, NV * S::W, run.depth, zero);
            let j = run.first + row as i32;
            if j < run.full.0 || j + MR as i32 > run.full.1 {
                for (i, x) in acc.iter_mut().enumerate() {
                    for (n, x) in x.iter_mut().enumerate() {
                        let (lo, hi) = (run.lo.add(n * S::W), run.hi.add(n * S::W));
                        *x = S::keep(S::inside(lo, hi, j + i as i32), *x, hidden);
                    }
                }
            }
            for (i, x) in acc.iter().enumerate() {
                for n in 0..N {
                    m[n] = S::max(m[n], x[n]);
                    S::store(s.add(((row + i) * NV + n) * S::W), x[n]);
                }
            }
            row += MR;
        }
        for n in 0..N {
            S::store(max.add(n * S::W), m[n]);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn softmax<S: Backend, const N: usize>(
    run: &Run,
    s: *mut f32,
    block_max: *const f32,
    state: &Softmax,
) -> bool {
    // SAFETY: by the contract of `Backend::softmax`.
    unsafe {
        let scale = S::splat(run.scale);
        let mut minus_max = [S::splat(0.0); N];
        let mut sum = minus_max;
        for n in 0..N {
            let at = n * S::W;
            let old = S::load(state.max.add(at));
            let block = S::mul(S::load(block_max.add(at)), scale);
            let new = S::max(S::max(old, block), S::splat(S::FLOOR));
            let shrink = S::exp2(S::sub(old, new));
            S::store(state.max.add(at), new);
            S::store(state.shrink.add(at), shrink);
            minus_max[n] = S::sub(S::splat(0.0), new);
            sum[n] = S::mul(S::load(state.sum.add(at)), shrink);
        }
        let mut row = 0;
        while row < run.keys {
            for n in 0..N {
                let mut p = [S::splat(0.0); 2];
                for (i, p) in p.iter_mut().enumerate() {
                    let x = S::load(s.add(((row + i) * NV + n) * S::W));
                    *p = S::exp2(S::fma(x, scale, minus_max[n]));
                    sum[n] = S::add(sum[n], *p);
                }
                if S::PAIR == 2 {
                    S::store(s.add((row / 2 * NV + n) * S::W), S::zip(p[0], p[1]));
                } else {
                    S::store(s.add((row * NV + n) * S::W), p[0]);
                    S::store(s.add(((row + 1) * NV + n) * S::W), p[1]);
                }
            }
            row += 2;
        }
        for n in 0..N {
            S::store(state.sum.add(n * S::W), sum[n]);
        }
        (0..N * S::W).any(|i| *state.shrink.add(i) != 1.0)
    }
}

#[inline(always)]
pub(super) unsafe fn gradients<S: Simd, const MR: usize, const N: usize, const LD: usize>(
    run: &Run,
    g: &Gradients,
) {
    // SAFETY: by the contract of `Backend::gradients`.
    unsafe {
        let scale = S::splat(run.scale);
        let zero = S::splat(0.0);
        let ld = tile_row(S::PAIR);
        let mut row = 0;
        while row < run.keys {
            let start = [[zero; N]; MR];
            let mut p =
                product::<S, MR, N>(g.k.add(row * LD), (LD, 1), g.q, NV * S::W, run.depth, start);
            let j = run.first + row as i32;
            let partial = j < run.full.0 || j + MR as i32 > run.full.1;
            for (i, x) in p.iter_mut().enumerate() {
                for (n, x) in x.iter_mut().enumerate() {
                    let lse = S::load(g.lse.add(n * S::W));
                    *x = S::exp2(S::fma(*x, scale, S::sub(zero, lse)));
                    if partial {
                        let (lo, hi) = (run.lo.add(n * S::W), run.hi.add(n * S::W));
                        *x = S::keep(S::inside(lo, hi, j + i as i32), *x, zero);
                    }
                }
            }
            for (i, x) in p.iter().enumerate() {
                let at = g.p.add((row + i) * ld);
                for n in 0..N {
                    S::store_units(at.add(n * S::W / S::PAIR), x[n]);
                }
            }
            let mut ds = product::<S, MR, N>(
                g.v.add(row * LD),
                (LD, 1),
                g.d_out,
                NV * S::W,
                run.depth,
                start,
            );
            for (i, x) in ds.iter_mut().enumerate() {
                for (n, x) in x.iter_mut().enumerate() {
                    *x = S::mul(p[i][n], S::sub(*x, S::load(g.delta.add(n * S::W))));
                }
                let at = g.ds.add((row + i) * ld);
                for n in 0..N {
                    S::store_units(at.add(n * S::W / S::PAIR), x[n]);
                }
            }
            if S::PAIR == 2 {
                for i in (0..MR).step_by(2) {
                    for n in 0..N {
                        let at = g.ds_zip.add((row + i) / 2 * ZIP_ROW + n * S::W);
                        S::store(at, S::zip(ds[i][n], ds[(i + 1) % MR][n]));
                    }
                }
            }
            row += MR;
        }
    }
}

/// Rows `MR` at a time, N vectors wide, with compile-time strides of one.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, const MR: usize, const N: usize>(
    x: Operand,
    b: *const f32,
    c: *mut f32,
    ld: usize,
) {
    // SAFETY: by the contract of `Backend::accumulate`.
    unsafe {
        let mut row = 0;
        while row < 8 {
            let c = c.add(row * ld);
            let mut acc = [[S::splat(0.0); N]; MR];
            for (i, r) in acc.iter_mut().enumerate() {
                for (j, r) in r.iter_mut().enumerate() {
                    *r = S::load(c.add(i * ld + j * S::W));
                }
            }
            let acc = match (x.transposed, x.ld) {
                (true, _) => product::<S, MR, N>(x.a.add(row), (1, x.ld), b, ld, x.depth, acc),
                (false, _) => {
                    let ld_a = tile_row(S::PAIR);
                    product::<S, MR, N>(x.a.add(row * ld_a), (ld_a, 1), b, ld, x.depth, acc)
                }
            };
            for (i, r) in acc.iter().enumerate() {
                for (j, r) in r.iter().enumerate() {
                    S::store(c.add(i * ld + j * S::W), *r);
                }
            }
            row += MR;
        }
    }
}
