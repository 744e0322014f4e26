"""Weight files of a folder: safetensors or plain pickles, in one file or in parts with an index."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from bd3lm.checkpoint.record import check_regular, read_json
from bd3lm.checkpoint.tensors import TensorFile, check_finite
from bd3lm.errors import CheckpointError


def read_weights(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of a folder, and the file that names them.

    Raises:
        CheckpointError: no weights, or a file that is missing, damaged or not of plain tensors.
    """
    for name, read in (
        ("model.safetensors", _read_safetensors),
        ("pytorch_model.bin", _read_pickle),
    ):
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
    """Files of a checkpoint in parts, each a plain file name next to its index."""
    files = read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} is not an index of weight files")
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name}, which does not lie beside it")
    return sorted(set(names))


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    return TensorFile(file).load()


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Read a ``.bin`` of plain tensors; one that would run code is refused.

    Raises:
        CheckpointError: it is missing or damaged, or holds anything but tensors by name.
    """
    check_regular(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors, which could run code; only plain "
            "tensors are loaded"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    plain = isinstance(tensors, dict) and all(isinstance(t, Tensor) for t in tensors.values())
    if not plain or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{file} does not hold tensors by name")
    check_finite(tensors, file)
    return tensors
