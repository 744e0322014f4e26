//! The part of bd3lm that knows neither Python nor tensors with gradients: text becomes
//! tokens, tokens become packed rows, rows become noised batches.
//!
//! | module | what it owns |
//! | --- | --- |
//! | [`schedule`] | mask probability, NELBO weight and inverse of every noise schedule |
//! | [`weighting`] | training-only reweightings of the NELBO |
//! | [`noise`] | noise levels, masks and loss weights of a batch |
//! | [`rng`] | counter-based random streams, a function of (seed, step, row) |
//! | [`order`] | the keyed permutation behind shuffling and strata |
//! | [`text`] | txt / jsonl / parquet readers in bounded memory |
//! | [`detokenize`] | the rules that benchmark texts are put back by |
//! | [`tokenize`] | text to ids: the library's, words cached |
//! | [`prepare`] | files to a data set, in parallel and in order |
//! | [`store`] | `.bin`/`.idx` token files and their manifest |
//! | [`pack`] | rows of `seq_len` tokens as plans over documents |
//! | [`ahead`] | rows that are not in memory yet |
//! | [`batch`] | gather and noise rows into the caller's buffers |
//! | [`attention`] | CPU kernels of the block-diffusion attention |
//! | [`block`] | a layer of the Transformer, before and after attention |
//! | [`draw`] | tokens from logits: temperature, top-k, nucleus |
//! | [`elementwise`] | GELU, and dropout with the sum after it |
//! | [`linear`] | products with a matrix laid out beforehand |
//! | [`softmax`] | cross-entropy of logits and its gradient, in place |
//! | [`error`] | one enum, a variant a cause |

pub mod ahead;
pub mod attention;
pub mod batch;
pub mod block;
pub mod detokenize;
pub mod draw;
pub mod elementwise;
pub mod error;
pub mod linear;
pub mod noise;
pub mod norm;
pub mod order;
pub mod pack;
pub mod prepare;
mod record;
pub mod rng;
pub mod rotary;
pub mod schedule;
mod simd;
pub mod softmax;
pub mod store;
pub mod text;
pub mod tokenize;
pub mod weighting;

pub use error::{Error, Result};
