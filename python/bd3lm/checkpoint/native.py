"""The native checkpoint: a directory of safetensors and JSON, replaced as a whole.

| file | content |
| --- | --- |
| ``config.json`` | format version, step, vocabulary, special ids, the run's resolved settings |
| ``model.safetensors`` | averaged (EMA) weights: what is scored and sampled |
| ``training.safetensors`` | raw weights and optimizer state, to resume from |
| ``tokenizer.json`` | the tokenizer, so that a checkpoint is complete by itself |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bd3lm.config import TrainConfig, from_dict, to_dict
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.errors import Bd3lmError, CheckpointError, DiskFullError, MissingFileError
from bd3lm.files import recover_directory, replaced_directory, write_json
from bd3lm.model import Transformer
from bd3lm.systems import System, build_system

FORMAT = "bd3lm-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with everything needed to score and sample from it.

    Attributes:
        config: settings of its run.
        model: weights loaded, in evaluation mode.
        tokenizer: the one it was trained with.
        step: optimizer steps it has seen.
        path: where it came from.
        learned: what its system has learned of its noise.
    """

    config: TrainConfig
    model: Transformer
    tokenizer: Tokenizer
    step: int
    path: Path
    learned: dict[str, Any] | None = None

    def system(self, block_size: int | None = None) -> System:
        """The system that scores and samples it, at its own block size or another.

        Raises:
            ConfigError: a block size that its system cannot have.
        """
        same = block_size is None or block_size == self.config.block
        cfg = self.config if same else replace(self.config, block_size=block_size)
        system = build_system(cfg, self.tokenizer.mask_id)
        if same and self.learned:  # what was learned is of that block size
            system.load_state(self.learned)
        return system


def save_checkpoint(
    path: Path,
    config: TrainConfig,
    tokenizer: Tokenizer,
    *,
    step: int,
    averaged: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint in place of the one at ``path``.

    Args:
        path: directory.
        config: settings of the run.
        tokenizer: saved beside the weights.
        step: optimizer steps taken.
        averaged: EMA weights by parameter name.
        training: raw weights and optimizer tensors, by names of the trainer's choosing.
        state: the trainer's numbers, as plain JSON.

    Raises:
        DiskFullError: no space; the old checkpoint stays.
    """
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "mask_id": tokenizer.mask_id,
        "config": to_dict(config),
        "state": dict(state),
    }
    with replaced_directory(path) as folder:
        try:
            save_file(
                {k: v.contiguous() for k, v in averaged.items()}, folder / "model.safetensors"
            )
            save_file(
                {k: v.contiguous() for k, v in training.items()}, folder / "training.safetensors"
            )
        except SafetensorError as error:  # it wraps the system's own error
            if "No space left" in str(error) or "os error 28" in str(error):
                raise DiskFullError(f"{path}: no space left on the device") from error
            raise
        write_json(folder / "config.json", meta)
        (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint of any layout.

    Raises:
        MissingFileError: there is no such directory.
        CheckpointError: it holds no ``config.json``, or one that is not a JSON object.
    """
    recover_directory(path)
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such checkpoint directory")
    file = path / "config.json"
    if not file.is_file():
        hint = f"; did you mean {path / 'checkpoint'}?" if (path / "checkpoint").is_dir() else ""
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json{hint}")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return meta


def read_meta(path: Path) -> dict[str, Any]:
    """``config.json`` of a native checkpoint.

    Raises:
        MissingFileError: there is no such directory.
        CheckpointError: it is not a checkpoint, or of a version this release cannot read.
    """
    meta = read_config(path)
    if meta.get("format") != FORMAT:
        hint = f"; did you mean {path / 'checkpoint'}?" if (path / "checkpoint").is_dir() else ""
        raise CheckpointError(f"{path} is not a bd3lm checkpoint{hint}")
    if meta["version"] != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {meta['version']}; this release reads {VERSION}"
        )
    return meta


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or not safetensors.
    """
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing from the checkpoint") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def assign_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a model, checking every name and shape first.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape.
    """
    check_tensors(weights, model.state_dict(), source)
    model.load_state_dict(dict(weights))


def check_tensors(
    found: Mapping[str, Tensor], needed: Mapping[str, Tensor], source: object
) -> None:
    """Check names and shapes of tensors from a file.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape.
    """
    for name, tensor in needed.items():
        if name not in found:
            raise CheckpointError(f"{source} has no tensor {name}, which this model needs")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source} holds {name} of shape {list(found[name].shape)}; "
                f"this model needs {list(tensor.shape)}"
            )
    for name in found:
        if name not in needed:
            raise CheckpointError(f"{source} holds a tensor {name} that this model does not have")


def load_native(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a model of this layout for scoring and sampling (EMA weights).

    Raises:
        MissingFileError: there is no such directory.
        CheckpointError: it is not a checkpoint, or its parts do not fit together.
    """
    meta = read_meta(path)
    try:
        config = from_dict(TrainConfig, meta["config"])
        tokenizer = load_tokenizer(path / "tokenizer.json")
    except (Bd3lmError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, its config.json "
            f"says {meta['vocab_size']}"
        )
    model = Transformer(config.model, tokenizer.vocab_size)
    file = path / "model.safetensors"
    assign_weights(model, _untie(read_tensors(file), config), file)
    model = model.to(device).eval()
    learned = meta["state"].get("system")
    return Checkpoint(config, model, tokenizer, int(meta["step"]), path, learned)


def _untie(weights: dict[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """A tied head is stored once, under the embedding's name."""
    if config.model.tied_embeddings and "embed.weight" in weights:
        weights.setdefault("head.weight", weights["embed.weight"])
    return weights
