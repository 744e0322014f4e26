"""Tensors on disk: safetensors files, checked from their header before anything is allocated."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bd3lm.checkpoint.record import check_regular
from bd3lm.config import ModelConfig
from bd3lm.errors import CheckpointError, ConfigError, DiskFullError, StorageError
from bd3lm.files import sync_file
from bd3lm.model import Transformer

_BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes of a safetensors header; others are no dtype of a checkpoint."""


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file and wait until it is on the disk.

    The file has the mode that the umask gives; safetensors itself makes it 0600.

    Args:
        file: the path, which must not exist.
        tensors: by name.
        metadata: of the header.

    Raises:
        DiskFullError: no space left.
        StorageError: any other refusal of the system.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata=dict(metadata))
    except SafetensorError as error:  # it wraps the system's own error
        if "No space left" in str(error) or "quota" in str(error) or "os error 28" in str(error):
            raise DiskFullError(f"{file}: no space left on the device") from error
        raise StorageError(f"{file}: {error}") from error
    os.chmod(file, mode)
    sync_file(file)


class TensorFile:
    """A safetensors file of which only the header has been read.

    Args:
        file: the path.

    Raises:
        CheckpointError: it is missing, truncated, not safetensors, or holds an unknown dtype.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tensors: dict[str, Tensor] = {}
        """Tensors without data, on the meta device, by name."""
        self._read(self._header)

    def _header(self) -> None:
        with safe_open(self.file, framework="pt") as opened:
            self.metadata: dict[str, str] = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(f"{self.file} holds {name} as {part.get_dtype()}")
                self.tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Read one tensor after the other.

        Raises:
            CheckpointError: the file cannot be read, or a tensor holds NaN or infinity.
        """
        for name in self.tensors:
            loaded: list[Tensor] = []

            def read(name: str = name, loaded: list[Tensor] = loaded) -> None:
                with safe_open(self.file, framework="pt") as opened:
                    loaded.append(opened.get_tensor(name))

            self._read(read)
            check_finite({name: loaded[0]}, self.file)
            yield name, loaded[0]

    def load(self) -> dict[str, Tensor]:
        """Read all tensors.

        Raises:
            CheckpointError: the file cannot be read, or a tensor holds NaN or infinity.
        """
        loaded: dict[str, Tensor] = {}

        def read() -> None:
            with safe_open(self.file, framework="pt") as opened:
                loaded.update({name: opened.get_tensor(name) for name in self.tensors})

        self._read(read)
        check_finite(loaded, self.file)
        return loaded

    def _read(self, read: Callable[[], None]) -> None:
        check_regular(self.file)
        try:
            read()
        except CheckpointError:
            raise
        except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}") from error


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        CheckpointError: names the first.
    """
    name = first_not_finite(tensors.items())
    if name is not None:
        raise CheckpointError(f"{source} holds NaN or infinity in {name}")


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; None where all are finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def check_tensors(
    found: Mapping[str, Tensor],
    needed: Mapping[str, Tensor],
    source: object,
    *,
    any_float: bool = False,
) -> None:
    """Check names, shapes and dtypes; no data is read.

    Args:
        found: tensors of a file, which may be on the meta device.
        needed: tensors of the model, likewise.
        source: the file, for messages.
        any_float: take every floating-point dtype where a floating-point one is needed.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown, or of another shape or
            dtype.
    """
    for name, tensor in needed.items():
        if name not in found:
            raise CheckpointError(f"{source} has no tensor {name}, which this model needs")
        theirs = found[name]
        if theirs.shape != tensor.shape:
            raise CheckpointError(
                f"{source} holds {name} of shape {list(theirs.shape)}; "
                f"this model needs {list(tensor.shape)}"
            )
        fits = any_float and theirs.is_floating_point() and tensor.is_floating_point()
        if theirs.dtype != tensor.dtype and not fits:
            raise CheckpointError(
                f"{source} holds {name} as {_dtype(theirs)}; this model needs {_dtype(tensor)}"
            )
    for name in found:
        if name not in needed:
            raise CheckpointError(f"{source} holds a tensor {name} that this model does not have")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def skeleton(
    shape: ModelConfig, vocab_size: int, found: Mapping[str, Tensor], embed: str, source: object
) -> Transformer:
    """Build a model without memory, on the meta device, where the file can hold it.

    Depth and width are compared with the file first: building takes time and memory by them.

    Args:
        shape: of the model, from a file that may lie.
        vocab_size: ids in use; V where ``shape.vocab_size`` is None.
        found: tensors of the file.
        embed: the embedding's name there.
        source: the file, for messages.

    Raises:
        CheckpointError: the file holds a model of another depth or width.
    """
    blocks = {int(match[1]) for name in found if (match := _BLOCK.search(name))}
    if len(blocks) < shape.depth:
        raise CheckpointError(
            f"{source} holds {len(blocks)} blocks; its config.json says model.depth = {shape.depth}"
        )
    if embed not in found:
        raise CheckpointError(f"{source} has no tensor {embed}, which this model needs")
    rows = shape.vocab_size or vocab_size
    if list(found[embed].shape) != [rows, shape.width]:
        raise CheckpointError(
            f"{source} holds {embed} of shape {list(found[embed].shape)}; "
            f"this model needs [{rows}, {shape.width}]"
        )
    try:
        return empty_model(shape, vocab_size)
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{source}: no model has the shape of its config.json ({reason})"
        ) from error


def empty_model(shape: ModelConfig, vocab_size: int) -> Transformer:
    """Build a model on the meta device, which takes no memory."""
    with torch.device("meta"), _NoNormal():
        return Transformer(shape, vocab_size)


class _NoNormal(TorchFunctionMode):
    """Leave out ``normal_``: on the meta device it imports the compiler, 900 modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def fill(
    model: Transformer, weights: Mapping[str, Tensor], device: torch.device | str
) -> Transformer:
    """Give a model on the meta device these weights, copied to ``device`` in its own dtypes."""
    tied = model.head.weight is model.embed.weight
    own = {
        name: weights[name].to(device, parameter.dtype, copy=True)
        for name, parameter in model.named_parameters()
    }
    if tied:
        own["head.weight"] = own["embed.weight"]
    model.load_state_dict(own, assign=True)  # to_empty() would import the compiler
    if tied:
        model.head.weight = model.embed.weight
    return model


def assign_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors into a model, checking every name, shape and dtype first.

    Raises:
        CheckpointError: names the first tensor that does not fit.
    """
    check_tensors(weights, model.state_dict(), source)
    model.load_state_dict(dict(weights))
