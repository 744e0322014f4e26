"""Weight files of a folder: safetensors or plain pickles, in one file or in parts with an index."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

from bd3lm.checkpoint.native import read_tensors
from bd3lm.errors import CheckpointError


def read_weights(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of a folder, and the file that names them.

    Raises:
        CheckpointError: no weights, or a file that is missing, damaged or not of plain tensors.
    """
    for name, read in (("model.safetensors", read_tensors), ("pytorch_model.bin", _read_pickle)):
        if (path / name).is_file():
            return path / name, read(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            for part in _parts(index):
                tensors |= read(path / part)
            return index, tensors
    raise CheckpointError(f"{path} holds neither model.safetensors nor pytorch_model.bin")


def _parts(index: Path) -> list[str]:
    """Files of a checkpoint in parts, each a plain name beside its index."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name}, which does not lie beside it")
    return names


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """A ``.bin`` of plain tensors; one that wants to run code is refused.

    Raises:
        CheckpointError: it is missing or damaged, or holds anything but tensors by name.
    """
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing from the checkpoint") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors, which could run code; only plain "
            "tensors are loaded"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    plain = isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())
    if not plain:
        raise CheckpointError(f"{file} does not hold tensors by name")
    return tensors
