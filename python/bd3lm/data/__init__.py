"""Text to tokens to packed rows to noised batches; all of the work is done in Rust."""

from bd3lm.data.noise import NoiseSpec, Schedule, Weighting, draw_noise
from bd3lm.data.prepare import prepare, read_documents
from bd3lm.data.rows import Batch, Loader, Rows
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "Manifest",
    "NoiseSpec",
    "Rows",
    "Schedule",
    "Tokenizer",
    "Weighting",
    "draw_noise",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "train_tokenizer",
]
