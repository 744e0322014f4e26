"""Text to tokens to packed rows to noised batches."""
