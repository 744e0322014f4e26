//! 256-bit vectors with fused multiply-add.

use super::{EXP2, EXP2_MIN, ROUND, Simd};
use std::arch::x86_64::*;

/// float32 products.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    type M = __m256;
    const W: usize = 8;
    const PAIR: usize = 1;

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: 8 readable values, by the contract of the trait.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn store(p: *mut f32, x: __m256) {
        // SAFETY: 8 writable values, by the contract of the trait.
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        _mm256_sub_ps(a, b)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        _mm256_max_ps(a, b)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn dot(a: __m256, b: __m256, c: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, c)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn unit(p: *const f32) -> __m256 {
        // SAFETY: one readable value, by the contract of the trait.
        _mm256_set1_ps(unsafe { p.read_unaligned() })
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn exp2(x: __m256) -> __m256 {
        // "Not less than" is true for NaN, which must come through.
        let live = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(EXP2_MIN));
        let magic = _mm256_set1_ps(ROUND);
        let t = _mm256_add_ps(x, magic);
        let r = _mm256_sub_ps(x, _mm256_sub_ps(t, magic));
        let mut p = _mm256_set1_ps(EXP2[4]);
        for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
        }
        let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
        let sum = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
        _mm256_and_ps(live, _mm256_castsi256_ps(sum))
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn sum(x: __m256) -> f32 {
        let half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn top(x: __m256) -> f32 {
        let half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps::<1>(pair, pair)))
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn inside(lo: *const i32, hi: *const i32, j: i32) -> __m256 {
        // SAFETY: 8 readable values, by the contract of the trait.
        let (lo, hi) = unsafe { (_mm256_loadu_si256(lo.cast()), _mm256_loadu_si256(hi.cast())) };
        let j = _mm256_set1_epi32(j);
        let below = _mm256_cmpgt_epi32(lo, j);
        _mm256_castsi256_ps(_mm256_andnot_si256(below, _mm256_cmpgt_epi32(hi, j)))
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn keep(m: __m256, x: __m256, other: __m256) -> __m256 {
        _mm256_blendv_ps(other, x, m)
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn zip(even: __m256, _odd: __m256) -> __m256 {
        even
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn store_units(p: *mut f32, x: __m256) {
        // SAFETY: 8 writable units, by the contract of the trait.
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn transpose(src: *const f32, ld_src: usize, dst: *mut f32, ld_dst: usize) {
        let mut x = [_mm256_setzero_ps(); 8];
        for (i, row) in x.iter_mut().enumerate() {
            // SAFETY: 8 rows of 8 values at `src`, by the contract of the trait.
            *row = unsafe { _mm256_loadu_ps(src.add(i * ld_src)) };
        }
        let mut y = x;
        for i in 0..4 {
            y[2 * i] = _mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]);
            y[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]);
        }
        for i in 0..2 {
            for h in 0..2 {
                let (a, b) = (y[4 * i + h], y[4 * i + 2 + h]);
                x[4 * i + 2 * h] = _mm256_shuffle_ps::<0x44>(a, b);
                x[4 * i + 2 * h + 1] = _mm256_shuffle_ps::<0xee>(a, b);
            }
        }
        for c in 0..4 {
            let low = _mm256_permute2f128_ps::<0x20>(x[c], x[4 + c]);
            let high = _mm256_permute2f128_ps::<0x31>(x[c], x[4 + c]);
            // SAFETY: 8 rows of 8 values at `dst`, by the contract of the trait.
            unsafe {
                _mm256_storeu_ps(dst.add(c * ld_dst), low);
                _mm256_storeu_ps(dst.add((4 + c) * ld_dst), high);
            }
        }
    }
}
