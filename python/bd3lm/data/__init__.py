"""Text to tokens to packed rows to noised batches; all of the work is done in Rust."""

from typing import TYPE_CHECKING

from bd3lm.data.chat import ChatTemplate
from bd3lm.data.prepare import detokenize, prepare, read_documents
from bd3lm.data.shards import join, prepare_shards, prepare_texts
from bd3lm.data.store import Dataset, Manifest
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from bd3lm.lazy import imported_on_use

if TYPE_CHECKING:
    from bd3lm.data.noise import NoiseSpec, Schedule, Weighting, draw_noise
    from bd3lm.data.prefetch import Prefetcher
    from bd3lm.data.rows import Batch, Loader, Rows

__all__ = [
    "Batch",
    "ChatTemplate",
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
    "join",
    "load_tokenizer",
    "prepare",
    "prepare_shards",
    "prepare_texts",
    "read_documents",
    "train_tokenizer",
]

# These hold tensors. PyTorch takes seconds and hundreds of megabytes to import, and preparing text
# does not need it, so they are imported on first use.
__getattr__ = imported_on_use(
    "bd3lm.data",
    {
        "Batch": "rows",
        "Loader": "rows",
        "Prefetcher": "prefetch",
        "Rows": "rows",
        "NoiseSpec": "noise",
        "Schedule": "noise",
        "Weighting": "noise",
        "draw_noise": "noise",
    },
)
