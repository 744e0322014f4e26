"""PyTorch's FlexAttention, compiled, with its block mask built tile by tile from the intervals.

Its kernels are Inductor's Triton templates, or by name those of FlashAttention-4 (``flex-fa4``).
"""

from __future__ import annotations

import importlib.util
import typing
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask, Intervals
from bd3lm.model.attention.mask_cache import cached_per_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as TileMask

TILE = 128
COMPILER = "inductor"
"""Backend of ``torch.compile``."""
NEEDS = "needs a PyTorch with torch.nn.attention.flex_attention"
LIMITS = (
    "takes heads of 16 features or more, compiles itself and not inside another torch.compile, "
    "and on a CPU gives no gradient"
)
FA4_NEEDS = (
    "needs a Hopper GPU (compute capability 9.x), a PyTorch whose FlexAttention has the FLASH "
    "backend, and the flash-attn-4 package"
)
FA4_LIMITS = (
    "takes fp16 or bf16 on CUDA with heads of 64, 96 or 128 features, and compiles itself and not "
    "inside another torch.compile"
)


def available() -> bool:
    """Return True: every PyTorch that this package allows has FlexAttention."""
    return True


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> bool:
    """Return whether FlexAttention takes these inputs.

    Not inside another ``torch.compile``: there the block mask would be built in the graph, and
    PyTorch 2.15 on the CPU then computes wrong values without a word.
    """
    if torch.compiler.is_compiling():
        return False
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return q.shape[-1] >= 16 and (q.is_cuda or not wants_grad)


@lru_cache(maxsize=1)
def fa4_available() -> bool:
    """Return whether FlexAttention can run the kernels of FlashAttention-4 here.

    Blackwell would need tiles of 256 queries.
    """
    from torch.nn.attention import flex_attention

    if "FLASH" not in typing.get_args(getattr(flex_attention, "_Backend", None)):
        return False
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return hopper and _has_fa4()


def _has_fa4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def fa4_supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> bool:
    """Return whether the kernels of FlashAttention-4 take these inputs."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in (64, 96, 128)
    return q.is_cuda and fits and supports(q, k, v, mask)


def suits(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> bool:
    """Return whether ``auto`` takes it: in training and scoring, where the same shapes come again.

    It compiles for seconds when a shape is new, and while decoding most are. Other users run it on
    heads of a power of two features.
    """
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    width = q.shape[-1]
    return (wants_grad or mask.noised) and width & (width - 1) == 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, kernel: str | None = None
) -> Tensor:
    """Attention under ``mask``; see :func:`bd3lm.model.attention.attend`.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: the mask.
        kernel: FlexAttention's own backend, such as FLASH; None: it chooses one of Triton's.
    """
    block_mask = tile_mask(mask, str(q.device))
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    documents = mask.doc_ids is not None
    kind = q.dtype, str(q.device), mask.noised, documents, wants_grad
    return _compiled(q.shape, k.shape, kernel, *kind)(q, k, v, block_mask)


def fa4_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Run :func:`attention` by the kernels of FlashAttention-4."""
    return attention(q, k, v, mask, "FLASH")


@lru_cache(maxsize=256)
def _compiled(
    queries: torch.Size, keys: torch.Size, kernel: str | None, *kind: Any
) -> Callable[[Tensor, Tensor, Tensor, TileMask], Tensor]:
    """FlexAttention compiled for one shape, which is faster than code for any shape.

    PyTorch counts recompilations by code object, and runs FlexAttention uncompiled after eight of
    them. So every shape has a code object of its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    gqa = queries[1] != keys[1]
    # Left out where it is not named: the oldest PyTorch does not know it.
    options: dict[str, Any] = {} if kernel is None else {"kernel_options": {"BACKEND": kernel}}

    def run(q: Tensor, k: Tensor, v: Tensor, block_mask: TileMask) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=gqa, **options)

    shape = "_".join(map(str, (*queries, keys[1], keys[2], kernel or "triton")))
    code = run.__code__.replace(co_name=f"flex_{shape}")
    own = FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    return torch.compile(own, dynamic=False, backend=COMPILER)


@cached_per_mask
def tile_mask(mask: BlockMask, device: str) -> TileMask:
    """FlexAttention's block mask, without ever holding Tq·Tk booleans."""
    from torch.nn.attention.flex_attention import BlockMask as TileMask

    intervals = mask.intervals(device)
    some, every = tile_coverage(mask, intervals)
    return TileMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=TILE,
        mask_mod=_element_mask(mask, intervals),
        seq_lengths=(mask.num_queries, mask.num_keys),
    )


def tile_coverage(mask: BlockMask, intervals: Intervals) -> tuple[Tensor, Tensor]:
    """Tiles of which something may be seen, and those of which all is; bool [B or 1, Tq', Tk'].

    A tile of keys may straddle the two streams; it is then full only if it is so in both.
    """
    device = intervals.clean_lo.device
    first = torch.arange(0, mask.num_keys, TILE, device=device)
    last = (first + TILE).clamp(max=mask.num_keys)
    some = torch.zeros(1, 1, len(first), dtype=torch.bool, device=device)
    every = torch.ones_like(some)
    streams = [(mask.seq_len if mask.noised else 0, intervals.clean_lo, intervals.clean_hi)]
    if mask.noised:
        streams.append((0, intervals.noised_lo, intervals.noised_hi))
    for offset, lo, hi in streams:
        begin = (first - offset).clamp(0, mask.seq_len)
        end = (last - offset).clamp(0, mask.seq_len)
        seen = hi > lo
        low = _per_tile(torch.where(seen, lo, mask.seq_len), torch.amin)
        high = _per_tile(torch.where(seen, hi, 0), torch.amax)
        some = some | ((low < end) & (high > begin) & (begin < end))
        covered = (_per_tile(lo, torch.amax) <= begin) & (_per_tile(hi, torch.amin) >= end)
        every = every & (covered | (begin >= end))
    return some, every & some


def _per_tile(bound: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce a bound [B, Tq] over the queries of each tile: [B, Tq', 1]."""
    missing = -bound.shape[1] % TILE
    padded = torch.cat([bound, bound[:, -1:].expand(-1, missing)], dim=1)
    return reduce(padded.unflatten(1, (-1, TILE)), dim=2)[..., None]


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Number and list of the tiles of keys that each tile of queries meets; int32, one head."""
    count = tiles.sum(dim=-1, dtype=torch.int32)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None], order[:, None]


def _element_mask(mask: BlockMask, intervals: Intervals) -> Callable[..., Tensor]:
    shared = mask.doc_ids is None
    clean_lo, clean_hi, noised_lo, noised_hi = (
        bound[0] if shared else bound for bound in intervals
    )
    offset = mask.seq_len

    def within(at: Any, lo: Tensor, hi: Tensor, key: Tensor) -> Tensor:
        return (key >= lo[at]) & (key < hi[at])

    def clean_only(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within(query if shared else (b, query), clean_lo, clean_hi, key)

    def both(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query if shared else (b, query)
        return within(at, noised_lo, noised_hi, key) | within(at, clean_lo, clean_hi, key - offset)

    return both if mask.noised else clean_only
