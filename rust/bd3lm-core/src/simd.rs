//! One body, compiled for the widest vectors that the machine has.

/// Defines a function whose body is compiled for AVX-512, AVX2 and the baseline, and chosen when it
/// is called. The body is plain Rust written so that it vectorises; its results are the same bits
/// in each form, since Rust never contracts or reorders floating-point operations.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn body($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
                fn avx512($($arg: $ty),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,bmi2")]
                fn avx2($($arg: $ty),*) {
                    body($($arg),*)
                }
                let widest = $crate::simd::limited($crate::attention::Isa::Avx512);
                if widest >= $crate::attention::Isa::Avx512
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("bmi2")
                {
                    // SAFETY: the machine has these features; the line above asked it.
                    return unsafe { avx512($($arg),*) };
                }
                if widest >= $crate::attention::Isa::Avx2
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("bmi2")
                {
                    // SAFETY: the machine has these features; the line above asked it.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

pub(crate) use multiversion;

use crate::attention::Isa;

/// The instruction set itself; in tests, at most the one that [`tests::at_each`] is at.
#[inline(always)]
pub(crate) fn limited(isa: Isa) -> Isa {
    #[cfg(test)]
    let isa = isa.min(tests::limit());
    isa
}

/// Has the first 4 KiB of a slice on their way from memory; what follows, the machine foresees.
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
                // The first cache has fewer lines under way than long slices need; short ones come
                // all the way.
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

/// Asks for the cache line at any address; never faults. It comes to the second-level cache: rows
/// a power of two apart share few places of the first, and would evict what is worked on.
#[inline(always)]
#[allow(unused_unsafe)] // newer compilers call the hint safe
pub(crate) fn prefetch_line(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

#[cfg(test)]
pub(crate) mod tests {
    use super::Isa;
    use std::cell::Cell;

    thread_local! {
        static LIMIT: Cell<Isa> = const { Cell::new(Isa::Avx512Bf16) };
    }

    pub(super) fn limit() -> Isa {
        LIMIT.get()
    }

    /// What `f` gives on plain Rust, AVX2 and AVX-512, as far as the processor goes; for what the
    /// calling thread does.
    pub fn at_each<R>(f: impl Fn() -> R) -> Vec<R> {
        let results = [Isa::Portable, Isa::Avx2, Isa::Avx512].map(|isa| {
            LIMIT.set(isa);
            f()
        });
        LIMIT.set(Isa::Avx512Bf16);
        results.into()
    }
}
