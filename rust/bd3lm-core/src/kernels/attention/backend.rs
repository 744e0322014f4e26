//! The kernels of one instruction set, which forward, backward and decoding are made of.

use super::decode::{DecodeStep, decode_step};
use super::inner::{accumulate, gradients, scores, softmax};
use super::layout::{self, Rows};
use crate::cpu::simd::Simd;
use crate::cpu::simd::portable::Portable;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16},
};

/// Vectors of queries of a *group*, which is `NV * W` queries.
pub(super) const NV: usize = 2;
/// Queries in a tile.
pub(super) const QT: usize = 128;
/// Row length of scratch matrices whose columns are a tile's queries, in units along the
/// queries: not a power of two, so that rows do not evict each other from the first-level cache.
pub(super) const fn tile_row(pair: usize) -> usize {
    QT / pair + 16
}
/// Row length like [`tile_row`], for units along the keys.
pub(super) const ZIP_ROW: usize = QT + 16;
/// Keys come in multiples of this: every backend's rows of a score tile divide it.
pub(super) const FORWARD_STEP: usize = 8;
/// Step like [`FORWARD_STEP`], for the tile of the backward pass, which holds two products.
pub(super) const BACKWARD_STEP: usize = 4;
/// Lanes of the widest backend.
pub(super) const MAX_W: usize = 16;
/// Rows that [`Backend::accumulate`] works on.
pub(super) const ROWS: usize = 8;

/// A run of keys, for the scores of one group.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// Keys, a multiple of the rows of a score tile.
    pub keys: usize,
    /// Vectors of queries: NV, or one where the others see none of these keys.
    pub vectors: usize,
    /// Index of the first key.
    pub first: i32,
    /// Keys that all lanes see, `full.0 <= j < full.1`: no mask is applied there.
    pub full: (i32, i32),
    /// Interval of every lane.
    pub lo: *const i32,
    pub hi: *const i32,
    /// Units summed over in a product of a query and a key.
    pub depth: usize,
    /// Exponents are scores times this.
    pub scale: f32,
}

/// Running softmax of a group's lanes.
pub(super) struct Softmax {
    /// Largest exponent so far.
    pub max: *mut f32,
    /// Sum of 2^(exponent - max) so far.
    pub sum: *mut f32,
    /// Factor by which earlier sums shrink when `max` moves.
    pub shrink: *mut f32,
}

/// Operands and results of [`Backend::gradients`]; one group's columns, rows of
/// [`tile_row`] or [`ZIP_ROW`].
pub(super) struct Gradients {
    pub k: *const f32,
    pub v: *const f32,
    pub q: *const f32,
    pub d_out: *const f32,
    /// Base-2 log-sum-exp and sum(out * d_out) of each lane.
    pub lse: *const f32,
    pub delta: *const f32,
    /// P, dS in units along the queries, dS in units along the keys.
    pub p: *mut f32,
    pub ds: *mut f32,
    pub ds_zip: *mut f32,
}

/// The kernels that forward and backward are made of.
///
/// # Safety
/// Every method needs the instruction set of the backend, and matrices of the sizes it names.
pub(super) trait Backend: Simd {
    /// Largest exponent floor: keeps `-inf - max` defined for lanes that saw no key yet.
    const FLOOR: f32 = -1e30;
    /// The backend for kernels that always work in float32.
    type Wide: Backend;

    /// S^T `s[j][lane] = k[j] . q[lane]`, masked with -inf; its maxima go to `max[lane]`.
    ///
    /// # Safety
    /// `run.keys` rows of `ld` units at `k`; rows of NV*W: `run.depth` at `q`, `run.keys` at `s`.
    unsafe fn scores(
        run: &Run,
        ld: usize,
        k: *const f32,
        q: *const f32,
        s: *mut f32,
        max: *mut f32,
    );

    /// Turns scores into P^T of the running softmax, in place, as units along the keys.
    ///
    /// # Safety
    /// `run.keys` rows of NV*W at `s`; NV*W values at `block_max` and in `state`.
    unsafe fn softmax(run: &Run, s: *mut f32, block_max: *const f32, state: &Softmax) -> bool;

    /// P^T and dS^T from K, V and a group's queries and output gradients.
    ///
    /// # Safety
    /// As `scores`, for every operand of `g`.
    unsafe fn gradients(run: &Run, ld: usize, g: &Gradients);

