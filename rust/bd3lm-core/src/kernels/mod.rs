//! CPU kernels of the Transformer, forward and backward.
//!
//! | module | contents |
//! | --- | --- |
//! | [`attention`] | block-diffusion attention |
//! | [`activation`] | bias and activation of the MLP, fused |
//! | [`dropout`] | bias, dropout and residual sum, fused |
//! | [`accumulate`] | sums of gradients |
//! | [`norm`] | LayerNorm and RMSNorm |
//! | [`rotary`] | rotary position embedding |
//! | [`cross_entropy`] | cross-entropy of logits and its gradient, in place |
//! | [`packed_linear`] | products with a prepacked matrix |
//! | [`packed_layer`] | a decoder layer on cached keys and values |
//! | [`categorical`] | tokens from logits: temperature, top-k, nucleus |

pub mod accumulate;
pub mod activation;
pub mod attention;
pub mod categorical;
pub mod cross_entropy;
pub mod dropout;
pub mod norm;
pub mod packed_layer;
pub mod packed_linear;
mod product;
pub mod rotary;
