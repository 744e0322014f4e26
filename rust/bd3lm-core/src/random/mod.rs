//! Random numbers as functions of a key: counter-based streams and a keyed permutation.

pub mod permutation;
pub mod philox;

pub use permutation::Permutation;
pub use philox::{Domain, Stream, key_of, mix, unit};
