//! 512-bit vectors, with float32 products or with pairs of bf16.

use super::{EXP2, EXP2_MIN, ROUND, Simd};
use std::arch::x86_64::*;

/// float32 products.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// Products of bf16 pairs.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16;

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,fma")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    // "Not less than" is true for NaN, which must come through.
    let live = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(EXP2_MIN));
    let magic = _mm512_set1_ps(ROUND);
    let t = _mm512_add_ps(x, magic);
    let r = _mm512_sub_ps(x, _mm512_sub_ps(t, magic));
    let mut p = _mm512_set1_ps(EXP2[4]);
    for c in [EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
    _mm512_castsi512_ps(_mm512_maskz_add_epi32(
        live,
        _mm512_castps_si512(p),
        exponent,
    ))
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,fma")]
#[inline]
fn transpose16(mut x: [__m512; 16]) -> [__m512; 16] {
    let mut y = x;
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        for h in 0..2 {
            let a = _mm512_castps_pd(y[4 * i + h]);
            let b = _mm512_castps_pd(y[4 * i + 2 + h]);
            x[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // x[4i + c] holds columns c, 4+c, 8+c, 12+c of rows 4i..4i+4, one a 128-bit quarter.
    for c in 0..4 {
        let lo01 = _mm512_shuffle_f32x4::<0x44>(x[c], x[4 + c]);
        let hi01 = _mm512_shuffle_f32x4::<0xee>(x[c], x[4 + c]);
        let lo23 = _mm512_shuffle_f32x4::<0x44>(x[8 + c], x[12 + c]);
        let hi23 = _mm512_shuffle_f32x4::<0xee>(x[8 + c], x[12 + c]);
        y[c] = _mm512_shuffle_f32x4::<0x88>(lo01, lo23);
        y[4 + c] = _mm512_shuffle_f32x4::<0xdd>(lo01, lo23);
        y[8 + c] = _mm512_shuffle_f32x4::<0x88>(hi01, hi23);
        y[12 + c] = _mm512_shuffle_f32x4::<0xdd>(hi01, hi23);
    }
    y
}

macro_rules! common {
    ($features:literal) => {
        type V = __m512;
        type M = __mmask16;
        const W: usize = 16;

        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn splat(x: f32) -> __m512 {
            _mm512_set1_ps(x)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn load(p: *const f32) -> __m512 {
            // SAFETY: 16 readable values, by the contract of the trait.
            unsafe { _mm512_loadu_ps(p) }
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn store(p: *mut f32, x: __m512) {
            // SAFETY: 16 writable values, by the contract of the trait.
            unsafe { _mm512_storeu_ps(p, x) }
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            _mm512_add_ps(a, b)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            _mm512_sub_ps(a, b)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            _mm512_mul_ps(a, b)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            _mm512_max_ps(a, b)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            _mm512_fmadd_ps(a, b, c)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn unit(p: *const f32) -> __m512 {
            // SAFETY: one readable value, by the contract of the trait.
            _mm512_set1_ps(unsafe { p.read_unaligned() })
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn exp2(x: __m512) -> __m512 {
            exp2(x)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn sum(x: __m512) -> f32 {
            _mm512_reduce_add_ps(x)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn top(x: __m512) -> f32 {
            _mm512_reduce_max_ps(x)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn inside(lo: *const i32, hi: *const i32, j: i32) -> __mmask16 {
            // SAFETY: 16 readable values, by the contract of the trait.
            let (lo, hi) = unsafe { (_mm512_loadu_epi32(lo), _mm512_loadu_epi32(hi)) };
            let j = _mm512_set1_epi32(j);
            _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(lo, j), j, hi)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn keep(m: __mmask16, x: __m512, other: __m512) -> __m512 {
            _mm512_mask_blend_ps(m, other, x)
        }
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn transpose(src: *const f32, ld_src: usize, dst: *mut f32, ld_dst: usize) {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                // SAFETY: 16 rows of 16 values at `src`, by the contract of the trait.
                *row = unsafe { _mm512_loadu_ps(src.add(i * ld_src)) };
            }
            for (i, column) in transpose16(rows).into_iter().enumerate() {
                // SAFETY: 16 rows of 16 values at `dst`, by the contract of the trait.
                unsafe { _mm512_storeu_ps(dst.add(i * ld_dst), column) };
            }
        }
    };
}

impl Simd for Avx512 {
    const PAIR: usize = 1;
    common!("avx512f,avx512dq,avx512bw,avx512vl,fma");

    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,fma")]
    #[inline]
    unsafe fn dot(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,fma")]
    #[inline]
    unsafe fn zip(even: __m512, _odd: __m512) -> __m512 {
        even
    }
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,fma")]
    #[inline]
    unsafe fn store_units(p: *mut f32, x: __m512) {
        // SAFETY: 16 writable units, by the contract of the trait.
        unsafe { _mm512_storeu_ps(p, x) }
    }
}

/// Bits of vectors of bf16 and of float32 are exchanged freely here.
#[target_feature(enable = "avx512f")]
#[inline]
fn bf16(x: __m512) -> __m512bh {
    // SAFETY: both types are 64 bytes without invalid bit patterns.
    unsafe { std::mem::transmute(x) }
}

impl Simd for Avx512Bf16 {
    const PAIR: usize = 2;
    common!("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma");

    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn dot(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_dpbf16_ps(c, bf16(a), bf16(b))
    }
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn zip(even: __m512, odd: __m512) -> __m512 {
        // SAFETY: both types are 64 bytes without invalid bit patterns.
        let both: __m512i = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even)) };
        const ORDER: [i16; 32] = {
            let mut order = [0; 32];
            let mut i = 0;
            while i < 16 {
                order[2 * i] = i as i16;
                order[2 * i + 1] = 16 + i as i16;
                i += 1;
            }
            order
        };
        // SAFETY: 64 readable bytes.
        let order = unsafe { _mm512_loadu_epi16(ORDER.as_ptr()) };
        _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
    }
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma")]
    #[inline]
    unsafe fn store_units(p: *mut f32, x: __m512) {
        // SAFETY: both types are 32 bytes without invalid bit patterns; 8 writable units, by
        // the contract of the trait.
        unsafe {
            let units = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
            _mm256_storeu_si256(p.cast(), units)
        }
    }
}
