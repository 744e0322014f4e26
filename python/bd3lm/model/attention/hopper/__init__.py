"""Block-diffusion attention on Hopper: warp-specialized kernels in Gluon, forward and backward.

Decoding is left to the Triton kernels, which also take what these do not. File by file:
``worklist.py`` the work of every program · ``common.py forward.py backward.py`` the kernels ·
``launch.py`` buffers and descriptors · ``ops.py`` PyTorch operators.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import version

import torch
from torch import Tensor

from bd3lm.model.attention import triton
from bd3lm.model.attention.dynamo import fixed_while_compiling
from bd3lm.model.attention.hopper import ops
from bd3lm.model.attention.hopper.worklist import key_worklist, query_worklist
from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.triton.ranges import ranges

NEEDS = "needs an NVIDIA GPU of compute capability 9.0 and the triton package"
TRITONS = ("3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0")
"""Versions whose Gluon the kernels were compiled with; names change from version to version."""
DTYPES = (torch.float16, torch.bfloat16)
WIDTHS = (64, 128)


@fixed_while_compiling
def available() -> bool:
    """Return whether there is a Hopper GPU, and Triton to compile for it."""
    return triton.available() and torch.cuda.get_device_capability() == (9, 0)


def hopper_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention under ``mask``; see :func:`bd3lm.model.attention.attend`.

    Takes fp16 and bf16 heads of 64 or 128 features with the Hopper kernels; leaves other ones and
    a few queries over a long cache to the Triton kernels.

    Args:
        q: fp16, bf16 or fp32 [B, H, Tq, D], D up to 256.
        k: [B, Hkv, Tk, D].
        v: as ``k``.
        mask: which keys each query sees.

    Returns:
        [B, H, Tq, D]; zero for queries that see nothing.
    """
    if triton.is_decoding(q, k, v, mask) or not kernels_take(q.dtype, q.shape[-1]):
        return triton.triton_attention(q, k, v, mask)
    device, width = str(q.device), q.shape[-1]
    keys, queries = ranges(mask, device)
    work = query_worklist(mask, device), key_worklist(mask, device, width)
    return ops.hopper_attention(q, k, v, keys, queries, *work, mask.noised, width**-0.5)[0]


@fixed_while_compiling
def kernels_take(dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernels take such heads with this Triton; if not, say so once."""
    return _judge(dtype, width)


@cache
def _judge(dtype: torch.dtype, width: int) -> bool:
    found = version("triton")
    if found not in TRITONS:
        reason = f"its kernels were compiled with Triton {', '.join(TRITONS)}, not with {found}"
    elif dtype not in DTYPES or width not in WIDTHS:
        kind = str(dtype).removeprefix("torch.")
        reason = f"its kernels take fp16 and bf16 of 64 or 128 features, not {kind} of {width}"
    else:
        return True
    logging.getLogger(__name__).warning(
        "attention = hopper: the Triton kernels run instead, since %s", reason
    )
    return False
