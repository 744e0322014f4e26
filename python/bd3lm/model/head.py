"""Output head and loss in one pass over chunks: logits of all positions never exist."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bd3lm.model.cross_entropy import LossInputs, cross_entropy_
from bd3lm.model.fused import add_to, compute_dtype

CHUNK_BYTES = 64 << 20
"""Most memory for the logits of one chunk on the CPU."""
CHUNK_ROWS = 512
"""Most positions in a chunk on the CPU: more are not faster. 320 are slower by a tenth than 256."""
CUDA_CHUNK_BYTES = 512 << 20
"""Most memory for the logits of one chunk on a GPU."""
CUDA_CHUNK_ROWS = 4096
"""Most positions in a chunk on a GPU: larger products are faster there, and each chunk reads and
writes the gradient of the whole head."""
ALIGNED = 64
"""Stride of the logits' rows on a GPU is a multiple of this. Matrix products and wide loads need
rows that are aligned to 16 bytes; few vocabularies are a multiple of 8."""
TILE_ROWS = 64
"""Products of ragged numbers of rows are slower, by a fifth for some."""
SLICE = 8192
"""Rows of the head's gradient that the CPU forms at once and adds while they are in its cache."""


class HeadInputs(NamedTuple):
    """The output head, M features and the targets of the loss between them."""

    features: Tensor
    """Normalised features [M, D]."""
    head: Tensor
    """Output matrix [V, D]."""
    bias: Tensor | None
    """Output bias [V], or None."""
    target: Tensor
    """True ids, int64 [M], never ``mask_id``."""
    weight: Tensor
    """Loss weight of each position, float32 [M]."""
    mask_id: int | None
    """Id of the mask token; None where it is not among these V."""


Kernel = Callable[[LossInputs], Tensor]
"""Loss of each row of logits, float32 [R], in nats; overwrites the logits."""


class _ChunkedLoss(torch.autograd.Function):
    """Σ weight·value with its gradients formed chunk by chunk in the forward pass.

    The loss is linear in the incoming gradient (a scalar), so the backward pass only scales them.
    Peak memory is one chunk of logits and the gradients themselves.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *fields: Any) -> tuple[Tensor, Tensor]:
        inputs = HeadInputs(*fields)  # autograd sees tensors only as arguments of their own
        features, head, bias = inputs[:3]
        grads = _Gradients(
            torch.empty_like(features),
            _room_for(head, features) if ctx.needs_input_grad[2] else None,
            None if bias is None else torch.zeros_like(bias),
        )
        values = _in_chunks(inputs, kernel, grads)
        ctx.grads = grads
        ctx.mark_non_differentiable(values)
        return (values * inputs.weight).sum(), values

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place, so there is one pass and no copy
        if grads is None:
            raise RuntimeError("the gradient of this loss was already taken, and is not kept")
        scaled = (None if grad is None else grad.mul_(upstream[0]) for grad in grads)
        return (None, *scaled, None, None, None)


class _Gradients(NamedTuple):
    """Gradients of Σ weight·value, filled chunk by chunk."""

    features: Tensor
    head: Tensor | None
    bias: Tensor | None


def _room_for(head: Tensor, features: Tensor) -> Tensor:
    return torch.empty_like(head) if len(features) else torch.zeros_like(head)


def _in_chunks(inputs: HeadInputs, kernel: Kernel, grads: _Gradients | None) -> Tensor:
    """Value of each position, float32 [M]; fills ``grads`` where they are wanted."""
    features, head, bias, target, weight, mask_id = inputs
    dtype = compute_dtype(features)
    matrix = head.to(dtype)
    # On the CPU the kernel adds the bias on its way; elsewhere the product does.
    later = features.device.type == "cpu"
    offset = None if bias is None or later else bias.to(dtype)
    left = bias if later else None
    values = torch.empty(features.shape[0], dtype=torch.float32, device=features.device)
    # Two buffers for all chunks: fresh ones of this size would come from the system each time.
    rows = min(_chunk_rows(matrix), max(len(features), 1))
    room = _room(matrix, rows)
    slices = min(SLICE, len(matrix)) if later else len(matrix)
    trained = grads is not None and grads.head is not None
    product = _product_room(matrix, slices) if trained else None
    for start in range(0, features.shape[0], rows):
        part = slice(start, start + rows)
        x = features[part].to(dtype)
        logits = room[: len(x)]
        if offset is None:
            torch.mm(x, matrix.T, out=logits)
        else:
            torch.addmm(offset, x, matrix.T, out=logits)
        if grads is None:
            values[part] = kernel(LossInputs(logits, left, target[part], None, mask_id, None))
            continue
        scale = weight[part].float()
        chunk = LossInputs(logits, left, target[part], scale, mask_id, grads.bias)
        values[part] = kernel(chunk)
        # The logits have become their own gradient.
        grads.features[part] = logits @ matrix
        if product is None or grads.head is None:
            continue  # the head is frozen
        for at in range(0, len(matrix), slices):
            total, d = grads.head[at : at + slices], logits[:, at : at + slices]
            _add_product(total, d, x, product[: len(total)], first=start == 0)
    return values


def _room(matrix: Tensor, rows: int) -> Tensor:
    """Uninitialised logits [rows, V]."""
    vocab = len(matrix)
    if not matrix.is_cuda:
        return matrix.new_empty(rows, vocab)
    return matrix.new_empty(rows, -(-vocab // ALIGNED) * ALIGNED)[:, :vocab]


def _product_room(matrix: Tensor, rows: int) -> Tensor:
    """Uninitialised product [rows, D], float32 on a GPU."""
    dtype = torch.float32 if matrix.is_cuda else matrix.dtype
    return torch.empty_like(matrix[:rows], dtype=dtype)


def _add_product(total: Tensor, d: Tensor, x: Tensor, product: Tensor, *, first: bool) -> None:
    """Add dᵀ x to ``total``, or store it if it is the first; float32 sums over rows on a GPU."""
    if not d.is_cuda:
        add_to(total, torch.mm(d.T, x, out=product), first=first)
    elif d.dtype == torch.float32 or total.dtype != torch.float32:
        add_to(total, d.T @ x, first=first)
    elif first:
        torch.mm(d.T, x, out_dtype=torch.float32, out=total)
    else:
        total.add_(torch.mm(d.T, x, out_dtype=torch.float32, out=product))


def _chunk_rows(matrix: Tensor) -> int:
    """Rows of logits in a chunk: a power of two of full tiles, where there are some."""
    most, room = CHUNK_ROWS, CHUNK_BYTES
    if matrix.is_cuda:
        most, room = CUDA_CHUNK_ROWS, CUDA_CHUNK_BYTES
    rows = min(most, max(1, room // (matrix.itemsize * matrix.shape[0])))
    return 1 << rows.bit_length() - 1 if rows >= TILE_ROWS else rows


def whole_tiles(select: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pad positions and weights [M] to a multiple of the tile size, with weight 0.

    PyTorch's CPU matrix products cache one compiled kernel per number of rows. Without padding,
    every step of the tiny model would add 6 MB, because each masks another number of tokens.

    Returns:
        ``(select, weight)``, int64 and float32 [M rounded up].
    """
    more = -len(select) % TILE_ROWS
    if not more:
        return select, weight
    padded = torch.cat([select, select[-1:].expand(more)])
    return padded, torch.cat([weight, weight.new_zeros(more)])


