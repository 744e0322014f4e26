//! Vectors of float32 lanes, one implementation an instruction set.
//!
//! Kernels are written once over [`Simd`] and compiled once for each [`super::Isa`]. Operands of a
//! product are counted in 32-bit *units*: one float32, or on bf16 hardware a pair of bf16 that
//! are neighbours along the summed axis, so that the loops over both are the same.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod portable;

/// Coefficients of 2^r on [-1/2, 1/2] after the leading 1: relative error 9.2e-8.
#[allow(clippy::approx_constant)] // the fit is near ln 2, not at it
pub(super) const EXP2: [f32; 5] = [
    0.693_147,
    0.240_222_42,
    0.055_507_336,
    0.009_671_513,
    0.001_326_472_7,
];
/// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits.
pub(super) const ROUND: f32 = 12_582_912.0;
/// Below this 2^x is taken as zero.
pub(super) const EXP2_MIN: f32 = -126.0;

/// Vectors of `W` float32 lanes, and the operations that kernels need.
///
/// # Safety
/// Every method needs the instruction set of the implementation; those that take pointers need
/// `W` readable or writable 32-bit values there (no alignment).
pub(crate) trait Simd: Copy + 'static {
    /// Lanes.
    type V: Copy;
    /// One truth value a lane.
    type M: Copy;
    /// Number of lanes.
    const W: usize;
    /// Elements in a 32-bit unit of a product: 1 (float32) or 2 (bf16).
    const PAIR: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, x: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c in float32.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c plus the product of units a and b, summed over the elements of a unit.
    unsafe fn dot(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// One unit in every lane.
    unsafe fn unit(p: *const f32) -> Self::V;
    /// 2^x, zero below [`EXP2_MIN`]; NaN stays NaN.
    unsafe fn exp2(x: Self::V) -> Self::V;
    /// Sum over the lanes.
    unsafe fn sum(x: Self::V) -> f32;
    /// Largest lane.
    unsafe fn top(x: Self::V) -> f32;
    /// Lanes whose interval `lo <= j < hi` holds `j`.
    unsafe fn inside(lo: *const i32, hi: *const i32, j: i32) -> Self::M;
    /// `x` where true, else `other`.
    unsafe fn keep(m: Self::M, x: Self::V, other: Self::V) -> Self::V;
    /// Units whose elements are those of `even` and `odd` lane by lane (float32: `even`).
    unsafe fn zip(even: Self::V, odd: Self::V) -> Self::V;
    /// Writes the W / PAIR units whose elements are neighbouring lanes.
    ///
    /// # Safety
    /// That many writable units.
    unsafe fn store_units(p: *mut f32, x: Self::V);
    /// Transposes W rows of W units: `dst[c * ld_dst + r] = src[r * ld_src + c]`.
    ///
    /// # Safety
    /// W rows of W units at both pointers.
    unsafe fn transpose(src: *const f32, ld_src: usize, dst: *mut f32, ld_dst: usize);
}

/// Evaluates an expression with `$simd` as the vectors of an instruction set.
macro_rules! dispatch {
    ($isa:expr, $simd:ident => $body:expr) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512Bf16 => {
                type $simd = $crate::cpu::simd::avx512::Avx512Bf16;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx512 => {
                type $simd = $crate::cpu::simd::avx512::Avx512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Isa::Avx2 => {
                type $simd = $crate::cpu::simd::avx2::Avx2;
                $body
            }
            _ => {
                type $simd = $crate::cpu::simd::portable::Portable;
                $body
            }
        }
    };
}

pub(crate) use dispatch;
