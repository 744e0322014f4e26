"""The state of a run on disk: save it, resume it, or start another run from it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bd3lm.checkpoint import Checkpoint, load_checkpoint
from bd3lm.checkpoint.native import Meta, read_meta, restore_system, write_checkpoint
from bd3lm.checkpoint.record import Record
from bd3lm.checkpoint.steps import BEST
from bd3lm.checkpoint.tensors import TensorFile, check_tensors, first_not_finite
from bd3lm.config import ModelConfig
from bd3lm.data import Dataset
from bd3lm.errors import CheckpointError, CorruptError, DivergedError
from bd3lm.training.adapters import base_tensors, trained_parameters
from bd3lm.training.settings import check_resumed
from bd3lm.training.shards import fill, is_sharded, local, whole

if TYPE_CHECKING:
    from bd3lm.training.trainer import Trainer

MODEL, OPTIMIZER, AVERAGE = "model/", "optimizer/", "average/"
"""Prefixes of the tensors in ``training.safetensors``: trained weights, the optimizer's state, and
the average of adapters, whose merged form alone is in ``model.safetensors``."""


def save(trainer: Trainer, *, best: bool = False) -> None:
    """Write a checkpoint of this step, unless it is the last one already.

    Every rank calls this; rank 0 writes. The files are those that one rank would write, so a run
    can be resumed on any number of ranks.

    Args:
        trainer: between two steps.
        best: let the pointer ``best`` name it.

    Raises:
        DivergedError: a weight or a moment is not finite; nothing is written.
        DiskFullError: no space left; the older checkpoints stay.
        StorageError: any other refusal of the system.
    """
    step = trainer.steps_done
    if trainer.saved_step != step:
        averaged, training = trainer.averaged_weights(), _training_tensors(trainer)
        _check_finite(trainer, {"average/" + k: v for k, v in averaged.items()} | training)
        averaged, training = _gathered(trainer, averaged), _gathered(trainer, training)
        if trainer.ranks.size > 1:
            trainer.system.parts.collect(trainer.ranks.sum, first=trainer.ranks.first)
        trainer.ranks.by_first(lambda: _write(trainer, averaged, training))
        trainer.saved_step = step
    if best:
        trainer.ranks.by_first(lambda: trainer.checkpoints.point(BEST, step))


def _write(trainer: Trainer, averaged: dict[str, Tensor], training: dict[str, Tensor]) -> None:
    """Write the checkpoint of this step."""
    trainer.metrics.sync()
    with trainer.checkpoints.new(trainer.steps_done) as folder:
        write_checkpoint(
            folder,
            trainer.cfg,
            trainer.tokenizer,
            step=trainer.steps_done,
            averaged=averaged,
            training=training,
            state=_numbers(trainer),
            data=trainer.data_digests,
        )


def _gathered(trainer: Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather shards one tensor at a time; rank 0, which writes them, keeps them on the host."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            found[name] = tensor
            continue
        gathered = whole(tensor)
        if trainer.ranks.first:
            found[name] = gathered.cpu()
    return found


def resume(trainer: Trainer) -> None:
    """Continue from the run's last checkpoint; on the CPU, bit for bit.

    Raises:
        CheckpointError: there is none, it is damaged, or does not fit this run or its data.
        ConfigError: the run has other settings now.
    """
    step = trainer.ranks.every(lambda: _read(trainer))
    trainer.steps_done = trainer.saved_step = step

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
    training, averaged = meta.tensors("training.safetensors"), meta.tensors("model.safetensors")
    state = _training_tensors(trainer)
    check_tensors(training.tensors, state, training.file)
    check_tensors(averaged.tensors, trainer.averaged_weights(), averaged.file)
    _load_numbers(trainer, meta)
    for name, tensor in training.parts():
        fill(state[name], tensor)
    if trainer.cfg.lora.rank:
        _load_frozen(trainer, averaged)
        return meta.step
    for name, tensor in averaged.parts():
        fill(trainer.ema.weights[name], tensor)
    return meta.step


def _load_frozen(trainer: Trainer, averaged: TensorFile) -> None:
    """Load the weights below the adapters, from the checkpoint that the run began with.

    Args:
        trainer: with its adapters and their average.
        averaged: the merged weights of the run's own checkpoint.

    Raises:
        CheckpointError: that checkpoint is not there any more, or has other weights now.
    """
    path = Path(str(trainer.cfg.init_from))
    _load_weights(trainer, path)
    merged = trainer.averaged_weights()
    for name, tensor in averaged.parts():
        if not torch.equal(merged[name].cpu(), tensor.cpu()):
            own = shlex.quote(str(averaged.file.parent))
            raise CheckpointError(
                f"init-from = {path}: its {name} is not the one that this run began with; restore "
                f"it, or begin another run with --init-from {own}"
            )


def _load_weights(trainer: Trainer, path: Path) -> Checkpoint:
    """Load the averaged weights of another run, below the adapters if there are any."""
    loaded = load_checkpoint(path, tokenizer=trainer.tokenizer)
    _check_same_function(trainer.cfg.model, loaded.config.model, path)
    weights = loaded.model.state_dict()
    check_tensors(weights, base_tensors(trainer.model.state_dict()), path)
    for name, parameter in base_tensors(dict(trainer.model.named_parameters())).items():
        fill(parameter, weights[name])
    return loaded


def start_from(trainer: Trainer, path: Path) -> None:
    """Begin with the averaged weights of another run.

    With ``init_optimizer`` its optimizer's state is loaded too. The learning-rate schedule, the
    data order and the average begin anew.

    Raises:
        CheckpointError: a model of another kind, shape or vocabulary, or another optimizer.
    """
    loaded = _load_weights(trainer, path)
    for name, parameter in trained_parameters(trainer.model).items():
        fill(trainer.ema.weights[name], parameter.detach())
    if trainer.cfg.init_optimizer:
        opened = read_meta(loaded.path).tensors("training.safetensors")
        found, needed = _part(opened.tensors, OPTIMIZER), trainer.optimizers.state()
        if found.keys() != needed.keys():
            raise CheckpointError(
                f"{opened.file} holds another optimizer's state; keep optim.optimizer = "
                f"{loaded.config.optim.optimizer}, or leave init-optimizer out"
            )
        check_tensors(found, needed, opened.file)
        trainer.optimizers.load(_part(opened.load(), OPTIMIZER))


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


def digest_of(data: Dataset) -> str | None:
    """SHA-256 over the digests of a data set's files; None where it is not on disk."""
    text = getattr(data.core, "manifest", None)
    if not text:
        return None
    files = json.loads(text)["files"]
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


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
                f"{data.path} is not the data that this run was trained on (its digest differs); "
                f"restore it, or begin another run with --init-from {shlex.quote(str(meta.path))}"
            )


