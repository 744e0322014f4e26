"""Every error a user can meet, each with one sentence that says what to do."""

from __future__ import annotations


class Bd3lmError(Exception):
    """Base of all errors raised by bd3lm; the commands print it and exit with ``exit_code``."""

    exit_code = 2


class ConfigError(Bd3lmError, ValueError):
    """A setting is not allowed: ``field = value: must be allowed``.

    Attributes:
        field: name of the setting, as the command line spells it.
        value: the refused value; None where none was given.
        allowed: the rest of a sentence that begins with "must be"; None where the error comes
            from the Rust core, whose sentence is finished.
    """

    def __init__(self, field: str, value: object = None, allowed: str | None = None) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        named = f"{field} (not given)" if value is None else f"{field} = {value}"
        super().__init__(field if allowed is None else f"{named}: must be {allowed}")

    def renamed(self, field: str) -> ConfigError:
        """The same error under another name of the setting."""
        return ConfigError(field, self.value, self.allowed)


class MissingFileError(Bd3lmError, FileNotFoundError):
    """A named file or directory does not exist."""


class ExistsError(Bd3lmError, FileExistsError):
    """An output that would be overwritten is already there."""


class FormatError(Bd3lmError, ValueError):
    """A text file, or one of its records, cannot be read as its kind."""


class EmptyCorpusError(Bd3lmError, ValueError):
    """The input holds no text."""


class TokenizerError(Bd3lmError, ValueError):
    """A tokenizer cannot be loaded or applied."""


class NotADatasetError(Bd3lmError, ValueError):
    """A directory is not a prepared data set."""


class TruncatedError(Bd3lmError, OSError):
    """A file of a data set is not as long as its manifest says."""


class CorruptError(Bd3lmError, OSError):
    """A file's content does not match its digest or its own structure."""


class TokenOutOfRangeError(Bd3lmError, ValueError):
    """A token id lies outside the vocabulary."""


class DiskFullError(Bd3lmError, OSError):
    """The disk filled up while writing; nothing half-written was kept."""


class StorageError(Bd3lmError, OSError):
    """The operating system refused to read or write a file."""


class CheckpointError(Bd3lmError, ValueError):
    """A checkpoint cannot be loaded, or does not fit the request."""


class OutOfMemoryError(Bd3lmError, MemoryError):
    """The host or the device has not enough memory for a run."""


class InterruptedRunError(Bd3lmError):
    """A signal stopped a run; the message names the checkpoint and how to continue.

    Args:
        message: the sentence.
        number: of the signal; the command exits with 128 + number, as a shell reports it.
    """

    def __init__(self, message: str, number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class LostRankError(Bd3lmError):
    """Another process of the job has ended, cannot be reached or hangs."""


class DivergedError(Bd3lmError):
    """Losses, gradients or weights are no longer finite; earlier checkpoints are finite."""


class MissingPackageError(Bd3lmError, ImportError):
    """A feature needs an optional package; the message says how to install it."""


_NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate",
    "not enough memory",
    "out of memory",
    "could not create a memory object",
    "could not create a primitive",
    "can't start new thread",
)
"""Messages without memory of PyTorch's allocators, oneDNN and threads: a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, of the host or of a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = " ".join(str(error).split())
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _NO_MEMORY)