    /// `c[i][..width] += sum_t a[i * rs + t * cs] . b[t][..width]` for 8 rows i.
    ///
    /// # Safety
    /// The strides stay inside `a`; `depth` rows at `b`, 8 at `c`, of `ld >= width` values;
    /// `width` a multiple of W.
    unsafe fn accumulate(a: Operand, b: *const f32, c: *mut f32, ld: usize, width: usize);

    /// Adds a run of keys to the running softmax and output of every row.
    ///
    /// # Safety
    /// Scratch as `decode.rs` makes it.
    unsafe fn decode(step: &mut DecodeStep<'_>);

    /// `c[i][..width] *= factors[i]`.
    ///
    /// # Safety
    /// `rows` values at `factors` and rows of `ld` at `c`; `width` a multiple of W.
    unsafe fn rescale(c: *mut f32, rows: usize, ld: usize, width: usize, factors: *const f32);

    /// [`layout::rows`], then zero rows up to `padded`.
    ///
    /// # Safety
    /// As there, with `padded` rows in `dst`.
    unsafe fn rows(src: &Rows, from: usize, n: usize, padded: usize, dst: *mut f32, ld: usize);

    /// [`layout::pairs`], then zero rows up to `padded` source rows (even).
    ///
    /// # Safety
    /// As there, with `padded / 2` rows in `dst`.
    unsafe fn pairs(src: &Rows, from: usize, n: usize, padded: usize, dst: *mut f32, ld: usize);

    /// [`layout::transpose`].
    ///
    /// # Safety
    /// As there.
    unsafe fn transposed(src: *const f32, ld: usize, depth: usize, dst: *mut f32);

    /// [`layout::row_dots`].
    ///
    /// # Safety
    /// As there.
    unsafe fn row_dots(a: &Rows, b: &Rows, from: usize, n: usize, dst: *mut f32);

    /// [`layout::unpack`].
    ///
    /// # Safety
    /// As there, with n values at `factors`.
    unsafe fn unpack(
        src: *const f32,
        ld: usize,
        dst: &Rows,
        from: usize,
        n: usize,
        factors: *const f32,
    );
}

/// Left operand of [`Backend::accumulate`].
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub a: *const f32,
    /// Steps between rows and along the sum, in units. One of them is 1.
    pub transposed: bool,
    pub ld: usize,
    pub depth: usize,
}