class DataWatch:
    """Notices when the files of a data set change while they are mapped.

    Args:
        data: the data sets.
    """

    def __init__(self, *data: Dataset) -> None:
        folders = [Path(d.path) for d in data if hasattr(d, "path")]
        folders = [part for folder in folders for part in (folder, *folder.glob("shard-*"))]
        files = [folder / name for folder in folders for name in ("tokens.bin", "tokens.idx")]
        files = [file for file in files if file.exists()]
        self._seen = {file: _signature(file) for file in files}

    def check(self) -> list[Path]:
        """Look at every file once; returns those that are no longer there.

        A file that was removed or replaced by another is still mapped, and read, as it was.

        Raises:
            CorruptError: a file was written to in place: steps since may be of other text.
        """
        gone: list[Path] = []
        for file, before in list(self._seen.items()):
            now = _signature(file)
            if now is None or before is None or now[0] != before[0]:
                gone.append(file)
                del self._seen[file]
            elif now != before:
                raise CorruptError(
                    f"{file} was changed while the run read it ({before[1]} bytes, now {now[1]})"
                )
        return gone


def _signature(file: Path) -> tuple[tuple[int, int], int, int] | None:
    """Identity, size and time of a file; None where it is not there."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns


def _check_same_function(wanted: ModelConfig, found: ModelConfig, path: Path) -> None:
    """Refuse weights that would fit and mean something else: heads, norms, rotations.

    Shapes are checked tensor by tensor where the weights are assigned. Time conditioning may be
    added or removed, and dropout is no part of the function.

    Raises:
        CheckpointError: names the setting.
    """
    names = ("heads", "mlp", "norm", "norm_eps", "rope_theta", "tied_embeddings")
    for name in (*names, "rope_scaling", "nope_layers"):
        mine, theirs = getattr(wanted, name), getattr(found, name)
        if mine != theirs:
            raise CheckpointError(
                f"init-from = {path}: was trained with model.{name.replace('_', '-')} = {theirs}; "
                f"this model has {mine}"
            )
