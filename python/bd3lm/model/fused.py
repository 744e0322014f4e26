"""Fused ops between the matrix multiplications of a layer: bias, activation, dropout, norm, rotary.

On the CPU they are Rust kernels of one pass over memory each. A bias is added by the op that
follows its product, heads are split and rotated in one pass, and norms write the dtype of the next
product. The backward pass recomputes masks and activations instead of saving them. Elsewhere, and
under ``torch.compile``, the same ops are composed of PyTorch's own.
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


def on_cpu(*tensors: Tensor) -> bool:
    """Return whether the CPU kernels take these tensors now."""
    return not torch.compiler.is_compiling() and all(
        x.device.type == "cpu" and x.dtype in _DTYPES for x in tensors
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a product of ``x``: autocast's if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def activated(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Compute f(``x`` + ``bias``).

    Args:
        x: [..., W].
        bias: pending bias [W], or None.
        activation: ``gelu`` (tanh-approximated) or ``relu2``, max(x, 0)².
    """
    if on_cpu(x) and not torch.is_grad_enabled():
        return _activated(x.contiguous(), _bias(bias, x.shape[-1]), activation)
    if bias is not None:
        x = x + bias
    return F.gelu(x, approximate="tanh") if activation == "gelu" else _SquaredRelu.apply(x)


def activated_linear(x: Tensor, bias: Tensor | None, weight: Tensor, activation: str) -> Tensor:
    """Multiply :func:`activated` by a matrix, on the CPU.

    Only ``x`` is saved for the backward pass, which recomputes f.

    Args:
        x: [..., W].
        bias: pending bias [W], or None.
        weight: [D, W].
        activation: f.

    Returns:
        [..., D].
    """
    return _ActivatedLinear.apply(x, _bias(bias, x.shape[-1]), weight, activation)


