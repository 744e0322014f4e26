"""One native checkpoint: a folder of safetensors and JSON that is never changed once written.

| file | content |
| --- | --- |
| ``config.json`` | version, step, special ids, settings, the trainer's numbers, SHA-256 digests |
| ``model.safetensors`` | averaged (EMA) weights: the ones that are scored and sampled |
| ``training.safetensors`` | raw weights and optimizer state, to resume from |
| ``training/`` | the same in a file for each rank, where ranks share one copy of it |
| ``tokenizer.json`` | the tokenizer, so that a checkpoint is complete by itself |

``config.json`` has the digest of every other file, of the data, and of itself (with that one field
empty).

Publish the folder without ``training.safetensors`` or ``training/``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3lm.checkpoint.record import Record, check_regular, parse_json, read_bytes
from bd3lm.checkpoint.sharded import ShardFiles
from bd3lm.checkpoint.steps import TRAINING, run_of
from bd3lm.checkpoint.tensors import TensorFile, check_tensors, fill, skeleton, write_tensors
from bd3lm.config import EvalConfig, TrainConfig, from_dict, to_dict
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.errors import Bd3lmError, CheckpointError, ConfigError
from bd3lm.files import digest_file, replaced_directory, write_text
from bd3lm.model import Transformer
from bd3lm.systems import BlockDiffusion, System, build_system

FORMAT = "bd3lm-checkpoint"
STATE = f"{TRAINING}.safetensors"
VERSION = 2
"""Version 1 is read too: one folder that was replaced as a whole, without digests."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with everything needed to score and sample from it.

    Attributes:
        config: settings of its run.
        model: weights loaded, in evaluation mode.
        tokenizer: the one it was trained with.
        step: optimizer steps it has seen.
        path: the folder it came from.
        learned: noise that its system has learned.
    """

    config: TrainConfig
    model: Transformer
    tokenizer: Tokenizer
    step: int
    path: Path
    learned: dict[str, Any] | None = None

    @property
    def run(self) -> Path | None:
        """The run it is part of; None where it lies by itself."""
        return run_of(self.path)

    def system(self, block_size: int | None = None) -> System:
        """The system that scores and samples it, at its own block size or another.

        Raises:
            ConfigError: a block size that its system cannot have.
            CheckpointError: the learned noise does not fit the system.
        """
        size = self.config.block if block_size is None else block_size
        trained = size in (self.config.block, *self.config.objective.block_sizes)
        cfg = self.config
        if not trained:  # the run's validation is of its own sizes
            cfg = replace(cfg, eval=EvalConfig()).with_block(size)
        system = build_system(cfg, self.tokenizer.mask_id)
        if trained and self.learned:  # learned noise is of the trained block sizes
            restore_system(system, self.learned, self.path / "config.json")
        return system.at(size) if isinstance(system, BlockDiffusion) else system

    def as_autoregressive(self) -> Checkpoint:
        """The same weights as the autoregressive model that a causal clean stream makes them.

        Raises:
            ConfigError: the clean stream is not causal.
        """
        return replace(self, config=self.config.autoregressive(), learned=None)


@dataclass(frozen=True)
class Meta:
    """``config.json`` of a native checkpoint, every field checked.

    Attributes:
        path: the checkpoint's folder.
        step: optimizer steps taken.
        config: settings of the run.
        special: ``(vocab_size, bos_id, eos_id, mask_id)``.
        files: digest and size of each file; None in version 1.
        data: digest of each split of the data; empty in version 1.
        state: the trainer's numbers.
    """

    path: Path
    step: int
    config: TrainConfig
    special: tuple[int, int, int, int]
    files: Record | None
    data: Mapping[str, str]
    state: Record

    @property
    def learned(self) -> dict[str, Any]:
        """Noise that the system had learned; empty where a converted model has none.

        Raises:
            CheckpointError: the field is of another type.
        """
        if "system" not in self.state.values:
            return {}
        learned = dict(self.state.record("system").values)
        if self.files is None and "law" in learned:  # its name in version 1
            learned["counts"] = learned.pop("law")
        return learned

    def verified(self, name: str) -> Path:
        """Compare one file with its size and digest; returns its path.

        Raises:
            CheckpointError: it is missing, or not the file that was written.
        """
        file = self.path / name
        check_regular(file)
        if self.files is not None:
            record = self.files.record(name)
            expected, digest = record.integer("bytes"), record.text("sha256")
            try:
                actual = file.stat().st_size
                same = actual == expected and digest_file(file) == digest
            except OSError as error:  # a run that is trained may have removed it just now
                reason = error.strerror or error
                raise CheckpointError(f"{file} cannot be read: {reason}") from error
            if actual != expected:
                raise CheckpointError(
                    f"{file} holds {actual} bytes where its config.json says {expected}"
                )
            if not same:
                raise CheckpointError(
                    f"{file} is damaged: its SHA-256 is not that in its config.json"
                )
        return file

    def tensors(self, name: str) -> TensorFile:
        """Open a verified safetensors file of the same step; only its header is parsed.

        Raises:
            CheckpointError: as :meth:`verified`; also a file of another step.
        """
        opened = TensorFile(self.verified(name))
        step = opened.metadata.get("step")
        if self.files is not None and step != str(self.step):
            raise CheckpointError(
                f"{opened.file} is of step {step}, its config.json of {self.step}"
            )
        return opened

    def training(self, mine: Callable[[int], bool] = lambda _: True) -> TensorFile | ShardFiles:
        """Open the state that a run is resumed from, verified; only headers are parsed.

        Args:
            mine: which of the shards, by number, this process verifies; others verify the rest.

        Raises:
            CheckpointError: a file is missing, or not the one that was written.
        """
        folder = self.path / TRAINING
        if not folder.is_dir():
            return self.tensors(STATE)
        names = [] if self.files is None else [n for n in self.files.values if n != STATE]
        names = sorted(name for name in names if name.startswith(f"{TRAINING}/"))
        for found in folder.iterdir():
            if f"{TRAINING}/{found.name}" not in names:
                raise CheckpointError(f"{found} is not named in the config.json of its checkpoint")
        for number, name in enumerate(names):
            check_regular(self.path / name)
            if mine(number):
                self.verified(name)
        return ShardFiles(folder)


def save_checkpoint(
    path: Path,
    config: TrainConfig,
    tokenizer: Tokenizer,
    *,
    step: int,
    averaged: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    state: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint in place of the one at ``path``.

    Args:
        path: directory.
        config: settings of the run.
        tokenizer: saved with the weights.
        step: optimizer steps taken.
        averaged: EMA weights by parameter name.
        training: raw weights and optimizer tensors, by names of the trainer's choosing.
        state: the trainer's numbers, as plain JSON.
        data: digest of each split of the data.

    Raises:
        DiskFullError: no space; the old checkpoint stays.
    """
    with replaced_directory(path) as folder:
        write_checkpoint(
            folder,
            config,
            tokenizer,
            step=step,
            averaged=averaged,
            training=training,
            state=state,
            data=data,
        )


