//! Copies between the caller's strided rows and dense scratch.
//!
//! Every operand is copied once a head: rows a power of two apart would evict each other from the
//! L1 cache, and a copy costs little against the products that read it.

use super::backend::{MAX_W, NV, QT};
use crate::cpu::prefetch::prefetch_line;
use crate::cpu::simd::Simd;
use crate::error::{Result, named};
use std::ops::Range;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// The upper half of a single.
    Bf16,
}

impl Dtype {
    /// The type of this name: `f32` or `bf16`.
    ///
    /// # Errors
    /// An unknown name.
    pub fn parse(name: &str) -> Result<Dtype> {
        named("dtype", name, &[("f32", Dtype::F32), ("bf16", Dtype::Bf16)])
    }

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

/// Rows of one head: `width` neighbouring elements every `stride`.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub ptr: *mut u8,
    pub dtype: Dtype,
    /// Elements from a row to the next.
    pub stride: isize,
    /// Elements in a row.
    pub width: usize,
}

impl Rows {
    /// Prefetches a row, which need not exist.
    #[inline(always)]
    pub fn prefetch(&self, row: usize) {
        let size = self.dtype.size();
        let start = self
            .ptr
            .wrapping_offset(row as isize * self.stride * size as isize);
        for line in (0..self.width * size).step_by(64) {
            prefetch_line(start.wrapping_add(line));
        }
    }

    /// Returns whether a kernel may read rows where they are: float32, a multiple of the widest
    /// vector, in rising order.
    pub fn is_whole(&self) -> bool {
        self.dtype == Dtype::F32 && self.width.is_multiple_of(MAX_W) && self.stride >= 0
    }

    /// A row of float32 where it is, and the numbers from it to the next.
    ///
    /// # Safety
    /// `row` is a row of the tensor, and [`Self::is_whole`].
    #[inline(always)]
    pub unsafe fn line(&self, row: usize) -> (*const f32, usize) {
        // SAFETY: by the contract.
        (unsafe { self.f32(row) }.cast_const(), self.stride as usize)
    }

    /// # Safety
    /// `row` is a row of the tensor.
    #[inline(always)]
    unsafe fn f32(&self, row: usize) -> *mut f32 {
        // SAFETY: the row lies inside the tensor.
        unsafe { self.ptr.cast::<f32>().offset(row as isize * self.stride) }
    }

    /// # Safety
    /// `row` is a row of the tensor.
    #[inline(always)]
    unsafe fn u16(&self, row: usize) -> *mut u16 {
        // SAFETY: the row lies inside the tensor.
        unsafe { self.ptr.cast::<u16>().offset(row as isize * self.stride) }
    }
}

/// Rows that are needed soon, the first of them last: prefetched a few at a time, between pieces of
/// other work.
pub(super) struct Ahead(pub Vec<(Rows, Range<usize>)>);

impl Ahead {
    /// Prefetches the next few.
    pub fn step(&mut self) {
        const FEW: usize = 32;
        for _ in 0..FEW {
            let Some((rows, left)) = self.0.last_mut() else {
                return;
            };
            match left.next() {
                Some(row) => rows.prefetch(row),
                None => drop(self.0.pop()),
            }
        }
    }
}

/// Rows are far apart, often a page: no hardware prefetcher finds the next one.
const AHEAD: usize = 16;

/// Units from a packed row to the next: one of few values, each a constant of its kernels.
pub(super) fn row_units(width: usize, pair: usize) -> usize {
    width.div_ceil(pair).next_power_of_two().max(16)
}

#[inline(always)]
pub(super) fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Rounds to nearest even; NaN stays NaN.
#[inline(always)]
pub(super) fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let kept = if x.is_nan() {
        bits | 0x40_0000
    } else {
        rounded
    };
    (kept >> 16) as u16
}

/// Copies rows `from .. from + n` to `dst[n][ld]` units, zero beyond the width.
///
/// # Safety
/// The rows exist; `dst` holds `n * ld` units, and `ld` is a multiple of W.
#[inline(always)]
pub(super) unsafe fn rows<S: Simd>(src: &Rows, from: usize, n: usize, dst: *mut f32, ld: usize) {
    let zero_from = src.width / S::PAIR; // the last unit of an odd width is half zero
    for i in 0..n {
        src.prefetch(from + i + AHEAD);
        // SAFETY: row i of both, `width` elements and `ld` units long; whole vectors of the
        // source lie below `width`, those of `dst` below `ld`.
        unsafe {
            let to = dst.add(i * ld);
            for c in (zero_from / S::W * S::W..ld).step_by(S::W) {
                S::store(to.add(c), S::splat(0.0));
            }
            let per_unit = match src.dtype {
                Dtype::F32 => 1,
                Dtype::Bf16 if S::PAIR == 1 => {
                    widen_row::<S>(src.u16(from + i), src.width, to);
                    continue;
                }
                Dtype::Bf16 => 2,
            };
            let row = src.ptr.offset(from as isize * src.stride * (4 / per_unit));
            let row = row
                .offset(i as isize * src.stride * (4 / per_unit))
                .cast::<f32>();
            let whole = src.width / per_unit as usize / S::W * S::W;
            for c in (0..whole).step_by(S::W) {
                S::store(to.add(c), S::load(row.add(c)));
            }
            let bytes = src.width * src.dtype.size() - 4 * whole;
            if bytes > 0 {
                to.add(whole)
                    .cast::<u8>()
                    .copy_from_nonoverlapping(row.add(whole).cast(), bytes);
            }
        }
    }
}

