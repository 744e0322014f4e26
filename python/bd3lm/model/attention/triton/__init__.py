"""Block-diffusion attention on NVIDIA GPUs: Triton kernels, forward, backward and decoding.

Triton is imported when a kernel first runs. File by file: ``ranges.py`` the mask as the
kernels read it · ``common.py forward.py backward.py decode.py`` the kernels · ``launch.py``
buffers and grids · ``tuning.py tuning.json`` tile sizes · ``ops.py`` PyTorch operators.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3lm.errors import ConfigError
from bd3lm.model.attention.dynamo import fixed_while_compiling
from bd3lm.model.attention.mask import BlockMask, CachedMask
from bd3lm.model.attention.triton import ops
from bd3lm.model.attention.triton.ranges import ranges

NEEDS = "needs an NVIDIA GPU of compute capability 8.0 or newer and the triton package"
LIMITS = (
    "takes fp16, bf16 or fp32 tensors of one dtype on a GPU, heads of up to 256 features, "
    "and the last clean block"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Heads of other widths are copied into ones that are a multiple of this, so that rows begin where
# wide loads may.
WIDTH_STEP = 16
# A cache this long, with so few rows of queries, leaves most of the device idle unless it is split.
DECODE_ROWS = 64
DECODE_KEYS = 512


@fixed_while_compiling
def available() -> bool:
    """Return whether there is a GPU with bf16 tensor cores, and Triton to compile for it."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | CachedMask) -> bool:
    """Return whether the kernels take these inputs."""
    return (
        q.is_cuda
        and q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] <= 256
        and (isinstance(mask, CachedMask) or mask.last_clean)
    )


def triton_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention under ``mask`` by the Triton kernels; see :func:`bd3lm.model.attention.attend`.

    Args:
        q: fp16, bf16 or fp32 [B, H, Tq, D], D up to 256.
        k: [B, Hkv, Tk, D].
        v: as ``k``.
        mask: which keys each query sees.

    Returns:
        [B, H, Tq, D]; zero for queries that see nothing.
    """
    keys, queries = ranges(mask, str(q.device))
    width = q.shape[-1]
    scale = width**-0.5
    q, k, v = _widened(q, k, v)
    if is_decoding(q, k, v, mask):
        out = ops.decode_attention(q, k, v, None, keys[:, 0], keys[:, 1], scale, 0)
    else:
        out = ops.block_attention(q, k, v, keys, queries, mask.noised, scale)[0]
    return out[..., :width]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: CachedMask) -> Tensor:
    """Attention over a cache filled to where only the device knows; no gradient.

    Args:
        q: fp16, bf16 or fp32 [B, H, Tq, D], D up to 256.
        k: [B, Hkv, capacity, D].
        v: as ``k``.
        mask: how far each query sees.

    Returns:
        [B, H, Tq, D].
    """
    width = q.shape[-1]
    q, k, v = _widened(q, k, v)
    lo = torch.zeros_like(mask.end)
    return ops.decode_attention(q, k, v, None, lo, mask.end, width**-0.5, 0)[..., :width]


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, pages: Tensor, lengths: Tensor, block_size: int
) -> Tensor:
    """Block-causal attention of the last positions of rows kept in a paged cache (docs/math.md §8).

    Row ``b`` holds ``lengths[b]`` keys, those of the queries included; its queries are the last
    Tq positions: one block, or two where the first is being committed. Lengths stay on the
    device, so a step can be captured as a graph.

    Args:
        q: [B, H, Tq, D].
        k_pages: [P, Hkv, page size, D], D a multiple of 16; any strides with the last one 1.
        v_pages: as ``k_pages``.
        pages: int32 [B, N]; position j lies in page ``pages[b, j // page size]``.
        lengths: int32 [B], at least Tq.
        block_size: S.

    Returns:
        [B, H, Tq, D].

    Raises:
        ConfigError: shapes that do not fit each other.
    """
    if pages.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ConfigError("pages", tuple(pages.shape), f"one row for each of {q.shape[0]} queries")
    if q.shape[-1] % WIDTH_STEP:
        raise ConfigError("head width", q.shape[-1], f"a multiple of {WIDTH_STEP} in a paged cache")
    position = (
        lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    )
    hi = ((position // block_size + 1) * block_size).minimum(lengths[:, None]).int()
    lo = torch.zeros_like(hi)
    return ops.decode_attention(q, k_pages, v_pages, pages, lo, hi, q.shape[-1] ** -0.5, 0)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad with zero columns up to the next multiple of :data:`WIDTH_STEP`; no score changes."""
    missing = -tensors[0].shape[-1] % WIDTH_STEP
    return tuple(F.pad(x, (0, missing)) for x in tensors) if missing else tensors


def is_decoding(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> bool:
    """Return whether a few queries meet a long cache, which the decoding kernel splits."""
    if mask.noised or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return False
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return rows <= DECODE_ROWS and k.shape[2] >= DECODE_KEYS
