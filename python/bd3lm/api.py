"""The functions behind ``import bd3lm``: train a model, open it, generate text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bd3lm import checkpoint
from bd3lm.cli.common import PlainConsole
from bd3lm.cli.progress import RichReporter
from bd3lm.config import SampleConfig, TrainConfig, check
from bd3lm.data import Tokenizer
from bd3lm.device import inference, resolve_device
from bd3lm.sample import Sample, Sampler
from bd3lm.sample.events import BlockEvent
from bd3lm.sample.prompts import Prompt
from bd3lm.sample.replay import Recording, record
from bd3lm.training import Callback, Reporter, run_training


@dataclass(frozen=True)
class Checkpoint(checkpoint.Checkpoint):
    """A trained model that generates text.

    See :class:`bd3lm.checkpoint.Checkpoint` for its parts: ``config``, ``model``, ``tokenizer``.
    ``model(ids, block_size)`` returns the logits of a batch.
    """

    _samplers: dict[int | None, Sampler] = field(default_factory=dict, repr=False, compare=False)

    def generate(
        self, prompt: Prompt = "", *, block_size: int | None = None, **settings: Any
    ) -> list[Sample]:
        """Draw samples that begin with a prompt.

        Examples:
            >>> run = bd3lm.load_checkpoint("runs/demo")  # doctest: +SKIP
            >>> run.generate("The old house", num=3)  # doctest: +SKIP

        Args:
            prompt: a text, or a sequence of token ids, texts and holes (None) to fill.
            block_size: S; None: the trained one.
            settings: of :class:`bd3lm.SampleConfig`: ``num``, ``length``, ``temperature``, …

        Returns:
            ``num`` samples; ``sample.text`` is the text.

        Raises:
            ConfigError: a setting that does not exist or is out of range, or a prompt that leaves
                no room.
        """
        cfg = _sample_config(settings)
        with self._arithmetic():
            return self._sampler(block_size).generate(cfg, [prompt])

    def stream(
        self, prompt: Prompt = "", *, block_size: int | None = None, **settings: Any
    ) -> Iterator[BlockEvent]:
        """Yield each forward and each finished block of :meth:`generate`; same arguments."""
        cfg = _sample_config(settings)
        with self._arithmetic():
            yield from self._sampler(block_size).stream(cfg, [prompt], every_step=True)

    def record(
        self, prompt: Prompt = "", *, block_size: int | None = None, **settings: Any
    ) -> Recording:
        """Draw one sample and keep each forward; same arguments and errors as :meth:`generate`.

        Returns:
            A recording, which a notebook plays and ``save`` writes as ``.html`` or ``.gif``.
        """
        cfg = _sample_config(settings)
        with self._arithmetic():
            return Recording(list(record(self._sampler(block_size), cfg, prompt)))

    def _arithmetic(self) -> Any:
        return inference(self.config, self._device)[1]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _sampler(self, block_size: int | None) -> Sampler:
        if block_size not in self._samplers:
            dtype, _ = inference(self.config, self._device)
            self._samplers[block_size] = Sampler.from_checkpoint(self, block_size, dtype)
        return self._samplers[block_size]


def load_checkpoint(
    source: Path | str, device: str = "auto", tokenizer: Tokenizer | str | None = None
) -> Checkpoint:
    """Open a trained model.

    Args:
        source: a run's directory or its ``checkpoint/``, a checkpoint of the original
            implementation, or the name of one on the Hugging Face hub. No code from there is run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        tokenizer: for a checkpoint that carries none; None: ``gpt2``.

    Raises:
        MissingFileError: nothing of that name.
        CheckpointError: it is not a checkpoint, or it is damaged.
    """
    loaded = checkpoint.load_checkpoint(source, resolve_device(device), tokenizer)
    return Checkpoint(**{f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)})


def train(
    config: TrainConfig,
    out: Path | str,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train a model, score its validation text and draw samples.

    Args:
        config: the settings, e.g. ``bd3lm.preset("demo", data="book.txt", steps=200)``.
        out: directory of the run; must be new or empty unless ``resume``.
        resume: continue the run in ``out`` with its own settings.
        reporter: receives progress (:class:`bd3lm.training.Reporter`); None: a progress bar.
        callbacks: follow the metrics (:class:`bd3lm.training.Callback`).

    Returns:
        Content of ``out/summary.json``: steps, speed, NELBO, bits per byte and where the
        checkpoint is.

    Raises:
        Bd3lmError: bad settings or data, before training starts.
    """
    if reporter is not None:
        return run_training(config, Path(out), reporter, resume=resume, callbacks=callbacks)
    with RichReporter(PlainConsole(), config.steps) as bar:
        return run_training(config, Path(out), bar, resume=resume, callbacks=callbacks)


def _sample_config(settings: dict[str, Any]) -> SampleConfig:
    known: Sequence[str] = [f.name for f in dataclasses.fields(SampleConfig)]
    for name in settings:
        check(name in known, name, settings[name], f"a setting: one of {', '.join(known)}")
    return SampleConfig(**settings)
