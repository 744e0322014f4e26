//! Buffers that threads share by groups of rows.

use super::scratch;
use super::threads::parallel;
use crate::error::{Error, Result};
use std::ops::Range;

/// Numbers, about, that one thread takes at a time.
pub(crate) const CHUNK: usize = 1 << 14;

/// Checks a buffer's size.
///
/// # Errors
/// It holds another number of values.
pub(crate) fn same(name: &'static str, wanted: usize, got: usize) -> Result<()> {
    if wanted == got {
        return Ok(());
    }
    Err(Error::config(
        name,
        format!("{got} numbers"),
        format!("needs {wanted}"),
    ))
}

/// Checks that there are whole rows.
///
/// # Errors
/// There are not.
pub(crate) fn whole_rows(name: &'static str, len: usize, width: usize) -> Result<()> {
    if width > 0 && len.is_multiple_of(width) {
        return Ok(());
    }
    let allowed = format!("needs whole rows of {width}");
    Err(Error::config(name, format!("{len} numbers"), allowed))
}

/// `f(group, span)` for groups of whole rows, which one thread takes at a time.
pub(crate) fn in_groups(
    len: usize,
    width: usize,
    threads: usize,
    f: impl Fn(usize, Range<usize>) + Sync,
) {
    let size = (CHUNK / width).max(1) * width;
    parallel(threads, len.div_ceil(size), |group| {
        f(group, group * size..len.min((group + 1) * size));
    });
}

/// As [`in_groups`], with room that each group adds a row to; `total` is their sum, in an order
/// that does not depend on the number of threads.
pub(crate) fn sum_of_groups(
    len: usize,
    width: usize,
    total: &mut [f32],
    threads: usize,
    f: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
) {
    /// More would cost more than they even out.
    const PARTS: usize = 32;
    let size = (CHUNK / width).max(1) * width;
    let groups = len.div_ceil(size);
    let together = groups.div_ceil(PARTS).max(1);
    let parts = groups.div_ceil(together);
    scratch::with(&[parts * total.len()], |scratch| {
        let sums = scratch.slice(parts * total.len());
        sums.fill(0.0);
        let shared = Shared(sums.as_mut_ptr());
        parallel(threads, parts, |part| {
            // SAFETY: each part has a row of its own.
            let sum = unsafe { shared.part(part * total.len(), total.len()) };
            for group in part * together..groups.min((part + 1) * together) {
                f(group, group * size..len.min((group + 1) * size), sum);
            }
        });
        total.fill(0.0);
        for sum in sums.chunks_exact(total.len()) {
            total.iter_mut().zip(sum).for_each(|(total, x)| *total += x);
        }
    });
}

/// A buffer that threads share by groups.
pub(crate) struct Shared<T>(pub *mut T);

// SAFETY: threads take disjoint parts.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// The part lies inside the buffer, and nobody else holds it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, first: usize, size: usize) -> &mut [T] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), size) }
    }
}
