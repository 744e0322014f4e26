"""Samples while they are drawn: forwards in a terminal, finished blocks elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.live import Live
from rich.text import Text

from bd3lm.cli.common import PlainConsole
from bd3lm.sample.replay import Frame

STYLES = {"given": "dim", "drawn": "", "masked": "bright_black"}
NEW = {"sure": "bold blue", "likely": "bold cyan underline", "unsure": "bold yellow underline"}
"""Styles of new tokens by the model's confidence; the two less certain ones are underlined."""


def show(frames: Iterable[Frame], console: PlainConsole, fps: float) -> None:
    """Show one sample as it grows.

    Args:
        frames: of :func:`bd3lm.sample.replay.record`.
        console: where; if it is no terminal, text is written block by block.
        fps: frames a second, at most; 0: no limit.
    """
    if console.is_terminal:
        _play(frames, console, fps)
    else:
        _write(frames, console)


def _play(frames: Iterable[Frame], console: PlainConsole, fps: float) -> None:
    due = time.monotonic()
    with Live(console=console, auto_refresh=False) as view:
        for frame in frames:
            text = Text()
            for piece in frame.pieces:
                style = NEW[frame.level] if piece.kind == "new" else STYLES[piece.kind]
                text.append(piece.text, style=style)
            if frame.sample is None:  # lines that do not fit are cut at the top, until the end
                lines = text.wrap(console, console.width)
                text = Text("\n").join(lines[-max(console.height - 2, 1) :])
            else:
                view.vertical_overflow = "visible"
            text.append(f"\n[{frame.caption}]", style="dim")
            if fps > 0:
                time.sleep(max(due - time.monotonic(), 0.0))
                due = max(due, time.monotonic()) + 1 / fps
            view.update(text, refresh=True)


def _write(frames: Iterable[Frame], console: PlainConsole) -> None:
    written = 0
    for frame in frames:
        if not frame.complete:
            continue
        text = frame.text
        if frame.sample is None:  # the rest of a character may be in the next block
            text = text.split("░")[0].rstrip("\ufffd")
        console.file.write(text[written:])
        console.file.flush()
        written = max(written, len(text))
    console.file.write("\n")
