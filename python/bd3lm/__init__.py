"""Block-diffusion language models: train, score and sample."""
