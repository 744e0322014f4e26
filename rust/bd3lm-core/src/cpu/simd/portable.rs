//! Eight lanes in plain Rust, for processors without a kernel of their own.

use super::{EXP2, EXP2_MIN, ROUND, Simd};

/// float32 products, lane by lane.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Lanes = [f32; 8];

#[inline(always)]
fn zip_with(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = Lanes;
    type M = [bool; 8];
    const W: usize = 8;
    const PAIR: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Lanes {
        // SAFETY: 8 readable values, by the contract of the trait.
        unsafe { p.cast::<Lanes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Lanes) {
        // SAFETY: 8 writable values, by the contract of the trait.
        unsafe { p.cast::<Lanes>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        zip_with(a, b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        zip_with(a, b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        zip_with(a, b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        zip_with(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        // Not `mul_add`, which without the instruction is a library call a lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn dot(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn unit(p: *const f32) -> Lanes {
        // SAFETY: one readable value, by the contract of the trait.
        [unsafe { p.read_unaligned() }; 8]
    }
    #[inline(always)]
    unsafe fn exp2(x: Lanes) -> Lanes {
        x.map(|x| {
            let t = x + ROUND;
            let r = x - (t - ROUND);
            let p = EXP2.iter().rev().fold(0.0, |p, c| p * r + c) * r + 1.0;
            let bits = p.to_bits().wrapping_add(t.to_bits() << 23);
            if x < EXP2_MIN {
                0.0
            } else {
                f32::from_bits(bits)
            }
        })
    }
    #[inline(always)]
    unsafe fn sum(x: Lanes) -> f32 {
        x.iter().sum()
    }
    #[inline(always)]
    unsafe fn top(x: Lanes) -> f32 {
        x.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn inside(lo: *const i32, hi: *const i32, j: i32) -> [bool; 8] {
        // SAFETY: 8 readable values each, by the contract of the trait.
        std::array::from_fn(|i| unsafe { *lo.add(i) <= j && j < *hi.add(i) })
    }
    #[inline(always)]
    unsafe fn keep(m: [bool; 8], x: Lanes, other: Lanes) -> Lanes {
        std::array::from_fn(|i| if m[i] { x[i] } else { other[i] })
    }
    #[inline(always)]
    unsafe fn zip(even: Lanes, _odd: Lanes) -> Lanes {
        even
    }
    #[inline(always)]
    unsafe fn store_units(p: *mut f32, x: Lanes) {
        // SAFETY: 8 writable units, by the contract of the trait.
        unsafe { Self::store(p, x) }
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, ld_src: usize, dst: *mut f32, ld_dst: usize) {
        for r in 0..8 {
            for c in 0..8 {
                // SAFETY: 8 rows of 8 values at both pointers, by the contract of the trait.
                unsafe { *dst.add(c * ld_dst + r) = *src.add(r * ld_src + c) };
            }
        }
    }
}
