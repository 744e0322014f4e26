"""Failures of the machine during a run, as one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bd3lm.errors import Bd3lmError, OutOfMemoryError, is_out_of_memory
from bd3lm.files import storage_errors


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Raise errors of bd3lm for those of the system.

    Args:
        out: directory of the run, for messages that name no file.

    Raises:
        OutOfMemoryError: memory of the host or the device is used up.
        DiskFullError: no space left.
        StorageError: any other refusal of the system.
    """
    try:
        yield
    except Bd3lmError:
        raise
    except OSError as error:
        with storage_errors(Path(error.filename) if isinstance(error.filename, str) else out):
            raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise OutOfMemoryError(
            "there is not enough memory for this run; lower micro-batch, eval.batch-size or "
            f"sample.num, or set recompute ({text[:200] or 'MemoryError'})"
        ) from error