def head_cross_entropy(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of the head at M positions, without the mask token (docs/math.md §5).

    Args:
        inputs: features, head and targets.

    Returns:
        ``(sum, nll)``: Σ weight·CE in nats, differentiable; and the unweighted CE of each
        position, float32 [M], not differentiable. Logits are formed in the autocast dtype where
        autocast is on, in the features' dtype otherwise; the softmax is float32.
    """
    return _head_loss(inputs, cross_entropy_)


def head_score_entropy(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    """Weighted score entropy of the head at M positions, in its finite form (docs/math.md §5).

    Arguments and results as of :func:`head_cross_entropy`; see :func:`score_entropy_`.
    """
    return _head_loss(inputs, score_entropy_)


def score_entropy_(inputs: LossInputs) -> Tensor:
    """Σ_{y≠mask} e^{raw_y}/(V-1) - raw_{x0} + log(V-1) - 1, in nats; overwrites the logits.

    At least the cross-entropy of the normalised scores, and equal to it where they sum to one:
    x - 1 >= log x.

    Args:
        inputs: logits are the network's raw output, the mask token's included and not read. With
            a weight they are replaced by weight·(e^{raw}/(V-1) - one-hot).

    Returns:
        float32 [R].
    """
    logits, bias, target, weight, mask_id, d_bias = inputs
    others = math.log(logits.shape[1] - 1)
    goal = target[:, None]
    raw = logits.float() - others
    if bias is not None:
        raw += bias
    raw_target = raw.gather(1, goal).squeeze(1)
    scores = raw.exp_()
    scores[:, mask_id] = 0.0
    values = scores.sum(dim=1) - raw_target - 1.0
    if weight is not None:
        scores.mul_(weight[:, None]).scatter_add_(1, goal, -weight[:, None])
        logits.copy_(scores)
        if d_bias is not None:
            d_bias.add_(logits.sum(0))
    return values


def _head_loss(inputs: HeadInputs, kernel: Kernel) -> tuple[Tensor, Tensor]:
    learns = any(x is not None and x.requires_grad for x in inputs[:3])
    if torch.is_grad_enabled() and learns:
        return _ChunkedLoss.apply(kernel, *inputs)
    values = _in_chunks(inputs, kernel, None)
    return (values * inputs.weight).sum(), values
