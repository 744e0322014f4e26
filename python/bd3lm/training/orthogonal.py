"""Newton-Schulz iterations of Muon, on matrices that one rank or several hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd3lm.training.shards import is_sharded, shard_group

COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Coefficients of x, x³ and x⁵ a step: steep at zero, and near one for values near one."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7


def newton_schulz(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace the singular values of a matrix by values near one (0.7 to 1.2).

    The algorithm is that of Keller Jordan's Muon, and of :class:`torch.optim.Muon`, which fixes
    bfloat16.

    Args:
        matrix: [m, n].
        dtype: of the iterations and the result.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=SMALLEST_NORM))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def orthogonalized(
    updates: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Orthogonalize whole matrices, of which this rank may hold some rows only.

    Matrices of one shape go in groups of as many as there are ranks. Each rank gathers one of
    them, orthogonalizes it, and gives the others their rows: the work is divided, and each matrix
    crosses the network twice, in the dtype of the iterations.

    Args:
        updates: rows of this rank, [m', n] of each matrix.
        like: the matrices they are of, as DTensors where they are cut into shards.
        dtype: of the iterations.

    Returns:
        The rows of this rank, [m', n], in ``dtype``.
    """
    if not is_sharded(like[0]):
        return [newton_schulz(update, dtype) for update in updates]
    out: list[Tensor] = [torch.empty(0)] * len(updates)
    group = shard_group(like[0])
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(like):
        shapes.setdefault(tuple(matrix.shape), []).append(index)
    size = group.size()
    for shape, indices in shapes.items():
        rows = [len(part) for part in torch.arange(shape[0]).chunk(size)]
        rows += [0] * (size - len(rows))
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            for index, part in zip(
                some, _one_group([updates[i].to(dtype) for i in some], rows, group), strict=True
            ):
                out[index] = part
    return out


def _one_group(parts: list[Tensor], rows: list[int], group: Any) -> list[Tensor]:
    """Orthogonalize at most one matrix a rank; ``rows`` are those of a matrix on each rank."""
    import torch.distributed as dist

    rank, size, width = group.rank(), group.size(), parts[0].shape[1]
    mine = rows[rank]
    counts = [mine if i < len(parts) else 0 for i in range(size)]
    sent = torch.cat(parts).contiguous()
    works = rank < len(parts)
    found = sent.new_empty(sum(rows) if works else 0, width)
    _exchange(found, sent, rows if works else [0] * size, counts, dist, group)
    if works:
        found = newton_schulz(found, found.dtype)
    back = torch.empty_like(sent)
    _exchange(back, found.contiguous(), counts, rows if works else [0] * size, dist, group)
    return list(back.split(mine)) if mine else [back[:0] for _ in parts]


def _exchange(
    out: Tensor, values: Tensor, taken: list[int], given: list[int], dist: Any, group: Any
) -> None:
    """Send rows to every rank and receive theirs; as bytes, which every transport carries."""
    width = values.shape[1] * values.itemsize
    dist.all_to_all_single(
        out.view(torch.uint8).view(-1),
        values.view(torch.uint8).view(-1),
        [n * width for n in taken],
        [n * width for n in given],
        group=group,
    )
