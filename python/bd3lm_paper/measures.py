"""Measurements of a trained model. A measure is a dataclass of settings with a ``take`` method."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import LikelihoodName, SampleConfig
from bd3lm.data import Dataset
from bd3lm.evaluate import evaluate_likelihood, nelbo_variance, scoring_rows
from bd3lm.evaluate.generative import CausalLM, generative_perplexity
from bd3lm.sample import Sample, Sampler
from bd3lm.sample.stopping import token_entropy
from bd3lm.training import read_metrics

Values = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A finished run with its texts.

    Attributes:
        loaded: its averaged weights.
        folder: its directory, with ``metrics.jsonl``.
        valid: held-out text of its own corpus.
        text: held-out text of another role, tokenized with the run's tokenizer; None where no
            text was given for it.
    """

    loaded: Checkpoint
    folder: Path
    valid: Dataset
    text: Callable[[str], Dataset | None]


@dataclass(frozen=True)
class Perplexity:
    """PPL by the unclipped NELBO of the averaged weights (docs/math.md §4).

    Attributes:
        rows: at most so many rows, spread over the set; None: all.
        repeats: forwards of the stratified estimator, above S = 4.
    """

    rows: int | None
    repeats: int = 8

    kind = "perplexity"
    texts = ()
    likelihood: ClassVar[LikelihoodName] = "nelbo"

    def take(self, trained: Trained) -> Values:
        """Return ``ppl``, ``nelbo``, its errors, and nats and tokens of every row."""
        return self._score(trained, trained.valid)

    def _score(self, trained: Trained, data: Dataset) -> Values:
        cfg, system = trained.loaded.config, trained.loaded.system()
        rows = scoring_rows(cfg, data)
        result = evaluate_likelihood(
            system,
            trained.loaded.model,
            rows,
            likelihood=self.likelihood,
            estimator=cfg.estimator,
            repeats=self.repeats,
            max_rows=self.rows,
            batch_size=16,
        )
        return {
            **result.to_dict(),
            "row_nats": [round(float(x), 4) for x in result.row_nats],
            "row_tokens": result.row_tokens.tolist(),
        }


@dataclass(frozen=True)
class Marginal(Perplexity):
    """Exact likelihood of the first-hitting sampler, for bd3lm with S <= 8."""

    kind = "marginal"
    likelihood = "marginal"

    def take(self, trained: Trained) -> Values:
        """Return also ``gap``: by how many nats a token the NELBO of the same forwards is above."""
        values = self._score(trained, trained.valid)
        return values | {"gap": values["nelbo"] - values["nll"]}


@dataclass(frozen=True)
class ZeroShot(Perplexity):
    """PPL on text of another role.

    Attributes:
        role: ``zero_lm1b``, ``lambada`` or ``wikitext``.
    """

    role: str = ""

    kind = "zero_shot"

    @property
    def texts(self) -> tuple[str, ...]:
        """Role of the text."""
        return (self.role,)

    def take(self, trained: Trained) -> Values:
        """Return the values of :class:`Perplexity`, or nothing if no text was given."""
        data = trained.text(self.role)
        return {} if data is None else self._score(trained, data)


@dataclass(frozen=True)
class Variance:
    """Var. NELBO (docs/math.md §6) under the run's own levels.

    Attributes:
        batches: how many.
        batch_size: rows of each.
    """

    batches: int
    batch_size: int = 16

    kind = "variance"
    texts = ()

    def take(self, trained: Trained) -> Values:
        """Return ``variance``."""
        cfg, system = trained.loaded.config, trained.loaded.system()
        rows = scoring_rows(cfg, trained.valid)
        variance = nelbo_variance(
            system,
            trained.loaded.model,
            rows,
            system.noise(0),
            batches=self.batches,
            batch_size=self.batch_size,
        )
        return {"variance": variance}


