"""Cross-entropy of logits and its gradient on an NVIDIA GPU: one Triton kernel, one program a row.

Composed of PyTorch's operations the same takes about ten passes over the logits, most of them in
float32; here it is two reads and one write in the logits' own dtype.
"""

# Triton's language is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803  (Triton gives arguments their types; capitals are pointers)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bd3lm.model.attention.triton.common import cast
from bd3lm.model.attention.triton.launch import INTERPRETED, on_device_of_first

BLOCK, WARPS = (32, 4) if INTERPRETED else (4096, 8)
"""Logits that a program holds at once."""


@triton.jit
def online(x, peak, total):
    """Running maximum and sum of exponentials relative to it, with one more block of logits."""
    new = tl.maximum(peak, tl.max(x, 0))
    return new, total * tl.exp(peak - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit(do_not_specialize=("vocab", "mask_id"))
def cross_entropy_kernel(
    LOGITS, TARGET, WEIGHT, NLL, vocab, mask_id, stride,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """NLL of one row; with ``GRADIENT`` its logits become weight·(softmax − one-hot).

    LOGITS is [R, V] with rows ``stride`` apart, TARGET int64 [R], WEIGHT and NLL float32 [R].
    """
    row = tl.program_id(0).to(tl.int64)
    base = LOGITS + row * stride
    target = tl.load(TARGET + row)
    goal = tl.load(base + target).to(tl.float32)
    col = tl.arange(0, BLOCK)
    peak = goal  # finite, so that no difference is that of two infinities
    total = goal * 0.0
    full = vocab // BLOCK * BLOCK
    # The whole blocks without a mask, which would keep loads from being wide.
    for start in range(0, full, BLOCK):
        x = tl.load(base + start + col).to(tl.float32)
        peak, total = online(tl.where(start + col == mask_id, float("-inf"), x), peak, total)
    if full < vocab:
        x = tl.load(base + full + col, mask=full + col < vocab, other=float("-inf")).to(tl.float32)
        peak, total = online(tl.where(full + col == mask_id, float("-inf"), x), peak, total)
    lse = peak + tl.log(total)
    tl.store(NLL + row, lse - goal)
    if GRADIENT:
        weight = tl.load(WEIGHT + row)
        dtype: tl.constexpr = LOGITS.dtype.element_ty
        for start in range(0, full, BLOCK):
            x = tl.load(base + start + col).to(tl.float32)
            p = tl.where(start + col == mask_id, 0.0, tl.exp(x - lse))
            d = weight * tl.where(start + col == target, p - 1.0, p)
            tl.store(base + start + col, cast(d, dtype, INTERPRET))
        if full < vocab:
            x = tl.load(base + full + col, mask=full + col < vocab, other=float("-inf")).to(
                tl.float32
            )
            p = tl.where(full + col == mask_id, 0.0, tl.exp(x - lse))
            d = weight * tl.where(full + col == target, p - 1.0, p)
            tl.store(base + full + col, cast(d, dtype, INTERPRET), mask=full + col < vocab)


@on_device_of_first
def run_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, mask_id: int | None
) -> Tensor:
    """Nats of every row, float32 [R]; with a weight the logits become their gradient.

    Args:
        logits: [R, V], rows contiguous.
        target: true ids, int64 [R], never ``mask_id``.
        weight: float32 [R], or None where no gradient is wanted.
        mask_id: the id whose probability is zero; None: there is none.
    """
    rows, vocab = logits.shape
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        cross_entropy_kernel[(rows,)](
            logits, target.contiguous(), nll if weight is None else weight.contiguous(), nll,
            vocab, -1 if mask_id is None else mask_id, logits.stride(0),
            BLOCK=BLOCK, GRADIENT=weight is not None, INTERPRET=INTERPRETED, num_warps=WARPS,
        )  # fmt: skip
    return nll
