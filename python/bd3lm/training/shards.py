"""Tensors that ranks share: the part of this rank, and the whole.

A whole tensor is its own part, so the same code serves one rank and many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS
from torch.optim._muon import _zeropower_via_newtonschulz as orthogonal


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only: it is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of this rank, detached; it shares the memory."""
    own: Any = tensor.detach()
    return own.to_local() if is_sharded(own) else own


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from its parts; every rank calls this and gets it."""
    if not is_sharded(tensor):
        return tensor.detach()
    from torch.distributed.tensor import DTensor

    own: Any = tensor.detach()
    mesh = own.device_mesh
    part = own.to_local().to(mesh.device_type)  # it may be offloaded
    shape, stride = own.shape, own.stride()
    gathered = DTensor.from_local(
        part, mesh, own.placements, run_check=False, shape=shape, stride=stride
    )
    return gathered.full_tensor()


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy a whole tensor, or its part of this rank, into a tensor."""
    if is_sharded(tensor):
        like: Any = tensor
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                parts = values.chunk(like.device_mesh.size(dim), placement.dim)
                at = like.device_mesh.get_local_rank(dim)
                values = parts[at] if at < len(parts) else values[:0]
    local(tensor).copy_(values)


def shard_group(tensor: Tensor) -> Any:
    """The ranks that share one copy of a tensor, as a process group."""
    like: Any = tensor
    dim = next(i for i, placement in enumerate(like.placements) if placement.is_shard())
    return like.device_mesh.get_group(dim)


def gradient_norms(grads: Sequence[Tensor]) -> Tensor:
    """Norm of each gradient as a whole, [P]."""
    parts = [local(grad) for grad in grads]
    norms = torch.stack(torch._foreach_norm(parts))  # pyright: ignore[reportPrivateImportUsage]
    if not is_sharded(grads[0]):
        return norms
    import torch.distributed as dist

    squares = norms.square()
    dist.all_reduce(squares, group=shard_group(grads[0]))
    return squares.sqrt()


def orthogonalized(updates: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize whole matrices of which this rank holds rows: Muon's Newton-Schulz iteration.

    Matrices of one shape go in groups of as many as there are ranks. Each rank gathers one of
    them, orthogonalizes it, and gives the others their rows: the work is divided, and each matrix
    crosses the network twice, in bfloat16, which is what the iteration computes in.

    Args:
        updates: rows of this rank, [m', n] of each matrix.
        like: the matrices they are of, as DTensors.

    Returns:
        The rows of this rank, bfloat16 [m', n].
    """
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
                some, _one_group([updates[i] for i in some], rows, group), strict=True
            ):
                out[index] = part
    return out


def _one_group(parts: list[Tensor], rows: list[int], group: Any) -> list[Tensor]:
    """Orthogonalize at most one matrix a rank; ``rows`` are those of a matrix on each rank."""
    import torch.distributed as dist

    rank, size, width = group.rank(), group.size(), parts[0].shape[1]
    mine = rows[rank]
    counts = [mine if i < len(parts) else 0 for i in range(size)]
    sent = torch.cat(parts).to(torch.bfloat16).contiguous()
    works = rank < len(parts)
    found = sent.new_empty(sum(rows) if works else 0, width)
    _exchange(found, sent, rows if works else [0] * size, counts, dist, group)
    if works:
        found = orthogonal(found, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
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
