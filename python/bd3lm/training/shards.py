"""Tensors that ranks share: the part of this rank, and the whole.

A whole tensor is its own part, so the same code serves one rank and many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of the tensor only: it is a DTensor."""
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


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the host; of those that ranks share, the part of this rank."""
    copies = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items() if not is_sharded(t)}
    if len(copies) < len(tensors):
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        copies |= BlockingAsyncStager().stage({n: t for n, t in tensors.items() if is_sharded(t)})
    return copies


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
