//! Instruction sets, threads and memory that the kernels share.
//!
//! | module | contents |
//! | --- | --- |
//! | [`isa`] | instruction sets, and which of them this processor has |
//! | `multiversion` | one body compiled for each instruction set |
//! | `simd` | float32 vectors of each instruction set |
//! | `prefetch` | cache-line hints |
//! | [`threads`] | OpenMP's team or our own helpers |
//! | `scratch` | working memory of each thread |
//! | `buffers` | length checks, groups of rows, disjoint parts |
//! | [`number`] | float32 and bf16 as they are stored, e^x |

pub mod buffers;
#[cfg(test)]
pub(crate) mod guarded;
pub mod isa;
pub(crate) mod multiversion;
pub mod number;
pub(crate) mod prefetch;
pub(crate) mod scratch;
pub(crate) mod simd;
pub mod threads;

pub use isa::Isa;
