"""The model of a training step as the ranks share it: DDP or FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bd3lm.checkpoint.tensors import empty_model, fill
from bd3lm.config import TrainConfig, check
from bd3lm.data import Batch
from bd3lm.device import compute_dtype
from bd3lm.model import Transformer
from bd3lm.ranks.group import Ranks
from bd3lm.systems import System


class Loss(nn.Module):
    """The loss of a batch as a module, which DDP and FSDP wrap.

    Args:
        system: computes it.
        model: the network.
    """

    def __init__(self, system: System, model: Transformer) -> None:
        super().__init__()
        self.system, self.model = system, model

    def forward(self, batch: Batch) -> Tensor:
        """Sum of weight·nats over the rows of this rank."""
        return self.system.loss(self.model, batch)


def micro_batches(cfg: TrainConfig, ranks: int) -> int:
    """Number of forwards of a rank in one step.

    Raises:
        ConfigError: fewer rows than ranks and forwards.
    """
    rows = min(cfg.micro_batch or cfg.batch_size, cfg.batch_size)
    parts = -(-cfg.batch_size // (rows * ranks))
    check(
        cfg.batch_size >= parts * ranks,
        "batch-size",
        cfg.batch_size,
        f"at least {parts * ranks}, one row for each of {ranks} ranks in each of {parts} forwards",
    )
    return parts


def is_fsdp(cfg: TrainConfig) -> bool:
    """Return whether several ranks share one copy of the model."""
    return cfg.parallel.strategy == "fsdp"


def check_ranks(cfg: TrainConfig, ranks: Ranks) -> None:
    """Check the settings against the number of ranks.

    Raises:
        ConfigError: a setting that this number of ranks does not allow.
    """
    micro_batches(cfg, ranks.size)
    replicas = cfg.parallel.replicas
    check(
        ranks.size == 1 or ranks.size % replicas == 0,
        "parallel.replicas",
        replicas,
        f"a divisor of the number of ranks, {ranks.size}",
    )


def shared(loss: Loss, cfg: TrainConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """Wrap the loss so that gradients are exchanged; one rank gets it as it is.

    Args:
        loss: with the model on the CPU.
        cfg: the run.
        ranks: the job.
        device: of this rank.
    """
    if ranks.size == 1:
        return loss.to(device)
    if is_fsdp(cfg):
        return _fully_sharded(loss, cfg, ranks, device)
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(
        loss.to(device),
        device_ids=None if device.type == "cpu" else [device],
        gradient_as_bucket_view=True,
    )


def _fully_sharded(loss: Loss, cfg: TrainConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """Shard every block for itself, and the rest of the model together.

    Blocks are gathered in the dtype of their matrix products, the rest in float32, as autocast
    would use them; gradients are added in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    replicas = cfg.parallel.replicas
    shape = (replicas, ranks.size // replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))
    options: dict[str, Any] = {"mesh": mesh["shard"] if replicas == 1 else mesh}
    if cfg.parallel.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    dtype = compute_dtype(cfg, device)
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    last = loss.model.blocks[-1]  # whose backward pass comes right after its forward
    for block in loss.model.blocks:
        fully_shard(block, mp_policy=policy, reshard_after_forward=block is not last, **options)
    fully_shard(loss, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    if not cfg.parallel.offload:
        loss.to(device)  # buffers, and nothing else
    return loss


def synchronized(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients at the last micro-batch alone, where that saves anything.

    FSDP adds those of every micro-batch inside a copy of the model: until then each rank would
    hold whole gradients, the memory that it is there to save. Copies exchange theirs at the last.
    """
    copies: Any = getattr(module, "set_requires_all_reduce", None)
    if copies is not None:
        copies(last)
    skip: Any = getattr(module, "no_sync", None)
    return nullcontext() if last or skip is None else skip()


def whole_model(
    model: Transformer, weights: dict[str, Tensor], device: torch.device
) -> Transformer:
    """Make a model of its own of whole weights, for forwards without training."""
    made = fill(empty_model(model.cfg, model.vocab_size), weights, device)
    return made.use_attention(str(model.blocks[0].attention)).eval()
