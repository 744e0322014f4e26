//! The parts of bd3lm that need neither Python nor PyTorch: the data path from text to noised
//! batches, and the CPU kernels of the model, with their gradients.
//!
//! | module | contents |
//! | --- | --- |
//! | [`data`] | text → tokens → packed rows → noised batches |
//! | [`noise`] | schedules, weightings, masks and loss weights |
//! | [`kernels`] | attention, norms, activations, cross-entropy, prepacked layers, draws |
//! | [`random`] | counter-based streams and a keyed permutation |
//! | [`cpu`] | instruction sets, threads, scratch memory |
//! | [`error`] | one enum, a variant a cause |
//!
//! `data` and `kernels` do not know each other; imports run `data > noise > random > cpu > error`
//! and `kernels > random > cpu > error`.

pub mod cpu;
pub mod data;
pub mod error;
pub mod kernels;
pub mod noise;
pub mod random;

pub use error::{Error, Result};
