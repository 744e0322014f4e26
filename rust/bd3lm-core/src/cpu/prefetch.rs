//! Prefetch hints.

/// Prefetches the first 4 KiB of a slice; the hardware prefetcher does the rest.
#[inline]
pub(crate) fn prefetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let start = slice.as_ptr().cast::<i8>();
        let bytes = size_of_val(slice).min(4096);
        for offset in (0..bytes).step_by(64) {
            // SAFETY: the address is inside the slice, and a prefetch changes nothing.
            unsafe {
                // The L1 cache has too few miss buffers for long slices; short ones go there.
                if bytes > 1024 {
                    _mm_prefetch::<_MM_HINT_T1>(start.add(offset));
                } else {
                    _mm_prefetch::<_MM_HINT_T0>(start.add(offset));
                }
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

/// Prefetches the cache line at any address into L2; never faults. In L1, rows a power of two
/// apart share few sets and would evict the operands in use.
#[inline(always)]
#[allow(unused_unsafe)] // newer compilers call the hint safe
pub(crate) fn prefetch_line(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, valid for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
