"""Text to tokens to packed rows to noised batches; all of the work is done in Rust."""

from importlib import import_module
from typing import TYPE_CHECKING

from bd3lm.data.prepare import detokenize, prepare, read_documents
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from bd3lm.data.noise import NoiseSpec, Schedule, Weighting, draw_noise
    from bd3lm.data.prefetch import Prefetcher
    from bd3lm.data.rows import Batch, Loader, Rows

__all__ = [
    "Batch",
    "Dataset",
    "Loader",
    "Manifest",
    "NoiseSpec",
    "Prefetcher",
    "Rows",
    "Schedule",
    "Tokenizer",
    "Weighting",
    "detokenize",
    "draw_noise",
    "load_tokenizer",
    "prepare",
    "read_documents",
    "train_tokenizer",
]

# These hold tensors. PyTorch takes seconds and hundreds of megabytes to import, and preparing text
# does not need it, so they are imported on first use.
_WITH_TENSORS = {
    "Batch": "rows",
    "Loader": "rows",
    "Prefetcher": "prefetch",
    "Rows": "rows",
    "NoiseSpec": "noise",
    "Schedule": "noise",
    "Weighting": "noise",
    "draw_noise": "noise",
}


def __getattr__(name: str) -> object:
    """Import a name on first use."""
    module = _WITH_TENSORS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)
