//! The register tile of all matrix products.

// One index runs over several arrays of vectors.
#![allow(clippy::needless_range_loop)]

use crate::cpu::simd::Simd;

/// `acc[i][j] += sum_t a[i * rs + t * cs] . b[t * ldb + j * W ..]`.
///
/// # Safety
/// The pointers cover all elements that the strides reach.
#[inline(always)]
pub(crate) unsafe fn product<S: Simd, const MR: usize, const N: usize>(
    a: *const f32,
    (rs, cs): (usize, usize),
    b: *const f32,
    ldb: usize,
    depth: usize,
    mut acc: [[S::V; N]; MR],
) -> [[S::V; N]; MR] {
    // SAFETY: by the contract of this function.
    unsafe {
        for t in 0..depth {
            let mut bv = [S::splat(0.0); N];
            for (j, x) in bv.iter_mut().enumerate() {
                *x = S::load(b.add(t * ldb + j * S::W));
            }
            for (i, row) in acc.iter_mut().enumerate() {
                let x = S::unit(a.add(i * rs + t * cs));
                for j in 0..N {
                    row[j] = S::dot(x, bv[j], row[j]);
                }
            }
        }
    }
    acc
}
