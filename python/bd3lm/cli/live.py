"""Samples while they are drawn: blocks that denoise in a terminal, elsewhere finished ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bd3lm.config import SampleConfig
from bd3lm.data import Tokenizer
from bd3lm.sample import Sampler

HIDDEN = "░"
"""Stands for a masked token."""


def show(
    sampler: Sampler,
    cfg: SampleConfig,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    """Draw ``cfg.num`` samples one after the other, each as it grows.

    In a terminal every forward is shown, with masks where tokens are missing. Elsewhere a sentence
    on the error stream says so, and the text comes block by block.
    """
    if not console.is_terminal:
        Console(stderr=True).print("--live: not a terminal, so blocks are written when finished")
    one = dataclasses.replace(cfg, num=1)
    for number in range(cfg.num):
        if console.is_terminal:
            _denoise(sampler, one, prompt, tokenizer, console, number)
        else:
            _write(sampler, one, prompt, tokenizer, console, number)


def _denoise(
    sampler: Sampler,
    cfg: SampleConfig,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    console: Console,
    number: int,
) -> None:
    ids = [sampler.bos_id, *prompt]
    with Live(console=console, auto_refresh=False) as view:
        for event in sampler.stream(cfg, [prompt], first=number, every_step=True):
            block = event.blocks[number]
            ids[event.start :] = block
            shown = _text(ids[1:], sampler.mask_id, tokenizer)
            sample = event.ended.get(number)
            if sample is not None:
                shown = Text(tokenizer.decode(sample.ids))
                forwards = f"{len(sample.ids)} tokens, {sample.nfe} forwards"
                shown.append(f"\n[{forwards}, ended by {sample.stop}]", style="dim")
            else:  # what no longer fits is left out at the top, until the end
                lines = shown.wrap(console, console.width)
                shown = Text("\n").join(lines[-(console.height - 1) :])
            view.update(shown, refresh=True)
            if sample is not None:
                view.vertical_overflow = "visible"


def _text(ids: Sequence[int], mask_id: int, tokenizer: Tokenizer) -> Text:
    """Known tokens as text, each hidden one as a mark."""
    text, run = Text(), []
    for token in [*ids, mask_id]:
        if token != mask_id:
            run.append(token)
            continue
        text.append(tokenizer.decode(run))
        text.append(HIDDEN, style="bold cyan")
        run = []
    return text[:-1]


def _write(
    sampler: Sampler,
    cfg: SampleConfig,
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    console: Console,
    number: int,
) -> None:
    ids = [sampler.bos_id, *prompt]
    written = 0
    for event in sampler.stream(cfg, [prompt], first=number):
        ids[event.start :] = event.blocks[number]
        sample = event.ended.get(number)
        text = tokenizer.decode(ids[1:] if sample is None else sample.ids)
        if sample is None:  # the rest of a character may be in the next block
            text = text.rstrip("\ufffd")
        console.file.write(text[written:])
        console.file.flush()
        written = max(written, len(text))
    console.file.write("\n")
