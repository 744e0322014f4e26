//! CPU kernels of the block-diffusion attention (docs/math.md §7), forward and backward.
//!
//! The mask is two ranges of keys a query, clean and noised, which covers training, scoring,
//! decoding, documents and padding. A tile of queries is multiplied only with keys that one of its
//! queries sees, and scores are masked only at the edges. Memory is linear in the number of keys.
//! Results do not depend on the number of threads.
//!
//! | module | contents |
//! | --- | --- |
//! | `tiles` | the mask as tiles of queries and runs of keys |
//! | `inner`, `backend` | the inner loops, and their compilation for each instruction set |
//! | `layout` | copies between strided tensors and dense scratch |
//! | `forward`, `backward`, `decode` | the order of the work on one head |
//! | `check` | shapes, strides and dtypes, before a pointer is followed |

mod backend;
mod backward;
mod check;
mod decode;
mod forward;
mod inner;
mod layout;
#[cfg(test)]
mod tests;
mod tiles;

pub use layout::Dtype;
pub use tiles::Ranges;

use crate::cpu::Isa;
use crate::cpu::simd::dispatch;
use crate::cpu::threads::parallel;
use crate::{Error, Result};
use backend::{Backend, QT};
use layout::Rows;
use tiles::{Plan, Tile};

/// Largest head width of the kernels.
pub const MAX_HEAD_WIDTH: usize = 256;

/// A strided tensor [B, H, T, Dh] somewhere in memory; neighbours along Dh are adjacent.
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// First element.
    pub ptr: *mut u8,
    /// Type of an element.
    pub dtype: Dtype,
    /// B, H, T, Dh.
    pub shape: [usize; 4],
    /// Elements from one index to the next along each axis; the last is 1.
    pub strides: [isize; 4],
}

// SAFETY: an address and numbers; only unsafe functions read or write there, and their contracts
// say who else may.
unsafe impl Send for Tensor {}
// SAFETY: as for Send.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// Returns whether it has no element.
    fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Fills it with zeros.
    ///
    /// # Safety
    /// Its elements, as shape and strides say, are writable.
    unsafe fn clear(&self) {
        let [batch, heads, rows, width] = self.shape;
        for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            // SAFETY: b and h are below the shape's.
            let head = unsafe { self.head(b, h) };
            for row in 0..rows as isize {
                let bytes = self.dtype.size();
                let start = head.ptr.wrapping_offset(row * head.stride * bytes as isize);
                // SAFETY: a row of the tensor; its elements are adjacent.
                unsafe { start.write_bytes(0, width * bytes) };
            }
        }
    }

    /// # Safety
    /// `b` and `h` are below the shape's.
    unsafe fn head(&self, b: usize, h: usize) -> Rows {
        let offset = b as isize * self.strides[0] + h as isize * self.strides[1];
        Rows {
            ptr: self
                .ptr
                .wrapping_offset(offset * self.dtype.size() as isize),
            dtype: self.dtype,
            stride: self.strides[2],
            width: self.shape[3],
        }
    }
}

/// Natural log-sum-exp of every query's scores, B * H * Tq float32 values; -inf without keys.
#[derive(Clone, Copy, Debug)]
pub struct LogSumExp(pub *mut f32);

// SAFETY: as for `Tensor`.
unsafe impl Send for LogSumExp {}
// SAFETY: as for `Tensor`.
unsafe impl Sync for LogSumExp {}

impl LogSumExp {
    fn head(&self, head: usize, queries: usize) -> *mut f32 {
        self.0.wrapping_add(head * queries)
    }
}

/// The keys of every query, and where the clean ones begin.
#[derive(Clone, Copy)]
pub struct Mask<'a> {
    /// Ranges of Tq queries, or of B times Tq.
    pub ranges: Ranges<'a>,
    /// Row of the first clean key: L where noised keys come first, else 0.
    pub clean_offset: usize,
}

/// Threads, instruction set and scale.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads to use at most, the calling one among them.
    pub threads: usize,
    /// Instruction set; None for the best one.
    pub isa: Option<Isa>,
    /// Factor of q . k before the softmax.
    pub scale: f32,
}

/// Arguments of [`forward`].
pub struct Forward<'a> {
    /// Queries [B, H, Tq, Dh].
    pub q: Tensor,
    /// Keys [B, Hkv, Tk, Dh].
    pub k: Tensor,
    /// Values [B, Hkv, Tk, Dh].
    pub v: Tensor,
    /// Keys that each query sees.
    pub mask: Mask<'a>,
    /// Result [B, H, Tq, Dh].
    pub out: Tensor,
    /// Log-sum-exp, which the backward pass reads.
    pub lse: LogSumExp,
    /// Threads, instruction set and scale.
    pub options: Options,
}

