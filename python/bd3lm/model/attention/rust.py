"""The Rust CPU kernel as a PyTorch operator: forward and backward, linear memory (docs/math.md §7).

Shapes: B batch, H heads, Hkv key heads, Tq queries, Tk keys, Dh head width, L sequence.

``torch.compile`` and fake tensors use custom operators over the mask's intervals. Elsewhere the
extension is called directly: the dispatcher would cost more than the kernel while decoding, and
registering its autograd imports the compiler.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bd3lm import _core
from bd3lm.model.attention.mask import BlockMask, Intervals, RangeMask
from bd3lm.model.attention.mask_cache import cached_per_mask
from bd3lm.model.threads import kernel_threads

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MAX_HEAD_WIDTH = 256
LIMITS = f"takes float32 or bf16 tensors on the CPU, heads up to {_MAX_HEAD_WIDTH} wide"


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | RangeMask) -> bool:
    """Return whether :func:`rust_attention` takes these arguments: float32 or bf16 on the CPU."""
    on_cpu = q.device.type == k.device.type == v.device.type == "cpu"
    return (
        on_cpu
        and q.dtype in _DTYPES
        and k.dtype in _DTYPES
        and v.dtype in _DTYPES
        and 0 < q.shape[-1] <= _MAX_HEAD_WIDTH
        and (isinstance(mask, RangeMask) or mask.doc_ids is None or mask.doc_ids.is_cpu)
    )


def rust_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention of ``q`` over ``k, v`` under a block-diffusion mask, on the CPU.

    Args:
        q: queries [B, H, Tq, Dh], float32 or bf16; any strides, best with Dh adjacent.
        k: keys [B, Hkv, Tk, Dh], H a multiple of Hkv; another dtype is cast to that of ``q``.
        v: values, as the keys.
        mask: which keys each query sees.

    Returns:
        [B, H, Tq, Dh] in the dtype of ``q``, laid out [B, Tq, H, Dh] so that joining the heads
        is free; zero for queries that see nothing.

    Raises:
        ConfigError: shapes that do not fit together, or do not fit the mask.
    """
    if k.dtype != q.dtype:
        k = k.to(q.dtype)
    if v.dtype != q.dtype:
        v = v.to(q.dtype)
    clean_offset = mask.seq_len if mask.noised else 0
    if torch.compiler.is_compiling():
        # One opaque node in the graph, instead of the arithmetic behind the ranges.
        ranges = block_intervals(q, mask.doc_ids, *mask.shape)
        return block_attention(q, k, v, *ranges, clean_offset)[0]
    ranges = _ranges(mask, "cpu")
    if type(q) is not Tensor:  # e.g. a fake tensor, which has no memory
        return block_attention(q, k, v, *ranges, clean_offset)[0]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _BlockAttention.apply(q, k, v, ranges, clean_offset)
    return _forward(q, k, v, ranges, clean_offset)[0]


def range_attention(q: Tensor, k: Tensor, v: Tensor, mask: RangeMask) -> Tensor:
    """Run :func:`rust_attention` over any ranges, without gradients."""
    return _forward(q, k.to(q.dtype), v.to(q.dtype), mask.intervals, mask.offset)[0]


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Intervals, clean_offset: int
    ) -> Tensor:
        out, lse = _forward(q, k, v, ranges, clean_offset)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask = ranges, clean_offset
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_gradients(upstream[0], *ctx.saved_tensors, *ctx.mask), None, None)


@cached_per_mask
def _ranges(mask: BlockMask, device: str) -> Intervals:
    return mask.intervals(device)