def write_checkpoint(
    folder: Path,
    config: TrainConfig,
    tokenizer: Tokenizer,
    *,
    step: int,
    averaged: Mapping[str, Tensor],
    training: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    data: Mapping[str, str] | None = None,
    shards: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of a checkpoint into an empty folder and wait until they are on the disk.

    Args:
        folder: empty, but for shards.
        config: settings of the run.
        tokenizer: saved with the weights.
        step: optimizer steps taken.
        averaged: EMA weights by parameter name.
        training: raw weights and optimizer tensors; None where they are in the folder, in shards.
        state: the trainer's numbers, as plain JSON.
        data: digest of each split of the data.
        shards: what :func:`described` says of each of these files.

    Raises:
        DiskFullError: no space left.
        StorageError: any other refusal of the system.
    """
    metadata = {"format": "pt", "step": str(step)}
    write_tensors(folder / "model.safetensors", averaged, metadata)
    if training is not None:
        write_tensors(folder / STATE, training, metadata)
    write_text(folder / "tokenizer.json", tokenizer.json)
    names = ("model.safetensors", *(() if training is None else (STATE,)), "tokenizer.json")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": "",
        "step": step,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "mask_id": tokenizer.mask_id,
        "files": {name: described(folder / name) for name in names} | dict(shards or {}),
        "data": dict(data or {}),
        "config": to_dict(config),
        "state": dict(state),
    }
    text = json.dumps(meta, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(folder / "config.json", text.replace('"sha256": ""', f'"sha256": "{digest}"', 1))


def described(file: Path) -> dict[str, Any]:
    """Size and digest of a file, as ``config.json`` holds them."""
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}


def read_meta(path: Path) -> Meta:
    """Read and check ``config.json`` of a native checkpoint.

    Args:
        path: the checkpoint's folder, from :func:`find_checkpoint`.

    Raises:
        CheckpointError: it is not a checkpoint, damaged, or of a version that is not read.
    """
    file = path / "config.json"
    content = read_bytes(file)
    record = Record(parse_json(content, file), file)
    if record.values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a bd3lm checkpoint, or its run has none yet")
    version = record.integer("version", 1)
    if version > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {version}; this release reads up to {VERSION}"
        )
    if version > 1:
        _check_own_digest(content, record.text("sha256"), file)
    step = record.integer("step")
    bos, eos, mask = (record.integer(f"{name}_id", 0, 2**31 - 1) for name in ("bos", "eos", "mask"))
    try:
        config = from_dict(TrainConfig, record.record("config").values)
    except ConfigError as error:
        raise CheckpointError(f"{file}: config: {error}") from error
    data = record.record("data") if version > 1 else Record({}, file)
    return Meta(
        path=path,
        step=step,
        config=config,
        special=(record.integer("vocab_size", 1, 2**31 - 1), bos, eos, mask),
        files=record.record("files") if version > 1 else None,
        data={name: data.text(name) for name in data.values},
        state=record.record("state"),
    )


def _check_own_digest(content: bytes, digest: str, file: Path) -> None:
    blank = content.replace(f'"sha256": "{digest}"'.encode(), b'"sha256": ""', 1)
    if hashlib.sha256(blank).hexdigest() != digest:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one that it holds")


def restore_system(system: System, learned: dict[str, Any], source: object) -> None:
    """Restore the noise that a system had learned.

    Raises:
        CheckpointError: the saved noise does not fit the system.
    """
    try:
        system.load_state(learned)
    except Bd3lmError as error:
        raise CheckpointError(f"{source}: state: system: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source}: state: system does not fit ({reason})") from error


def load_native(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a model of this layout for scoring and sampling (EMA weights).

    Args:
        path: the checkpoint's folder, from :func:`find_checkpoint`.
        device: where the weights go.

    Raises:
        CheckpointError: it is not a checkpoint, is damaged, or its parts do not fit together.
    """
    meta = read_meta(path)
    tokenizer = read_tokenizer(meta)
    opened = meta.tensors("model.safetensors")
    shape, source = meta.config.model, opened.file
    model = skeleton(shape, tokenizer.vocab_size, opened.tensors, "embed.weight", source)
    check_tensors(opened.tensors, dict(model.named_parameters()), source)
    model = fill(model, opened.load(), device)
    loaded = Checkpoint(meta.config, model.eval(), tokenizer, meta.step, path, meta.learned)
    loaded.system()  # refuses learned noise that does not fit
    return loaded


def read_tokenizer(meta: Meta) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Raises:
        CheckpointError: it does not load, or has other special ids than the checkpoint.
    """
    file = meta.verified("tokenizer.json")
    try:
        tokenizer = load_tokenizer(file)
    except Bd3lmError as error:
        raise CheckpointError(f"{meta.path} cannot be loaded: {error}") from error
    if tokenizer.special != meta.special:
        raise CheckpointError(
            f"{meta.path}: its tokenizer has V, BOS, EOS and mask {tokenizer.special}, its "
            f"config.json says {meta.special}"
        )
    return tokenizer