/// Arguments of [`backward`].
pub struct Backward<'a> {
    /// Inputs and outputs of the forward pass.
    pub forward: Forward<'a>,
    /// Gradient of the output [B, H, Tq, Dh].
    pub d_out: Tensor,
    /// Gradient of the queries, to write.
    pub dq: Tensor,
    /// Gradient of the keys, to write.
    pub dk: Tensor,
    /// Gradient of the values, to write.
    pub dv: Tensor,
}

/// Softmax attention over the keys that the mask allows; zero for queries without any. Without
/// queries there is nothing to write.
///
/// # Errors
/// [`Error::Config`] for shapes, strides, dtypes or ranges that do not fit together, and for an
/// instruction set that this processor lacks.
///
/// # Safety
/// The elements of every tensor, as its shape and strides say, are readable; those of `out` and
/// `lse` are writable, and nothing else accesses them during the call.
pub unsafe fn forward(args: &Forward<'_>) -> Result<()> {
    check::forward(args)?;
    let isa = choose(args.options.isa, args.q.dtype)?;
    if args.q.is_empty() {
        return Ok(());
    }
    let plans = plans(args)?;
    // SAFETY: the processor has the instruction set; the rest is this function's contract.
    unsafe { dispatch!(isa, B => forward_with::<B>(args, &plans)) };
    Ok(())
}

/// Gradients of [`forward`] for the gradient of its output; zero where there are no queries.
///
/// # Errors
/// As [`forward`].
///
/// # Safety
/// As [`forward`]; `dq`, `dk` and `dv` are writable, and nothing else accesses them.
pub unsafe fn backward(args: &Backward<'_>) -> Result<()> {
    check::backward(args)?;
    let isa = choose(args.forward.options.isa, args.forward.q.dtype)?;
    if args.forward.q.is_empty() {
        // SAFETY: by the contract; an empty tensor has no rows.
        unsafe { [args.dk, args.dv].iter().for_each(|x| x.clear()) };
        return Ok(());
    }
    let plans = plans(&args.forward)?;
    // SAFETY: the processor has the instruction set; the rest is this function's contract.
    unsafe { dispatch!(isa, B => backward_with::<B>(args, &plans)) };
    Ok(())
}

/// # Safety
/// As [`forward`], with the backend's instructions and checked arguments.
unsafe fn forward_with<B: Backend>(args: &Forward<'_>, plans: &[Plan]) {
    /// Fewer heads than this are cut into runs of tiles, so that all threads have work.
    const ITEMS: usize = 16;
    let [batch, heads, num_queries, _] = args.q.shape;
    let kv_heads = args.k.shape[1];
    let shared = heads / kv_heads;
    let threads = useful_threads(args, 4);
    let decodes = shared * num_queries <= decode::MAX_ROWS;
    let cuts = match threads {
        _ if decodes => 1,
        1 => 1,
        _ => ITEMS
            .div_ceil((batch * kv_heads).max(1))
            .min(plans[0].tiles.len().max(1)),
    };
    parallel(threads, batch * kv_heads * cuts, |item| {
        let (pair, cut) = (item / cuts, item % cuts);
        let (b, kv) = (pair / kv_heads, pair % kv_heads);
        let tiles = part(&plans[b % plans.len()].tiles, cut, cuts);
        // SAFETY: b, kv and h are below the shapes; heads and tiles are disjoint, and so are
        // the rows of `out` and `lse` that each item writes.
        unsafe {
            let head = forward::Head {
                k: args.k.head(b, kv),
                v: args.v.head(b, kv),
                num_keys: args.k.shape[2],
                scale: args.options.scale,
            };
            let queries: Vec<_> = (kv * shared..(kv + 1) * shared)
                .map(|h| forward::Queries {
                    q: args.q.head(b, h),
                    out: args.out.head(b, h),
                    lse: args.lse.head(b * heads + h, num_queries),
                })
                .collect();
            if decodes {
                return decode::decode::<B::Wide>(&head, &queries, tiles);
            }
            let next = match after(pair, batch, kv_heads) {
                Some((b, kv)) if cuts == 1 => vec![
                    (args.q.head(b, kv * shared), 0..num_queries.min(QT)),
                    (args.v.head(b, kv), 0..head.num_keys),
                    (args.k.head(b, kv), 0..head.num_keys),
                ],
                _ => Vec::new(),
            };
            forward::forward::<B>(&head, &queries, tiles, &next);
        }
    });
}

