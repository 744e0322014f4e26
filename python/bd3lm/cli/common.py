"""What every command does around its work: errors as one sentence, and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from bd3lm.errors import Bd3lmError


def run(command: Callable[[], None]) -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2.

    Ctrl-C is exit code 130, with one line that says what was kept.
    """
    try:
        command()
    except Bd3lmError as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; nothing half-written was kept")
        sys.exit(130)