@dataclass(frozen=True)
class Generated:
    """Quality and cost of samples (docs/math.md §8).

    Attributes:
        num: samples.
        length: tokens of each, at most.
        top_p: nucleus.
        evaluator: the judge; None: none.
        steps: as of :class:`~bd3lm.config.SampleConfig`.
        tokens_per_forward: as there.
    """

    num: int
    length: int
    top_p: float = 0.9
    evaluator: str | None = None
    steps: int | None = None
    tokens_per_forward: int = 1

    kind = "samples"
    texts = ()

    def take(self, trained: Trained) -> Values:
        """Return ``entropy``, ``nfe``, ``nfe_paper``, ``ms_per_token``, texts and ``gen_ppl``."""
        config = SampleConfig(
            num=self.num,
            length=self.length,
            top_p=self.top_p,
            steps=self.steps,
            tokens_per_forward=self.tokens_per_forward,
        )
        draw(trained, replace(config, num=1, steps=self.steps and 1))  # the first is never timed
        samples = draw(trained, config)
        tokens = sum(len(sample.ids) for sample in samples)
        texts = [trained.loaded.tokenizer.decode(sample.ids) for sample in samples]
        judged = {}
        if self.evaluator is not None:
            judge = _judge(self.evaluator)
            judged = generative_perplexity(judge, texts).to_dict()
        return {
            **judged,
            "nfe": statistics.fmean(sample.nfe for sample in samples),
            "nfe_paper": statistics.fmean(sample.nfe_paper for sample in samples),
            "entropy": statistics.fmean(token_entropy(sample.ids) for sample in samples),
            "ms_per_token": 1000 * max(sample.seconds for sample in samples) / tokens,
            "samples": texts,
        }


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents sampled until they end.

    Attributes:
        num: documents.
        length: largest number of tokens.
    """

    num: int
    length: int

    kind = "lengths"
    texts = ()

    def take(self, trained: Trained) -> Values:
        """Return ``median``, ``max``, ``lengths`` and the number of rows by stop reason."""
        samples = draw(trained, SampleConfig(num=self.num, length=self.length))
        lengths = [len(sample.ids) for sample in samples]
        stops = [sample.stop for sample in samples]
        return {
            "median": statistics.median(lengths),
            "max": max(lengths),
            "lengths": lengths,
            **{stop: stops.count(stop) for stop in ("eos", "degenerate", "length")},
        }


@dataclass(frozen=True)
class Curve:
    """Training NLL over steps."""

    kind = "curve"
    texts = ()

    def take(self, trained: Trained) -> Values:
        """``steps``, ``loss`` and ``last``, the mean of the last tenth."""
        lines = read_metrics(trained.folder / "metrics.jsonl")
        points = [(m["step"], m["loss"]) for m in lines if m.get("loss") is not None]
        steps, loss = (list(x) for x in zip(*points, strict=True))
        tail = loss[-max(len(loss) // 10, 1) :]
        return {"steps": steps, "loss": loss, "last": statistics.fmean(tail)}


@dataclass(frozen=True)
class Cost:
    """Cost of the last phase of a training."""

    kind = "cost"
    texts = ()

    def take(self, trained: Trained) -> Values:
        """Return ``steps``, ``tokens`` and ``seconds`` (median time of a step times their number).

        The median ignores other work of the machine.
        """
        cfg = trained.loaded.config
        lines = read_metrics(trained.folder / "metrics.jsonl")
        seen = [(m["step"], m["seconds"]) for m in lines if "seconds" in m]
        steps, seconds = np.diff([(0, 0.0), *seen], axis=0).T
        tokens = cfg.steps * cfg.batch_size * cfg.seq_len
        median = float(np.median(seconds / steps))
        return {"steps": cfg.steps, "tokens": tokens, "seconds": median * cfg.steps}


@dataclass(frozen=True)
class Autoregressive:
    """A perplexity of the same weights as an autoregressive model, for a causal clean stream.

    Attributes:
        of: the perplexity.
    """

    of: Perplexity

    @property
    def kind(self) -> str:
        """Name in records."""
        return f"{self.of.kind} as AR"

    @property
    def texts(self) -> tuple[str, ...]:
        """Roles of the texts it reads."""
        return self.of.texts

    def take(self, trained: Trained) -> Values:
        """Return the values of :class:`Perplexity`; ``nelbo`` is the exact likelihood."""
        return self.of.take(replace(trained, loaded=trained.loaded.as_autoregressive()))


AnyMeasure = Perplexity | Variance | Generated | Lengths | Curve | Cost | Autoregressive


def draw(trained: Trained, config: SampleConfig) -> list[Sample]:
    """Samples of a trained model, all rows at once."""
    return Sampler.from_checkpoint(trained.loaded).generate(config)


@cache
def _judge(name: str) -> CausalLM:
    """A causal language model, loaded once."""
    return CausalLM(name, torch.device("cpu"))
