//! CPU kernels of the block-diffusion attention.