@torch.library.custom_op("bd3lm::block_intervals", mutates_args=(), device_types="cpu")
def block_intervals(
    like: Tensor,
    doc_ids: Tensor | None,
    seq_len: int,
    block_size: int,
    noised: bool,
    clean_queries: bool,
    first: int,
    last_clean: bool,
    causal_end: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Intervals of the mask that the arguments describe; ``like`` only gives the device."""
    shape = seq_len, block_size, noised, clean_queries, first, last_clean, causal_end
    mask = BlockMask(*shape, doc_ids=doc_ids)
    clean_lo, clean_hi, noised_lo, noised_hi = (x.clone() for x in mask.intervals())
    return clean_lo, clean_hi, noised_lo, noised_hi


@block_intervals.register_fake
def _(like, doc_ids, *shape):
    mask = BlockMask(*shape)
    size = (1 if doc_ids is None else doc_ids.shape[0], mask.num_queries)
    return tuple(like.new_empty(size, dtype=torch.int32) for _ in range(4))


@torch.library.custom_op("bd3lm::rust_attention", mutates_args=(), device_types="cpu")
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clean_lo: Tensor,
    clean_hi: Tensor,
    noised_lo: Tensor,
    noised_hi: Tensor,
    clean_offset: int,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, Dh] and log-sum-exp [B, H, Tq]; clean keys begin at ``clean_offset``."""
    ranges = Intervals(clean_lo, clean_hi, noised_lo, noised_hi)
    return _forward(q, k, v, ranges, clean_offset)


@torch.library.custom_op("bd3lm::rust_attention_backward", mutates_args=(), device_types="cpu")
def block_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    clean_lo: Tensor,
    clean_hi: Tensor,
    noised_lo: Tensor,
    noised_hi: Tensor,
    clean_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`block_attention` with respect to q, k and v."""
    ranges = Intervals(clean_lo, clean_hi, noised_lo, noised_hi)
    return _gradients(d_out, q, k, v, out, lse, ranges, clean_offset)


def _gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Intervals,
    clean_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, d_out = (_adjacent(x) for x in (q, k, v, out, d_out.to(q.dtype)))
    lse = lse.contiguous()
    dq, dk, dv = _rows_first(q), _rows_first(k), _rows_first(v)
    ranges, mask_arg = _mask_arg(ranges, clean_offset)
    _core.attention_backward(
        _arg(q),
        _arg(k),
        _arg(v),
        mask_arg,
        _arg(out),
        lse.data_ptr(),
        _arg(d_out),
        _arg(dq),
        _arg(dk),
        _arg(dv),
        _options(q),
    )
    return dq, dk, dv


@block_attention.register_fake
def _(q, *_rest):
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@block_attention_backward.register_fake
def _(d_out, q, k, v, *_rest):
    return _rows_first(q), _rows_first(k), _rows_first(v)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.clean_offset = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, d_out, _d_lse):
    q, k, v, *ranges, out, lse = ctx.saved_tensors
    grads = block_attention_backward(d_out, q, k, v, out, lse, *ranges, ctx.clean_offset)
    return (*grads, *(None,) * 5)


block_attention.register_autograd(_backward, setup_context=_save)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, ranges: Intervals, clean_offset: int
) -> tuple[Tensor, Tensor]:
    q, k, v = _adjacent(q), _adjacent(k), _adjacent(v)
    out = _rows_first(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    ranges, mask_arg = _mask_arg(ranges, clean_offset)
    _core.attention_forward(
        _arg(q), _arg(k), _arg(v), mask_arg, _arg(out), lse.data_ptr(), _options(q)
    )
    return out, lse


def _adjacent(x: Tensor) -> Tensor:
    """``x``, copied only if the elements of a row are not adjacent."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _rows_first(x: Tensor) -> Tensor:
    """Empty [B, H, T, Dh] in the memory layout [B, T, H, Dh] of the projections."""
    batch, heads, rows, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


def _arg(x: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], str]:
    if x.device.type != "cpu":
        raise ValueError(f"device = {x.device}: the kernel reads the CPU's memory")
    return x.data_ptr(), x.shape, x.stride(), _DTYPES[x.dtype]


def _options(q: Tensor) -> tuple[int, str | None, float]:
    return kernel_threads(), _forced_isa, 1.0 / math.sqrt(q.shape[-1])


def _mask_arg(
    ranges: Intervals, clean_offset: int
) -> tuple[Intervals, tuple[tuple[int, ...], int, int]]:
    """Intervals as the kernel reads them, and their description; the caller keeps them alive."""
    for bound in ranges:
        if bound.dtype != torch.int32 or bound.shape != ranges.clean_lo.shape:
            raise ValueError(f"mask = {bound.dtype} {tuple(bound.shape)}: four int32 of one shape")
    ranges = Intervals(*(bound.contiguous() for bound in ranges))
    addresses = tuple(bound.data_ptr() for bound in ranges)
    return ranges, (addresses, ranges.clean_lo.numel(), clean_offset)


_forced_isa: str | None = None


def force_isa(name: str | None) -> None:
    """Force an instruction set of :func:`available_isas`; None: the best one."""
    global _forced_isa
    if name is not None and name not in available_isas():
        raise ValueError(f"isa = {name}: one of {available_isas()} or None")
    _forced_isa = name


def available_isas() -> list[str]:
    """Instruction sets that both this processor and the kernel have, best last."""
    return _core.attention_isas()
