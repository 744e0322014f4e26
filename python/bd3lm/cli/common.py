"""Consoles, exit codes and sentences of errors, for every command."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from bd3lm.errors import (
    Bd3lmError,
    ConfigError,
    DivergedError,
    FormatError,
    InterruptedRunError,
    MissingFileError,
    is_out_of_memory,
)
from bd3lm.hub import OFFLINE
from bd3lm.ranks.place import Place, find_place
from bd3lm.storage import is_url

T = TypeVar("T")
PATIENCE = 10.0
"""Seconds that a rank leaves to the one that prints the error of all."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""Exit codes of a process that SIGINT or SIGPIPE ended, as a shell shows them."""


class PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, no line breaks added."""

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        # The stream of a notebook says that it is a terminal, and shows escape codes as they are.
        notebook = type(stream).__module__.startswith("ipykernel")
        super().__init__(
            stderr=stderr,
            force_terminal=False if notebook else None,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
            force_jupyter=False,  # lines in a notebook, without widgets
        )

    def on_broken_pipe(self) -> None:
        """Let the error through: :func:`run` and the reporter of a training run decide."""
        raise  # noqa: PLE0704 (called from the handler of the error)


def run(command: Callable[[], None]) -> None:
    """Run a command and end the process with its exit code.

    An error that the user or the machine caused is one line on standard error and exit code 2. A
    bug of bd3lm shows its traceback and where to report it, with exit code 1. Ctrl-C is exit code
    130. A reader that closed the pipe ends the command silently, with exit code 141.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # not a text file, or already closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(BROKEN_PIPE)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing half-written was kept\n")
        sys.exit(INTERRUPTED)
    except SystemExit:
        raise
    except BaseException as error:  # PyO3's PanicException is no Exception
        _report(error)
        code = 1 if error_sentence(error) is None else getattr(error, "exit_code", 2)
        if _place().size > 1:
            os._exit(code)  # at exit the transport may wait for other ranks
        sys.exit(code)


def _report(error: BaseException) -> None:
    """Print an error, once where all ranks of a job have the same."""
    shared = isinstance(error, (ConfigError, DivergedError, InterruptedRunError))
    rank = _place().rank
    if getattr(error, "elsewhere", False) or (shared and rank > 0):
        if not isinstance(error, InterruptedRunError):
            time.sleep(PATIENCE)  # torchrun ends all ranks when one exits: let the other print
        return
    sentence = error_sentence(error)
    if sentence is None:
        traceback.print_exc()
        sys.stderr.write("This is a bug of bd3lm. Please report it with the lines above.\n")
    else:
        where = f"rank {rank}: " if rank else ""
        PlainConsole(stderr=True).print(f"error: {where}{sentence}", style="bold red")
    sys.stderr.flush()


def _place() -> Place:
    """The process in its job; a job of its own where the environment is not complete."""
    with suppress(ConfigError):
        return find_place()
    return Place()


def error_sentence(error: BaseException) -> str | None:
    """One sentence for an error that the input or the machine caused; None for a bug."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, Bd3lmError):
        return str(error)
    if kind == "PanicException":
        return f"a bug of bd3lm, or a damaged tokenizer; please report it ({text})"
    if is_out_of_memory(error):
        return (
            "out of memory; use a smaller --batch-size, a smaller model or shorter rows "
            "(in training also --micro-batch or --recompute)"
        )
    if isinstance(error, RecursionError):
        return "an input file is nested too deeply"
    if isinstance(error, UnicodeError):
        return f"a text or a name is not valid UTF-8 ({text})"
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror or text}"
    return None


def parse(kind: type[T], prog: str, argv: Sequence[str] | None, **options: Any) -> T:
    """Parse a command line into a dataclass.

    Args:
        kind: the dataclass; it may refuse values with a :class:`ConfigError`.
        prog: name of the command.
        argv: its words; None: those of the process.
        options: of ``tyro.cli``.

    Raises:
        ConfigError: a refused value, as the dataclass says it.
        SystemExit: help was printed, or words that are no options were refused.
    """
    messages = StringIO()
    try:
        with redirect_stderr(messages):
            return tyro.cli(kind, prog=prog, args=argv, **options)
    except SystemExit as stop:
        # tyro frames every ValueError of a constructor; the sentence is the cause of its exit.
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(messages.getvalue())
        raise


def check_exists(path: Path | str) -> None:
    """Raise :class:`MissingFileError` for an input that is not there, before slow imports.

    A URL is looked at where it is read.
    """
    if not is_url(path) and not Path(path).exists():
        raise MissingFileError(f"{path}: no such file or directory")


def check_checkpoint(source: str) -> None:
    """Raise :class:`MissingFileError` for a checkpoint that is nowhere, before slow imports.

    A name of the hub is two words around a slash, of which the first is no folder here. The
    package that carries a model is looked for where it is read.
    """
    if is_url(source) or source == OFFLINE:
        return
    path = Path(source)
    on_hub = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
    if not on_hub and not path.exists():
        raise MissingFileError(f"{source}: no such checkpoint directory")


def read_text(path: Path) -> str:
    """Content of a text file, a pipe, or for ``-`` of standard input.

    Raises:
        MissingFileError: there is no such file.
        FormatError: it is a folder, or no UTF-8.
    """
    if str(path) == "-":
        data = sys.stdin.buffer.read()
    else:
        check_exists(path)
        if path.is_dir():
            raise FormatError(f"{path} is a folder, not a file")
        data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text ({error.reason}, byte {error.start})") from error


def _discard_output() -> None:
    """Discard buffered output, so that the interpreter can end in silence."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
