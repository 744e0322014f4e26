"""The state of a run on disk: save it, resume it, or start another run from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import assign_weights, read_meta, read_tensors, save_checkpoint
from bd3lm.config import ModelConfig
from bd3lm.errors import CheckpointError

if TYPE_CHECKING:
    from bd3lm.training.trainer import Trainer


def save(trainer: Trainer) -> None:
    """Write the checkpoint in place of the previous one."""
    training = {f"model/{k}": p.detach() for k, p in trainer.model.named_parameters()}
    training |= {f"optimizer/{k}": v for k, v in trainer.optimizers.state().items()}
    state: dict[str, Any] = {
        "seconds": trainer.seconds,
        "ema_updates": trainer.ema.updates,
        "window": [trainer.loss_sum.item(), trainer.loss_steps],
        "last": trainer.last,
        "system": trainer.system.state(),
    }
    save_checkpoint(
        trainer.checkpoint,
        trainer.cfg,
        trainer.tokenizer,
        step=trainer.steps_done,
        averaged=trainer.ema.weights,
        training=training,
        state=state,
    )


def start_from(trainer: Trainer, path: Path) -> None:
    """Begin with the averaged weights of another run (and its optimizer's state, if asked).

    The learning-rate schedule, the data order and the average begin anew.

    Raises:
        CheckpointError: a model of another kind, shape or vocabulary, or another optimizer.
    """
    loaded = load_checkpoint(path, tokenizer=trainer.tokenizer)
    _check_same_function(trainer.cfg.model, loaded.config.model, path)
    assign_weights(trainer.model, loaded.model.state_dict(), path)
    if trainer.cfg.init_optimizer:
        state = _training_state(path)["optimizer"]
        trainer.optimizers.load(state, path)
    for name, parameter in trainer.model.named_parameters():
        trainer.ema.weights[name].copy_(parameter.detach())


def resume(trainer: Trainer) -> None:
    """Continue from the run's checkpoint; on the CPU, bit for bit.

    Raises:
        CheckpointError: the checkpoint does not fit this run.
    """
    meta = read_meta(trainer.checkpoint)
    file = trainer.checkpoint / "training.safetensors"
    parts = _training_state(trainer.checkpoint)
    if trainer.cfg.model.tied_embeddings:
        parts["model"]["head.weight"] = parts["model"]["embed.weight"]
    assign_weights(trainer.model, parts["model"], file)
    trainer.optimizers.load(parts["optimizer"], file)
    averaged = read_tensors(trainer.checkpoint / "model.safetensors")
    for name, tensor in trainer.ema.weights.items():
        tensor.copy_(averaged[name])
    state = meta["state"]
    trainer.steps_done = int(meta["step"])
    trainer.seconds = state["seconds"]
    trainer.ema.updates = state["ema_updates"]
    trainer.loss_sum.fill_(state["window"][0])
    trainer.loss_steps = state["window"][1]
    trainer.last = state["last"]
    trainer.system.load_state(state["system"])
    trainer.metrics.forget_after(trainer.steps_done)


def _training_state(path: Path) -> dict[str, dict[str, Tensor]]:
    """Raw weights (``model``) and optimizer tensors (``optimizer``) of a checkpoint."""
    file = path / "training.safetensors"
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in read_tensors(file).items():
        kind, rest = name.split("/", 1)
        if kind not in parts:
            raise CheckpointError(f"{file} holds an unknown tensor {name}")
        parts[kind][rest] = tensor
    return parts


def _check_same_function(wanted: ModelConfig, found: ModelConfig, path: Path) -> None:
    """Refuse weights that would fit and mean something else: heads, norms, rotations.

    Shapes are checked tensor by tensor where the weights are assigned. A model may begin to be
    told the noise level, or stop; and dropout is no part of the function.

    Raises:
        CheckpointError: names the setting.
    """
    for name in ("heads", "mlp", "norm", "norm_eps", "rope_theta", "tied_embeddings"):
        mine, theirs = getattr(wanted, name), getattr(found, name)
        if mine != theirs:
            raise CheckpointError(
                f"init-from = {path}: was trained with model.{name.replace('_', '-')} = {theirs}; "
                f"this model has {mine}"
            )
