"""``bd3lm``: one command whose sub-commands are imported when they are called."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

COMMANDS = {
    "train": ("bd3lm.cli.train", "train a model on text, score it and draw samples"),
    "prepare": ("bd3lm.cli.prepare", "tokenize text into a data set"),
    "sample": ("bd3lm.cli.sample", "draw text from a checkpoint"),
    "eval": ("bd3lm.cli.evaluate", "perplexity and bits per byte of a text"),
    "judge": ("bd3lm.cli.judge", "quality and cost of samples"),
    "export": ("bd3lm.cli.export", "write a checkpoint in another layout, e.g. for SGLang"),
    "compare": ("bd3lm.cli.compare", "loss curves and results of several runs"),
    "paper": ("bd3lm_paper.cli", "tables and figures of the BD3-LM paper and its reproduction"),
}
"""Module and summary of each sub-command."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``bd3lm`` and of ``python -m bd3lm``."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else "--help"
    if name in COMMANDS:
        start(name, words[1:], f"bd3lm {name}")
        return
    from bd3lm.cli.common import run

    run(partial(_no_command, name))


def start(name: str, argv: list[str] | None = None, prog: str | None = None) -> None:
    """Call one command: ``bd3lm-NAME``, or ``bd3lm NAME``."""
    try:
        command = import_module(COMMANDS[name][0]).main
        command(argv, prog or f"bd3lm-{name}")
    except KeyboardInterrupt:  # before the command could handle it
        sys.stderr.write("stopped\n")
        sys.exit(130)


def _no_command(name: str) -> None:
    """Print the help or the version, or refuse an unknown word."""
    if name in ("--version", "-V"):
        from bd3lm import __version__

        print(f"bd3lm {__version__}")
        return
    if name in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
        print("Block-diffusion language models: train, score and sample.\n")
        print("usage: bd3lm COMMAND [OPTIONS]; bd3lm COMMAND --help lists the options\n")
        print("\n".join(lines))
        print("\n  --version prints the version of the package")
        return
    from bd3lm.config import check

    check(False, "command", name, f"one of {', '.join(COMMANDS)}")


train = partial(start, "train")
prepare = partial(start, "prepare")
sample = partial(start, "sample")
evaluate = partial(start, "eval")
judge = partial(start, "judge")
paper = partial(start, "paper")
