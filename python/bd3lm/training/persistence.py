"""The state of a run on disk: save it, resume it, or start another run from it."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bd3lm.checkpoint import Checkpoint, load_checkpoint
from bd3lm.checkpoint.native import (
    Meta,
    described,
    read_meta,
    restore_system,
    write_checkpoint,
)
from bd3lm.checkpoint.record import Record
from bd3lm.checkpoint.remote import local_copy
from bd3lm.checkpoint.sharded import ShardFiles, write_shards
from bd3lm.checkpoint.steps import BEST, TRAINING
from bd3lm.checkpoint.tensors import TensorFile, check_finite, check_tensors, first_not_finite
from bd3lm.config import ModelConfig
from bd3lm.errors import CheckpointError, DivergedError
from bd3lm.ranks.group import Ranks, lost_ranks
from bd3lm.storage import is_url
from bd3lm.training.adapters import base_tensors, trained_parameters
from bd3lm.training.settings import check_resumed
from bd3lm.training.shards import fill, is_sharded, local, on_host, whole

if TYPE_CHECKING:
    from bd3lm.training.trainer import Trainer

MODEL, OPTIMIZER, AVERAGE = "model/", "optimizer/", "average/"
"""Prefixes of the tensors of the state that a run is resumed from: trained weights, the optimizer's
state, and the average of adapters, whose merged form alone is in ``model.safetensors``."""


def save(trainer: Trainer, *, best: bool = False) -> None:
    """Write a checkpoint of this step; in the background, from a copy of the state on the host.

    Every rank calls this. Rank 0 writes the averaged weights and, where it holds all of it, the
    state to resume from; where ranks share that, each writes its part. A run can be resumed on any
    number of ranks.

    Args:
        trainer: between two steps, with no checkpoint in progress.
        best: let the pointer ``best`` name it.

    Raises:
        DivergedError: a weight or a moment is not finite; nothing is written.
    """
    step, saver = trainer.steps_done, trainer.saver
    ranks = trainer.ranks.for_thread() if saver.background else trainer.ranks
    written: Callable[[], None] = partial(_point, trainer, ranks, step if best else None)
    if saver.saved == step:
        saver.start(step, written)
        return
    averaged, training = trainer.averaged_weights(), _training_tensors(trainer)
    _check_finite(trainer, {"average/" + k: v for k, v in averaged.items()} | training)
    if ranks.size > 1:
        trainer.system.parts.collect(trainer.ranks.sum, first=ranks.first)
    sharded = any(map(is_sharded, training.values()))
    averaged = _gathered(trainer, averaged)
    if saver.background:
        training = on_host(training) if sharded or ranks.first else {}
    numbers = copy.deepcopy(_numbers(trainer))

    def write() -> None:
        with lost_ranks(), ExitStack() as opened:
            folder = ranks.by_first(lambda: opened.enter_context(trainer.checkpoints.new(step)))
            shards = _write_parts(ranks, folder, training) if sharded else None
            ranks.by_first(trainer.metrics.sync)
            ranks.by_first(
                lambda: write_checkpoint(
                    folder,
                    trainer.cfg,
                    trainer.tokenizer,
                    step=step,
                    averaged=averaged,
                    training=None if sharded else training,
                    state=numbers,
                    data=trainer.data_digests,
                    shards=shards,
                )
            )
            ranks.by_first(opened.close)  # the folder gets its name
        written()

    saver.start(step, write)


def _point(trainer: Trainer, ranks: Ranks, best: int | None) -> None:
    """Let ``best`` name the folder of a step, and upload what is new."""
    if best is not None:
        ranks.by_first(lambda: trainer.checkpoints.point(BEST, best))
    if trainer.mirror is not None:
        trainer.mirror.update()


def _write_parts(ranks: Ranks, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write the part of each rank; returns size and digest of every file, by name."""
    ranks.by_first((folder / TRAINING).mkdir)
    names = write_shards(folder / TRAINING, tensors, ranks.group)
    own = ranks.every(lambda: {f"{TRAINING}/{n}": described(folder / TRAINING / n) for n in names})
    return {name: facts for part in ranks.gather(own) for name, facts in part.items()}


