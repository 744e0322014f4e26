"""Text to tokens to packed rows to noised batches; all of the work is done in Rust."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bd3lm.data.prepare import prepare, read_documents
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from bd3lm.data.noise import NoiseSpec, Schedule, Weighting, draw_noise
    from bd3lm.data.rows import Batch, Loader, Rows

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

_TENSORS = {
    "noise": ("NoiseSpec", "Schedule", "Weighting", "draw_noise"),
    "rows": ("Batch", "Loader", "Rows"),
}
"""What hands out tensors is imported when it is asked for: PyTorch takes seconds and 700 MB."""


def __getattr__(name: str) -> Any:
    for module, names in _TENSORS.items():
        if name in names:
            return getattr(import_module(f"bd3lm.data.{module}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
