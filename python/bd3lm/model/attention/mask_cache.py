"""Cache of the forms that backends derive from a BlockMask: built once, used by every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from bd3lm.model.attention.mask import BlockMask, Shape, used

T = TypeVar("T")


def cached_per_mask(build: Callable[[BlockMask, str], T]) -> Callable[[BlockMask, str], T]:
    """Cache ``build(mask, device)``: by shape where there are no documents, else with the mask.

    Under ``torch.compile`` nothing is kept, since the forms built there are nodes of a graph; the
    compiler merges the copies of the layers itself.
    """
    # Autograd refuses to save tensors born in inference mode, and these outlive it.
    fresh = torch.inference_mode(False)(build)
    of_mask: WeakKeyDictionary[BlockMask, dict[str, T]] = WeakKeyDictionary()

    @lru_cache(maxsize=64)
    def of_shape(shape: Shape, device: str) -> T:
        return fresh(BlockMask(*shape), device)

    @wraps(build)
    def get(mask: BlockMask, device: str) -> T:
        if torch.compiler.is_compiling():
            return build(mask, device)
        if mask.doc_ids is None:
            return used(of_shape(mask.shape, device))
        known = of_mask.setdefault(mask, {})
        if device not in known:
            known[device] = fresh(mask, device)
        return known[device]

    return get