def _gathered(trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors one at a time; rank 0, which writes them, keeps them on the host."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if trainer.ranks.first:
            copied = trainer.saver.background and not is_sharded(tensor)
            found[name] = gathered.to("cpu", copy=copied)
    return found


def resume(trainer: Trainer) -> None:
    """Continue from the run's last checkpoint; on the CPU, bit for bit.

    Raises:
        CheckpointError: there is none, it is damaged, or does not fit this run or its data.
        ConfigError: the run has other settings now.
    """
    step = trainer.ranks.every(lambda: _read(trainer))
    trainer.steps_done = trainer.saver.saved = trainer.saver.begun = step

    def tidy() -> None:
        trainer.checkpoints.prune(step)
        # The last validation of a run is made again where the run did not end.
        trainer.metrics.rewind(step, validated=step < trainer.cfg.steps)

    trainer.ranks.by_first(tidy)


def _read(trainer: Trainer) -> int:
    """Read the last checkpoint into the trainer; returns its step."""
    folder = trainer.checkpoints.latest()
    if folder is None:
        raise CheckpointError(f"{trainer.checkpoint} holds no checkpoint yet")
    meta = read_meta(folder)
    check_resumed(trainer.cfg, meta.config, trainer.out)
    _check_data(trainer, meta)
    training, averaged = meta.training(trainer.ranks.mine), meta.tensors("model.safetensors")
    state = _training_tensors(trainer)
    check_tensors(training.tensors, state, training.file)
    check_tensors(averaged.tensors, trainer.averaged_weights(), averaged.file)
    _load_numbers(trainer, meta)
    _fill(training, state)
    if trainer.cfg.lora.rank:
        _load_frozen(trainer, averaged)
    else:
        _fill(averaged, trainer.ema.weights)
    return meta.step


def _fill(opened: TensorFile | ShardFiles, targets: Mapping[str, Tensor]) -> None:
    """Copy tensors of a checkpoint, or the parts of this rank, into those of the trainer.

    Raises:
        CheckpointError: a file cannot be read, or a tensor holds NaN or infinity.
    """
    if isinstance(opened, ShardFiles):
        opened.fill(targets)
        check_finite({name: local(tensor) for name, tensor in targets.items()}, opened.file)
        return
    for name, tensor in opened.parts():
        if name in targets:
            fill(targets[name], tensor)


def _load_frozen(trainer: Trainer, averaged: TensorFile) -> None:
    """Load the weights below the adapters, from the checkpoint that the run began with.

    Args:
        trainer: with its adapters and their average.
        averaged: the merged weights of the run's own checkpoint.

    Raises:
        CheckpointError: that checkpoint is not there any more, or has other weights now.
    """
    source = str(trainer.cfg.init_from)
    _load_weights(trainer, source)
    merged = trainer.averaged_weights()
    for name, tensor in averaged.parts():
        if not torch.equal(merged[name].cpu(), tensor.cpu()):
            own = shlex.quote(str(averaged.file.parent))
            raise CheckpointError(
                f"init-from = {source}: its {name} is not the one that this run began with; "
                f"restore it, or begin another run with --init-from {own}"
            )


def _load_weights(trainer: Trainer, source: str) -> Checkpoint:
    """Load the averaged weights of another run, below the adapters if there are any."""
    path = local_copy(source, training=trainer.cfg.init_optimizer) if is_url(source) else source
    loaded = load_checkpoint(path, tokenizer=trainer.tokenizer)
    _check_same_function(trainer.cfg.model, loaded.config.model, source)
    weights = loaded.model.state_dict()
    check_tensors(weights, base_tensors(trainer.model.state_dict()), source)
    for name, parameter in base_tensors(dict(trainer.model.named_parameters())).items():
        fill(parameter, weights[name])
    return loaded


def start_from(trainer: Trainer, source: str) -> None:
    """Begin with the averaged weights of another run.

    With ``init_optimizer`` its optimizer's state is loaded too. The learning-rate schedule, the
    data order and the average begin anew.

    Raises:
        CheckpointError: a model of another kind, shape or vocabulary, or another optimizer.
    """
    loaded = _load_weights(trainer, source)
    for name, parameter in trained_parameters(trainer.model).items():
        local(trainer.ema.weights[name]).copy_(local(parameter))
    if trainer.cfg.init_optimizer:
        opened = read_meta(loaded.path).training()
        found, needed = _part(opened.tensors, OPTIMIZER), trainer.optimizers.state()
        if found.keys() != needed.keys():
            raise CheckpointError(
                f"{opened.file} holds another optimizer's state; keep optim.optimizer = "
                f"{loaded.config.optim.optimizer}, or leave init-optimizer out"
            )
        check_tensors(found, needed, opened.file)
        _fill(opened, {OPTIMIZER + name: tensor for name, tensor in needed.items()})


# --- tensors and numbers ------------------------------------------------------------------------


def _training_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Raw weights and optimizer state by the names they have on disk."""
    raw = {MODEL + k: p.detach() for k, p in trained_parameters(trainer.model).items()}
    if trainer.cfg.lora.rank:
        raw |= {AVERAGE + k: v for k, v in trainer.ema.weights.items()}
    return raw | {OPTIMIZER + k: v for k, v in trainer.optimizers.state().items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _numbers(trainer: Trainer) -> dict[str, Any]:
    return {
        "seconds": trainer.seconds,
        "ema_updates": trainer.ema.updates,
        "window": trainer.guard.state(),
        "last": trainer.last,
        "best": trainer.best,
        "system": trainer.system.state(),
        "parts": trainer.system.parts.state(),
    }


def _load_numbers(trainer: Trainer, meta: Meta) -> None:
    """Restore :func:`_numbers`.

    Raises:
        CheckpointError: a field is missing, of another type or out of range.
    """
    state = meta.state
    trainer.seconds = state.number("seconds")
    trainer.ema.updates = state.integer("ema_updates")
    if isinstance(state.values.get("window"), list):  # version 1: the sum and its steps
        loss, steps = [*state.values["window"], None, None][:2]
        fresh = {"loss": loss, "steps": steps, "counts": [0] * 3, "starts": [-1] * 4}
        trainer.guard.load_state(Record(fresh, f"{state.source}: window"))
    else:
        trainer.guard.load_state(state.record("window"))
    last = state.record("last")
    trainer.last = {name: last.floating(name) for name in last.values}
    best = state.values.get("best")
    trainer.best = None if best is None else state.floating("best")
    state.record("system")
    restore_system(trainer.system, meta.learned, state.source)
    if "parts" in state.values:  # older checkpoints have none
        parts = state.record("parts")
        sums = {name: parts.floats(name, 2) for name in parts.values}
        if not trainer.ranks.first:
            sums = {name: [0.0, 0.0] for name in sums}
        trainer.system.parts.load_state(sums)


def _check_finite(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    own = first_not_finite((name, local(tensor)) for name, tensor in tensors.items())
    name = next((found for found in trainer.ranks.gather(own) if found is not None), None)
    if name is None:
        try:
            json.dumps(trainer.system.state(), allow_nan=False)
        except ValueError:
            name = "the learned noise"
    if name is not None:
        raise DivergedError(
            f"after step {trainer.steps_done}, {name} holds NaN or infinity and is not saved; "
            f"lower optim.lr or optim.matrix-lr. {trainer.last_saved()}"
        )


# --- data ---------------------------------------------------------------------------------------


def _check_data(trainer: Trainer, meta: Meta) -> None:
    """Refuse to resume on other data.

    Raises:
        CheckpointError: names the split.
    """
    for split, mine in trainer.data_digests.items():
        theirs = meta.data.get(split)
        if theirs is not None and theirs != mine:
            data = trainer.train if split == "train" else trainer.valid
            raise CheckpointError(
                f"{data.place} is not the data that this run was trained on (its digest differs); "
                f"restore it, or begin another run with --init-from {shlex.quote(str(meta.path))}"
            )


def _check_same_function(wanted: ModelConfig, found: ModelConfig, source: str) -> None:
    """Refuse weights that would fit and mean something else: heads, norms, rotations.

    Shapes are checked tensor by tensor where the weights are assigned. Time conditioning may be
    added or removed, and dropout is no part of the function.

    Raises:
        CheckpointError: names the setting.
    """
    names = ("heads", "mlp", "norm", "norm_eps", "embed_norm", "rope_theta", "tied_embeddings")
    for name in (*names, "rope_scaling", "nope_layers", "softmax_cutoffs", "previous_tokens"):
        mine, theirs = getattr(wanted, name), getattr(found, name)
        if mine != theirs:
            raise CheckpointError(
                f"init-from = {source}: was trained with model.{name.replace('_', '-')} = "
                f"{theirs}; this model has {mine}"
            )
