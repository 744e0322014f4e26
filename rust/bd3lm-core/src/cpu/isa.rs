//! Instruction sets that kernels are compiled for.

use crate::error::{Result, named};

/// Instruction sets that the kernels are compiled for, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust; runs anywhere.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors; bf16 operands are widened to float32.
    Avx512,
    /// 512-bit vectors; bf16 operands are multiplied as pairs and summed in float32.
    Avx512Bf16,
}

impl Isa {
    /// Every set by its name, best last.
    pub const ALL: [(&'static str, Isa); 4] = [
        ("portable", Isa::Portable),
        ("avx2", Isa::Avx2),
        ("avx512", Isa::Avx512),
        ("avx512bf16", Isa::Avx512Bf16),
    ];

    /// The set of this name.
    ///
    /// # Errors
    /// An unknown name.
    pub fn parse(name: &str) -> Result<Isa> {
        named("isa", name, &Isa::ALL)
    }

    /// The name of the set.
    pub fn name(self) -> &'static str {
        Isa::ALL[self as usize].0
    }

    /// Returns whether this processor can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The best set of this processor.
    pub fn best() -> Isa {
        [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Isa::Portable)
    }
}
