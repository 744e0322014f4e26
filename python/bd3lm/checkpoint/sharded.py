"""Tensors that ranks share, on disk: each rank writes its parts, any number of ranks reads them.

The files are those of ``torch.distributed.checkpoint`` with its safetensors storage: one a rank,
with the offsets of its parts in the header. Its default storage would be pickles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3lm.checkpoint.record import check_regular
from bd3lm.errors import CheckpointError, StorageError
from bd3lm.files import storage_errors, sync_directory

SUFFIX = ".safetensors"


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> list[str]:
    """Write this rank's parts and wait until they are on the disk; every rank calls this.

    A tensor that ranks have in common is written by one of them.

    Args:
        folder: an empty folder that all ranks see.
        tensors: by name, the same names on every rank.
        group: processes that write together; None: all of the job.

    Returns:
        Names of the files that this rank has written.

    Raises:
        DiskFullError: no space left on a rank; raised on all of them.
        StorageError: any other refusal of the system.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(HuggingFaceStorageWriter):
        """Remembers the names of its files."""

        written: frozenset[str] = frozenset()

        def write_data(self, plan: Any, planner: Any) -> Any:
            done = super().write_data(plan, planner)
            self.written = frozenset(result.storage_data.relative_path for result in done.wait())
            return done

    writer = Writer(str(folder), save_distributed=True)
    with storage_errors(folder), _first_failure():
        save(dict(tensors), storage_writer=writer, process_group=group)
        sync_directory(folder)
    return sorted(writer.written)


class ShardFiles:
    """The files of :func:`write_shards`, of which only the headers have been read.

    Args:
        folder: that holds them, and no other file of tensors.

    Raises:
        CheckpointError: a file is damaged, or a part of a tensor is missing.
    """

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        self.file = folder
        self.tensors: dict[str, Tensor] = {}
        """Tensors without data, on the meta device, by name."""
        for file in sorted(folder.iterdir()):
            check_regular(file)
        self._reader: Any = HuggingFaceStorageReader(str(folder))
        self._read(self._headers)

    def _headers(self) -> None:
        for name, found in self._reader.read_metadata().state_dict_metadata.items():
            held = sum(math.prod(chunk.sizes) for chunk in found.chunks)
            if held != math.prod(found.size):
                raise CheckpointError(f"{self.file} lacks a part of {name}")
            dtype = found.properties.dtype
            self.tensors[name] = torch.empty(found.size, dtype=dtype, device="meta")

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy the whole of each tensor, or the part of this rank, into a tensor of its name.

        Ranks need not call this together.

        Raises:
            CheckpointError: a file cannot be read.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        def read() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(dict(targets), storage_reader=self._reader, no_dist=True)

        self._read(read)

    def _read(self, read: Callable[[], None]) -> None:
        try:
            with _first_failure():
                read()
        except CheckpointError:
            raise
        except Exception as error:  # a header may hold anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(f"{self.file} cannot be read: {reason}") from error


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raise the error of the lowest rank in place of the library's list of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank = min(error.failures)
        failure = error.failures[rank][0]
        if isinstance(failure, Exception):
            raise failure from error
        raise StorageError(f"rank {rank} failed: {failure}") from error