/// Number of threads that save more time than waking them costs; `products` of every query and key.
fn useful_threads(args: &Forward<'_>, products: usize) -> usize {
    const WORTH: usize = 1_500_000; // multiplications, some tens of microseconds
    let [batch, heads, queries, width] = args.q.shape;
    let [_, kv_heads, keys, _] = args.k.shape;
    // Reading a key costs as much as eight products with it.
    let rows = heads * queries * products / 4 + 8 * kv_heads;
    let work = (batch * rows).saturating_mul(keys * width);
    args.options.threads.min(1 + work / WORTH)
}

/// Batch row and index of the head of keys after the `pair`-th, if there is one.
fn after(pair: usize, batch: usize, kv_heads: usize) -> Option<(usize, usize)> {
    let next = pair + 1;
    (next < batch * kv_heads).then(|| (next / kv_heads, next % kv_heads))
}

/// Every `cuts`-th share of the tiles.
fn part(tiles: &[Tile], cut: usize, cuts: usize) -> &[Tile] {
    &tiles[tiles.len() * cut / cuts..tiles.len() * (cut + 1) / cuts]
}

/// # Safety
/// As [`backward`], with the backend's instructions and checked arguments.
unsafe fn backward_with<B: Backend>(args: &Backward<'_>, plans: &[Plan]) {
    let Backward {
        forward,
        d_out,
        dq,
        dk,
        dv,
    } = args;
    let [batch, heads, num_queries, _] = forward.q.shape;
    let kv_heads = forward.k.shape[1];
    let shared = heads / kv_heads;
    parallel(useful_threads(forward, 10), batch * kv_heads, |item| {
        let (b, kv) = (item / kv_heads, item % kv_heads);
        // SAFETY: b, kv and h are below the shapes; heads are disjoint, and so are the rows of
        // the gradients that each item writes.
        unsafe {
            let head = forward::Head {
                k: forward.k.head(b, kv),
                v: forward.v.head(b, kv),
                num_keys: forward.k.shape[2],
                scale: forward.options.scale,
            };
            let queries: Vec<_> = (kv * shared..(kv + 1) * shared)
                .map(|h| backward::Queries {
                    q: forward.q.head(b, h),
                    out: forward.out.head(b, h),
                    d_out: d_out.head(b, h),
                    lse: forward.lse.head(b * heads + h, num_queries),
                    dq: dq.head(b, h),
                })
                .collect();
            let tiles = &plans[b % plans.len()].tiles;
            let (dk, dv) = (dk.head(b, kv), dv.head(b, kv));
            let next = match after(item, batch, kv_heads) {
                Some((b, kv)) => {
                    let first = 0..num_queries.min(QT);
                    let [q, out, d_out] = [&forward.q, &forward.out, d_out]
                        .map(|x| (x.head(b, kv * shared), first.clone()));
                    let [k, v] =
                        [&forward.k, &forward.v].map(|x| (x.head(b, kv), 0..head.num_keys));
                    vec![d_out, out, q, v, k]
                }
                None => Vec::new(),
            };
            backward::backward::<B>(&head, &queries, tiles, &dk, &dv, &next);
        }
    });
}

fn plans(args: &Forward<'_>) -> Result<Vec<Plan>> {
    let Mask {
        ranges,
        clean_offset,
    } = args.mask;
    let queries = args.q.shape[2];
    let rows = ranges.clean_lo.len() / queries;
    (0..rows)
        .map(|b| {
            let at = b * queries..(b + 1) * queries;
            let row = Ranges {
                clean_lo: &ranges.clean_lo[at.clone()],
                clean_hi: &ranges.clean_hi[at.clone()],
                noised_lo: &ranges.noised_lo[at.clone()],
                noised_hi: &ranges.noised_hi[at],
            };
            Plan::new(row, clean_offset, args.k.shape[2])
        })
        .collect()
}

/// The instruction set to use: bf16 products only where the operands are bf16.
fn choose(forced: Option<Isa>, dtype: Dtype) -> Result<Isa> {
    let isa = forced.unwrap_or_else(Isa::best);
    if !isa.is_available() {
        return Err(Error::config(
            "isa",
            isa.name(),
            format!("at most {}, the best of this processor", Isa::best().name()),
        ));
    }
    Ok(match (isa, dtype) {
        (Isa::Avx512Bf16, Dtype::F32) => Isa::Avx512,
        (isa, _) => isa,
    })
}
