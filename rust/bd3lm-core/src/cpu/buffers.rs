//! Buffers that threads share by groups of rows.

use super::scratch;
use super::threads::parallel;
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;

/// Elements that a thread takes at a time, about.
pub(crate) const CHUNK: usize = 1 << 14;

/// Checks the length of a buffer.
///
/// # Errors
/// It is not the length that is needed.
pub(crate) fn check_len(field: &'static str, needed: usize, len: usize) -> Result<()> {
    if needed == len {
        return Ok(());
    }
    Err(Error::length(field, len, needed))
}

/// Checks that a buffer holds whole rows.
///
/// # Errors
/// A width of 0, or elements left over.
pub(crate) fn whole_rows(field: &'static str, len: usize, width: usize) -> Result<()> {
    if width > 0 && len.is_multiple_of(width) {
        return Ok(());
    }
    let allowed = format!("whole rows of {width}");
    Err(Error::config(field, format!("{len} elements"), allowed))
}

/// Makes room for `len` more elements.
///
/// # Errors
/// There is not enough memory.
pub fn reserve<T>(field: &'static str, buffer: &mut Vec<T>, len: usize) -> Result<()> {
    let reserved = buffer.try_reserve_exact(len);
    reserved.map_err(|_| Error::config(field, len, "few enough to fit in memory"))
}

/// Runs `f(group, span)` for groups of whole rows, each on one thread.
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

/// Runs `f(group, span, sum)` as [`in_groups`] does; groups add to rows of their own, whose sum
/// becomes `total`. The order of the additions does not depend on the number of threads.
pub(crate) fn sum_of_groups(
    len: usize,
    width: usize,
    total: &mut [f32],
    threads: usize,
    f: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
) {
    /// Rows to add to: more cost more additions than they even out in load.
    const PARTS: usize = 32;
    let size = (CHUNK / width).max(1) * width;
    let groups = len.div_ceil(size);
    let together = groups.div_ceil(PARTS).max(1);
    let parts = groups.div_ceil(together);
    scratch::with(&[parts * total.len()], |scratch| {
        let sums = scratch.slice(parts * total.len());
        sums.fill(0.0);
        let shared = Parts::new(&mut *sums);
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

/// A borrowed buffer; each thread writes a part of its own.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: by the contract of `part` and `at`, no two threads touch one element.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub fn new(buffer: &'a mut [T]) -> Self {
        Parts {
            start: buffer.as_mut_ptr(),
            len: buffer.len(),
            borrow: PhantomData,
        }
    }

    /// `size` elements from `first` on.
    ///
    /// # Panics
    /// If they reach beyond the buffer.
    ///
    /// # Safety
    /// Nobody else touches them while the part lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, first: usize, size: usize) -> &mut [T] {
        assert!(first <= self.len && size <= self.len - first);
        // SAFETY: inside the borrowed buffer, and the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), size) }
    }

    /// Address of an element, for kernels that write some columns of every row.
    pub fn at(&self, index: usize) -> *mut T {
        self.start.wrapping_add(index)
    }
}
