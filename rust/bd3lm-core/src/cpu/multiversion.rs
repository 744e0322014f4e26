//! Function multiversioning: one body compiled for several instruction sets.

/// Defines a function that is compiled for AVX-512, AVX2 and the baseline; each call runs the best
/// of them. The body is plain Rust that the compiler can vectorise. All versions give the same
/// bits: Rust never contracts or reorders floating-point operations.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$t:ident: $bound:ident>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name$(<$t: $bound>)?($($arg: $ty),*) {
            #[inline(always)]
            fn body$(<$t: $bound>)?($($arg: $ty),*) $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
                fn avx512$(<$t: $bound>)?($($arg: $ty),*) {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,bmi2")]
                fn avx2$(<$t: $bound>)?($($arg: $ty),*) {
                    body($($arg),*)
                }
                let widest = $crate::cpu::multiversion::limited($crate::cpu::Isa::Avx512);
                if widest >= $crate::cpu::Isa::Avx512
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("bmi2")
                {
                    // SAFETY: the processor has these features, as checked above.
                    return unsafe { avx512($($arg),*) };
                }
                if widest >= $crate::cpu::Isa::Avx2
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("bmi2")
                {
                    // SAFETY: the processor has these features, as checked above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}

pub(crate) use multiversion;

use super::Isa;

/// The instruction set itself; in tests, at most the one that [`tests::at_each`] has reached.
#[inline(always)]
pub(crate) fn limited(isa: Isa) -> Isa {
    #[cfg(test)]
    let isa = isa.min(tests::limit());
    isa
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

    /// Results of `f` on plain Rust, AVX2 and AVX-512, as far as the processor has them. The limit
    /// holds for the calling thread alone.
    pub fn at_each<R>(f: impl Fn() -> R) -> Vec<R> {
        let results = [Isa::Portable, Isa::Avx2, Isa::Avx512].map(|isa| {
            LIMIT.set(isa);
            f()
        });
        LIMIT.set(Isa::Avx512Bf16);
        results.into()
    }
}