def dropout_add(h: Tensor, x: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """Compute ``h`` + dropout(``x`` + ``bias``); kept elements are scaled by 1/(1-p).

    The dropout mask is a function of one draw from PyTorch's generator and of the position.

    Args:
        h: [..., D]; float32 takes the CPU kernel.
        x: shaped as ``h``, float32 or bf16.
        bias: pending bias [D], or None.
        p: probability of dropping an element, in [0, 1).
    """
    if on_cpu(h, x) and h.dtype == torch.float32:
        return _DropoutAdd.apply(h, x, _bias(bias, x.shape[-1]), p)
    if bias is not None:
        x = x + bias
    return h + (F.dropout(x, p) if p else x)


def normalised(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Normalise the last axis; return ``(x, norm(x))``.

    The backward pass adds the gradients of both in one pass. On the CPU the norm of float32 has
    the dtype of the next product.

    Args:
        x: [..., D].
        weight: float32 [D].
        bias: [D], or None.
        kind: ``layernorm`` or ``rmsnorm``.
        eps: added to the variance.

    Returns:
        ``(x, norm of x)``.
    """
    if on_cpu(x, weight) and x.dtype == weight.dtype == torch.float32:
        centred = kind == "layernorm"
        return _Normalised.apply(x, weight, _bias(bias, x.shape[-1]), centred, eps)
    if kind == "layernorm":
        return x, F.layer_norm(x, weight.shape, weight, bias, eps)
    out = F.rms_norm(x, weight.shape, weight, eps)
    return x, out if bias is None else out + bias


def projected_heads(
    x: Tensor,
    weight: Tensor,
    widths: list[int],
    turned: list[bool],
    rope: tuple[Tensor, Tensor],
    head: int,
    bias: Tensor | None = None,
) -> list[Tensor]:
    """Multiply by a matrix, split the product into heads and rotate some of them.

    Args:
        x: [B, T, K].
        weight: [D, K].
        widths: features of every part; their sum is D.
        turned: whether each part is rotated.
        rope: cosines and signed sines, float32 [T, Dh] (:meth:`bd3lm.model.rotary.Rotary.table`).
        head: Dh.
        bias: [D], or None.

    Returns:
        [B, T, heads, Dh] for every part.
    """
    if bias is None and on_cpu(x, weight):
        return list(_ProjectedHeads.apply(x, weight, *rope, tuple(widths), tuple(turned), head))
    return split_heads(F.linear(x, weight, bias), widths, turned, rope, head)


def split_heads(
    x: Tensor, widths: list[int], turned: list[bool], rope: tuple[Tensor, Tensor], head: int
) -> list[Tensor]:
    """Split a product into heads and rotate some of them; see :func:`projected_heads`."""
    # Not unflatten: under a device context PyTorch 2.11 cannot trace it.
    parts = [part.view(*part.shape[:-1], -1, head) for part in x.split(widths, dim=-1)]
    return [rotate(part, rope) if turn else part for part, turn in zip(parts, turned, strict=True)]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [B, T, H, Dh] by the angles of their positions (two halves, NeoX style)."""
    if on_cpu(x):
        return _Rotated.apply(x, *rope)
    cos, sin = (table[:, None].to(x.dtype) for table in rope)  # [T, 1, Dh]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def add_to(total: Tensor, x: Tensor, *, first: bool) -> None:
    """Add ``x`` (float32 or bf16) to ``total`` (float32); if ``first``, copy it."""
    if on_cpu(total, x):
        _core.add_to(flat(total), flat(x), first, kernel_threads())
    elif first:
        total.copy_(x)
    else:
        total.add_(x)


def flat(x: Tensor) -> NDArray[Any]:
    """NumPy view of a contiguous tensor, flattened; bf16 as int16 bits."""
    bits = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
    return bits.detach().view(-1).numpy()


def row(x: Tensor) -> NDArray[Any]:
    """Float32 copy of a short parameter, as NumPy.

    A copy, because FSDP cannot free a parameter's storage while a NumPy view of it exists.
    """
    return flat(x.detach().float().clone())


def _bias(bias: Tensor | None, width: int) -> Tensor:
    return torch.zeros(width) if bias is None else bias


def _activated(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    out = torch.empty_like(x)
    _core.activate(activation, flat(x), row(bias), flat(out), kernel_threads())
    return out


class _SquaredRelu(torch.autograd.Function):
    """Squared ReLU whose backward pass reads memory twice instead of five times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.clamp_min(0)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (upstream[0] * positive).mul_(2)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, activation: str) -> Tensor:
        dtype = compute_dtype(x)
        x, matrix = x.to(dtype).contiguous(), weight.to(dtype)
        h = _activated(x, bias, activation)
        ctx.save_for_backward(x, bias, matrix)
        ctx.activation, ctx.dtype = activation, weight.dtype
        return h @ matrix.T

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, matrix = ctx.saved_tensors
        d_out = upstream[0].to(x.dtype)
        d, h, d_bias = (d_out @ matrix).contiguous(), torch.empty_like(x), torch.empty(len(bias))
        _core.activate_backward(
            ctx.activation, flat(x), row(bias), flat(d), flat(h), flat(d_bias), kernel_threads()
        )
        d_weight = d_out.flatten(0, -2).T @ h.flatten(0, -2)
        return d, d_bias, d_weight.to(ctx.dtype), None


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, bias: Tensor, p: float) -> Tensor:
        h, x = h.contiguous(), x.contiguous()
        out = torch.empty_like(h)
        ctx.seed = int(torch.randint(1 << 62, ())) if p else 0
        ctx.p, ctx.dtype = p, x.dtype
        threads = kernel_threads()
        _core.dropout_add(flat(h), flat(x), row(bias), ctx.seed, p, flat(out), threads)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_out = upstream[0].contiguous()
        d_x = torch.empty_like(d_out, dtype=ctx.dtype)
        d_bias = torch.empty(d_out.shape[-1])
        threads = kernel_threads()
        _core.dropout_add_backward(flat(d_out), ctx.seed, ctx.p, flat(d_x), flat(d_bias), threads)
        return d_out, d_x, d_bias, None


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, centred: bool, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows = x.contiguous()
        out = torch.empty_like(rows, dtype=compute_dtype(x))
        moments = torch.empty(rows.numel() // rows.shape[-1], 2)
        threads = kernel_threads()
        inputs = flat(rows), row(weight), row(bias)
        _core.normalise(*inputs, centred, eps, flat(out), flat(moments), threads)
        ctx.save_for_backward(rows, weight, moments)
        ctx.centred = centred
        return x, out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, moments = ctx.saved_tensors
        beside, d_out = upstream
        if d_out is None:
            return beside, None, None, None, None
        d_x, d_weight, d_bias = (torch.empty_like(y) for y in (x, weight, weight))
        _core.normalise_backward(
            flat(d_out.contiguous()),
            flat(x),
            row(weight),
            ctx.centred,
            flat(moments),
            None if beside is None else flat(beside.contiguous()),
            flat(d_x),
            flat(d_weight),
            flat(d_bias),
            kernel_threads(),
        )
        return d_x, d_weight, d_bias, None, None


def _rope_arg(rope: tuple[Tensor, Tensor], head: int, *, inverse: bool) -> tuple[Any, ...]:
    cos, sin = (flat(table.contiguous()) for table in rope)
    return cos, sin, head, inverse


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.rope = cos, sin
        return _Rotated.turned(x, ctx.rope, inverse=False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _Rotated.turned(upstream[0], ctx.rope, inverse=True), None, None

    @staticmethod
    def turned(x: Tensor, rope: tuple[Tensor, Tensor], *, inverse: bool) -> Tensor:
        x, width = x.contiguous(), x.shape[-2] * x.shape[-1]
        out, arg = torch.empty_like(x), _rope_arg(rope, x.shape[-1], inverse=inverse)
        _core.move_heads(flat(x), (width, 0), flat(out), (width, 0), width, arg, kernel_threads())
        return out


class _ProjectedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        widths: tuple[int, ...],
        turned: tuple[bool, ...],
        head: int,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        dtype = compute_dtype(x)
        x, matrix = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, matrix)
        ctx.widths, ctx.turned, ctx.rope, ctx.dtype = widths, turned, (cos, sin), weight.dtype
        product, arg = x @ matrix.T, _rope_arg((cos, sin), head, inverse=False)
        for width, first, turn in _columns(widths, turned):
            if turn:
                place = (product.shape[-1], first)
                _core.rotate_heads(flat(product), place, width, arg, kernel_threads())
        return tuple(part.unflatten(-1, (-1, head)) for part in product.split(widths, dim=-1))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        d = x.new_empty(*x.shape[:-1], len(matrix))
        columns = _columns(ctx.widths, ctx.turned)
        for part, (width, first, turn) in zip(upstream, columns, strict=True):
            if part is None:
                d[..., first : first + width].zero_()
                continue
            source, there = part.to(d.dtype).contiguous(), (len(matrix), first)
            arg = _rope_arg(ctx.rope, part.shape[-1], inverse=True) if turn else None
            _core.move_heads(flat(source), (width, 0), flat(d), there, width, arg, kernel_threads())
        d_weight = d.flatten(0, -2).T @ x.flatten(0, -2)
        return (d @ matrix, d_weight.to(ctx.dtype), *(None,) * 5)


def _columns(widths: tuple[int, ...], turned: tuple[bool, ...]) -> list[tuple[int, int, bool]]:
    """Width and first feature of every part, and whether it is rotated."""
    firsts = [sum(widths[:i]) for i in range(len(widths))]
    return list(zip(widths, firsts, turned, strict=True))
