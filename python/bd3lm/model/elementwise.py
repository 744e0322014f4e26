"""GELU, and dropout with the sum after it, in one pass over memory each.

On the CPU they are Rust kernels: PyTorch's GELU takes three times as long there, and its dropout
draws from a generator of one thread and keeps the mask until the backward pass. Elsewhere, and
under ``torch.compile``, PyTorch's own operations do the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bd3lm import _core
from bd3lm.model.threads import kernel_threads

_DTYPES = (torch.float32, torch.bfloat16)


def gelu(x: Tensor) -> Tensor:
    """GELU with the tanh approximation, of any shape."""
    return _Gelu.apply(x) if _takes(x) else F.gelu(x, approximate="tanh")


def dropout_add(h: Tensor, x: Tensor, p: float) -> Tensor:
    """``h`` + dropout(``x``): what ``x`` keeps is scaled by 1/(1-p).

    Which numbers are kept is a function of one draw from PyTorch's generator and of their place.

    Args:
        h: float32 on the CPU, to be fast.
        x: of the shape of ``h``, float32 or bf16.
        p: probability of dropping a number, in [0, 1).
    """
    if p == 0:
        return h + x
    if _takes(x) and _takes(h) and h.dtype == torch.float32:
        return _DropoutAdd.apply(h, x, p)
    return h + F.dropout(x, p)


def _takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _DTYPES and not torch.compiler.is_compiling()


def flat(x: Tensor) -> NDArray[Any]:
    """The numbers of a contiguous tensor where they are; bf16 as its bits."""
    bits = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    return bits.detach().view(-1).numpy()


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _core.gelu(flat(x), flat(out), kernel_threads())
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_out, d_x = upstream[0].contiguous(), torch.empty_like(x)
        _core.gelu_backward(flat(x), flat(d_out), flat(d_x), kernel_threads())
        return d_x


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, p: float) -> Tensor:
        h, x = h.contiguous(), x.contiguous()
        out = torch.empty_like(h)
        ctx.seed = int(torch.randint(1 << 62, ()))
        ctx.p, ctx.dtype = p, x.dtype
        threads = kernel_threads()
        _core.dropout_add(flat(h), flat(x), ctx.seed, p, flat(out), threads)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        d_out = upstream[0].contiguous()
        d_x = torch.empty_like(d_out, dtype=ctx.dtype)
        threads = kernel_threads()
        _core.dropout_add_backward(flat(d_out), ctx.seed, ctx.p, flat(d_x), threads)
        return d_out, d_x, None