/// # Safety
/// `width` elements at `row`, as many values at `to`.
#[inline(always)]
unsafe fn widen_row<S: Simd>(row: *const u16, width: usize, to: *mut f32) {
    let whole = width / S::W * S::W;
    // SAFETY: whole vectors below `whole`, single elements after it.
    unsafe {
        for c in (0..whole).step_by(S::W) {
            S::store(to.add(c), wide::<S>(row.add(c)));
        }
        for c in whole..width {
            *to.add(c) = widen(*row.add(c));
        }
    }
}

/// W bf16 as float32.
///
/// # Safety
/// W elements at `p`.
#[inline(always)]
unsafe fn wide<S: Simd>(p: *const u16) -> S::V {
    let mut lanes = [0f32; MAX_W];
    // SAFETY: W <= MAX_W elements.
    unsafe {
        for (k, lane) in lanes.iter_mut().enumerate().take(S::W) {
            *lane = widen(*p.add(k));
        }
        S::load(lanes.as_ptr())
    }
}

/// Copies rows `from .. from + n` to `dst[n / 2][ld]` units of neighbouring rows (bf16 pairs).
///
/// # Safety
/// The rows exist and hold bf16; `dst` holds `ceil(n / 2) * ld` units.
#[inline(always)]
pub(super) unsafe fn pairs(src: &Rows, from: usize, n: usize, dst: *mut f32, ld: usize) {
    for i in (0..n).step_by(2) {
        // SAFETY: rows i and, where there is one, i + 1 of the source; row i / 2 of `dst`.
        unsafe {
            let to = dst.cast::<u32>().add(i / 2 * ld);
            let even = src.u16(from + i);
            if i + 1 < n {
                let odd = src.u16(from + i + 1);
                for c in 0..src.width {
                    *to.add(c) = u32::from(*even.add(c)) | u32::from(*odd.add(c)) << 16;
                }
            } else {
                for c in 0..src.width {
                    *to.add(c) = u32::from(*even.add(c));
                }
            }
            for c in src.width..ld {
                *to.add(c) = 0;
            }
        }
    }
}

/// Transposes QT packed rows, group by group: `dst[QT / (NV * W)][ld][NV * W]`, `depth` rows of it.
///
/// # Safety
/// `src` holds QT rows of `ld` units, `dst` as many; `ld` is a multiple of W.
#[inline(always)]
pub(super) unsafe fn transpose<S: Simd>(src: *const f32, ld: usize, depth: usize, dst: *mut f32) {
    for c in (0..depth).step_by(S::W) {
        for r in (0..QT).step_by(S::W) {
            let group = NV * S::W;
            let to = r / group * group * ld + c * group + r % group;
            // SAFETY: W by W blocks inside both matrices, as ld and QT are multiples of W.
            unsafe { S::transpose(src.add(r * ld + c), ld, dst.add(to), group) };
        }
    }
}

/// `dst[i] = sum_c a[from + i][c] * b[from + i][c]` in float32.
///
/// # Safety
/// The rows exist, and both hold the same dtype; `dst` holds n values.
#[inline(always)]
pub(super) unsafe fn row_dots<S: Simd>(a: &Rows, b: &Rows, from: usize, n: usize, dst: *mut f32) {
    for i in 0..n {
        a.prefetch(from + i + AHEAD);
        // SAFETY: row i of both; full vectors below `whole`, single elements after it.
        unsafe {
            let whole = a.width / S::W * S::W;
            let mut sum = S::splat(0.0);
            let mut tail = 0.0;
            match a.dtype {
                Dtype::F32 => {
                    let (x, y) = (a.f32(from + i), b.f32(from + i));
                    for c in (0..whole).step_by(S::W) {
                        sum = S::fma(S::load(x.add(c)), S::load(y.add(c)), sum);
                    }
                    for c in whole..a.width {
                        tail += *x.add(c) * *y.add(c);
                    }
                }
                Dtype::Bf16 => {
                    let (x, y) = (a.u16(from + i), b.u16(from + i));
                    for c in (0..whole).step_by(S::W) {
                        sum = S::fma(wide::<S>(x.add(c)), wide::<S>(y.add(c)), sum);
                    }
                    for c in whole..a.width {
                        tail += widen(*x.add(c)) * widen(*y.add(c));
                    }
                }
            }
            *dst.add(i) = S::sum(sum) + tail;
        }
    }
}

/// Writes `src[i][..width] * factor(i)` to rows `from .. from + n`.
///
/// # Safety
/// The rows exist; `src` holds n rows of `ld` values.
#[inline(always)]
pub(super) unsafe fn unpack<S: Simd>(
    src: *const f32,
    ld: usize,
    dst: &Rows,
    from: usize,
    n: usize,
    factor: impl Fn(usize) -> f32,
) {
    for i in 0..n {
        let x = factor(i);
        // SAFETY: row i of both.
        unsafe {
            let row = src.add(i * ld);
            match dst.dtype {
                Dtype::F32 => {
                    let to = dst.f32(from + i);
                    let whole = dst.width / S::W * S::W;
                    for c in (0..whole).step_by(S::W) {
                        S::store(to.add(c), S::mul(S::load(row.add(c)), S::splat(x)));
                    }
                    for c in whole..dst.width {
                        *to.add(c) = *row.add(c) * x;
                    }
                }
                Dtype::Bf16 => {
                    let to = dst.u16(from + i);
                    for c in 0..dst.width {
                        *to.add(c) = round_bf16(*row.add(c) * x);
                    }
                }
            }
        }
    }
}