/// Implements [`Backend`]: rows of a score tile forward and backward, rows of an accumulator.
macro_rules! backend {
    ($name:ident, $wide:ident, $forward:literal, $backward:literal, $rows:literal $(, $features:literal)?) => {
        impl Backend for $name {
            type Wide = $wide;

            $(#[target_feature(enable = $features)])?
            unsafe fn scores(
                run: &Run,
                ld: usize,
                k: *const f32,
                q: *const f32,
                s: *mut f32,
                max: *mut f32,
            ) {
                // SAFETY: by the contract of the trait; `ld` is one of `layout::row_units`.
                unsafe {
                    match (ld, run.vectors) {
                        (16, 1) => scores::<Self, $forward, 1, 16>(run, k, q, s, max),
                        (16, _) => scores::<Self, $forward, NV, 16>(run, k, q, s, max),
                        (32, 1) => scores::<Self, $forward, 1, 32>(run, k, q, s, max),
                        (32, _) => scores::<Self, $forward, NV, 32>(run, k, q, s, max),
                        (64, 1) => scores::<Self, $forward, 1, 64>(run, k, q, s, max),
                        (64, _) => scores::<Self, $forward, NV, 64>(run, k, q, s, max),
                        (128, 1) => scores::<Self, $forward, 1, 128>(run, k, q, s, max),
                        (128, _) => scores::<Self, $forward, NV, 128>(run, k, q, s, max),
                        (_, 1) => scores::<Self, $forward, 1, 256>(run, k, q, s, max),
                        (_, _) => scores::<Self, $forward, NV, 256>(run, k, q, s, max),
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(
                run: &Run,
                s: *mut f32,
                block_max: *const f32,
                state: &Softmax,
            ) -> bool {
                // SAFETY: by the contract of the trait.
                unsafe {
                    match run.vectors {
                        1 => softmax::<Self, 1>(run, s, block_max, state),
                        _ => softmax::<Self, NV>(run, s, block_max, state),
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn gradients(run: &Run, ld: usize, g: &Gradients) {
                // SAFETY: by the contract of the trait; `ld` is one of `layout::row_units`.
                unsafe {
                    match (ld, run.vectors) {
                        (16, 1) => gradients::<Self, $backward, 1, 16>(run, g),
                        (16, _) => gradients::<Self, $backward, NV, 16>(run, g),
                        (32, 1) => gradients::<Self, $backward, 1, 32>(run, g),
                        (32, _) => gradients::<Self, $backward, NV, 32>(run, g),
                        (64, 1) => gradients::<Self, $backward, 1, 64>(run, g),
                        (64, _) => gradients::<Self, $backward, NV, 64>(run, g),
                        (128, 1) => gradients::<Self, $backward, 1, 128>(run, g),
                        (128, _) => gradients::<Self, $backward, NV, 128>(run, g),
                        (_, 1) => gradients::<Self, $backward, 1, 256>(run, g),
                        (_, _) => gradients::<Self, $backward, NV, 256>(run, g),
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn accumulate(
                x: Operand,
                b: *const f32,
                c: *mut f32,
                ld: usize,
                width: usize,
            ) {
                let mut at = 0;
                while at + 2 * Self::W <= width {
                    // SAFETY: by the contract of the trait, columns at .. at + 2W.
                    unsafe { accumulate::<Self, $rows, 2>(x, b.add(at), c.add(at), ld) };
                    at += 2 * Self::W;
                }
                if at < width {
                    // SAFETY: by the contract of the trait, columns at .. at + W.
                    unsafe { accumulate::<Self, 8, 1>(x, b.add(at), c.add(at), ld) };
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn decode(step: &mut DecodeStep<'_>) {
                // SAFETY: by the contract of the trait.
                unsafe { decode_step::<Self>(step) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn rescale(c: *mut f32, rows: usize, ld: usize, width: usize, factors: *const f32) {
                for i in 0..rows {
                    // SAFETY: by the contract of the trait.
                    unsafe {
                        let x = Self::splat(*factors.add(i));
                        for at in (i * ld..i * ld + width).step_by(Self::W) {
                            Self::store(c.add(at), Self::mul(Self::load(c.add(at)), x));
                        }
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn rows(
                src: &Rows,
                from: usize,
                n: usize,
                padded: usize,
                dst: *mut f32,
                ld: usize,
            ) {
                // SAFETY: by the contract of the trait.
                unsafe {
                    layout::rows::<Self>(src, from, n, dst, ld);
                    dst.add(n * ld).write_bytes(0, (padded - n) * ld);
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn pairs(
                src: &Rows,
                from: usize,
                n: usize,
                padded: usize,
                dst: *mut f32,
                ld: usize,
            ) {
                let filled = n.div_ceil(2);
                // SAFETY: by the contract of the trait.
                unsafe {
                    layout::pairs(src, from, n, dst, ld);
                    dst.add(filled * ld).write_bytes(0, (padded / 2 - filled) * ld);
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn transposed(src: *const f32, ld: usize, depth: usize, dst: *mut f32) {
                // SAFETY: by the contract of the trait.
                unsafe { layout::transpose::<Self>(src, ld, depth, dst) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn row_dots(a: &Rows, b: &Rows, from: usize, n: usize, dst: *mut f32) {
                // SAFETY: by the contract of the trait.
                unsafe { layout::row_dots::<Self>(a, b, from, n, dst) }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn unpack(
                src: *const f32,
                ld: usize,
                dst: &Rows,
                from: usize,
                n: usize,
                factors: *const f32,
            ) {
                // SAFETY: by the contract of the trait; `factors` holds n values.
                unsafe { layout::unpack::<Self>(src, ld, dst, from, n, |i| *factors.add(i)) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
backend!(
    Avx512,
    Avx512,
    8,
    4,
    8,
    "avx512f,avx512dq,avx512bw,avx512vl,fma"
);
#[cfg(target_arch = "x86_64")]
backend!(
    Avx512Bf16,
    Avx512,
    8,
    4,
    8,
    "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,fma"
);
#[cfg(target_arch = "x86_64")]
backend!(Avx2, Avx2, 4, 2, 4, "avx2,fma");
backend!(Portable, Portable, 4, 2, 4);
