//! Checks of the arguments, before any pointer is followed.

use super::{Backward, Dtype, Forward, MAX_HEAD_WIDTH, Tensor};
use crate::cpu::threads::MOST_THREADS;
use crate::{Error, Result};

fn bad<T>(field: &'static str, value: impl ToString, allowed: &str) -> Result<T> {
    Err(Error::config(field, value, allowed))
}

fn tensor(name: &'static str, x: &Tensor, shape: [usize; 4], dtype: Dtype) -> Result<()> {
    if x.shape != shape {
        let got = format!("shape {:?}", x.shape);
        return bad(name, got, &format!("of shape {shape:?}"));
    }
    if x.dtype != dtype {
        return bad(
            name,
            format!("{:?}", x.dtype),
            &format!("{dtype:?}, as the queries"),
        );
    }
    if x.is_empty() {
        return Ok(()); // no pointer or stride of it is followed
    }
    if x.ptr.is_null() || !(x.ptr as usize).is_multiple_of(dtype.size()) {
        return bad(
            name,
            format!("address {:?}", x.ptr),
            "aligned to its elements",
        );
    }
    if x.strides.iter().any(|&s| s < 0) || (x.strides[3] != 1 && x.shape[3] > 1) {
        let got = format!("strides {:?}", x.strides);
        return bad(name, got, "not negative, and 1 along the last axis");
    }
    let elements = x
        .shape
        .iter()
        .zip(x.strides)
        .try_fold(1usize, |sum, (&n, stride)| {
            (stride as usize)
                .checked_mul(n.saturating_sub(1))?
                .checked_add(sum)
        });
    if elements.is_none_or(|n| n > isize::MAX as usize / dtype.size()) {
        return bad(name, format!("strides {:?}", x.strides), "within memory");
    }
    Ok(())
}

/// Checks that no two indices of an output share an element.
fn distinct(name: &'static str, x: &Tensor) -> Result<()> {
    let mut axes: Vec<_> = x
        .strides
        .into_iter()
        .zip(x.shape)
        .filter(|a| a.1 > 1)
        .collect();
    axes.sort_unstable();
    let mut reach = 0;
    for (stride, n) in axes {
        if stride as usize <= reach {
            let got = format!("strides {:?}", x.strides);
            return bad(name, got, "such that no two elements share a place");
        }
        reach += stride as usize * (n - 1);
    }
    Ok(())
}

/// Checks shapes, dtypes, strides and sizes of the forward pass.
pub(super) fn forward(args: &Forward<'_>) -> Result<()> {
    let [batch, heads, queries, width] = args.q.shape;
    let dtype = args.q.dtype;
    if width == 0 || width > MAX_HEAD_WIDTH {
        return bad("q", format!("head width {width}"), "1 to 256");
    }
    tensor("q", &args.q, args.q.shape, dtype)?;
    let [_, kv_heads, keys, _] = args.k.shape;
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let got = format!("{kv_heads} key heads for {heads} query heads");
        return bad("k", got, "a divisor of the query heads");
    }
    if keys > i32::MAX as usize / 2 || args.mask.clean_offset > keys {
        return bad(
            "k",
            format!("{keys} keys"),
            "fewer than 2^30, both streams together",
        );
    }
    let shape = [batch, kv_heads, keys, width];
    tensor("k", &args.k, shape, dtype)?;
    tensor("v", &args.v, shape, dtype)?;
    tensor("out", &args.out, args.q.shape, dtype)?;
    distinct("out", &args.out)?;
    if !(args.lse.0 as usize).is_multiple_of(4) || (args.lse.0.is_null() && !args.q.is_empty()) {
        return bad(
            "lse",
            format!("address {:?}", args.lse.0),
            "aligned to float32",
        );
    }
    if args.options.threads == 0 || args.options.threads > MOST_THREADS {
        return bad("threads", args.options.threads, "1 to 1024");
    }
    if !args.options.scale.is_finite() || args.options.scale <= 0.0 {
        return bad("scale", args.options.scale, "a positive number");
    }
    let ranges = args.mask.ranges;
    let rows = ranges.clean_lo.len();
    if rows != queries && Some(rows) != batch.checked_mul(queries) {
        return bad(
            "mask",
            format!("{rows} rows"),
            "one for each query, of one row or of every row",
        );
    }
    if [ranges.clean_hi, ranges.noised_lo, ranges.noised_hi]
        .iter()
        .any(|x| x.len() != rows)
    {
        return bad(
            "mask",
            "ranges of different lengths",
            "four arrays of one length",
        );
    }
    Ok(())
}

/// Checks the same of the backward pass.
pub(super) fn backward(args: &Backward<'_>) -> Result<()> {
    forward(&args.forward)?;
    let Forward { q, k, .. } = &args.forward;
    tensor("d_out", &args.d_out, q.shape, q.dtype)?;
    for (name, x, shape) in [
        ("dq", &args.dq, q.shape),
        ("dk", &args.dk, k.shape),
        ("dv", &args.dv, k.shape),
    ] {
        tensor(name, x, shape, q.dtype)?;
        distinct(name, x)?;
    }
    Ok(())
}
