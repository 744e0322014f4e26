"""Runs of the tables: the settings of every system at a scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from bd3lm.config import NoiseConfig, ObjectiveConfig, TrainConfig
from bd3lm_paper.measures import Perplexity, Variance
from bd3lm_paper.scale import Scale
from bd3lm_paper.spec import Cell, Run

System = Literal["ar", "sedd", "mdlm", "bd3lm"]
Clip = tuple[float, float] | None

CLIPS: dict[int, Clip] = {16: (0.3, 0.8), 8: (0.4, 0.9), 4: (0.5, 1.0)}
"""Clips of the fine-tuned BD3-LMs: those of the paper's Table 2, and for S = 8 that of the
original work, which Table 2 leaves out."""


class Recipes:
    """Builds the runs of one scale from the vocabulary of the tables."""

    def __init__(
        self, scale: Scale, evaluator: str | None = None, vocab_size: int = 50_258
    ) -> None:
        self.scale, self.evaluator, self.vocab_size = scale, evaluator, vocab_size

    def train(
        self, system: System, corpus: str, block: int, phases: tuple[int, ...], **noise: Any
    ) -> TrainConfig:
        """Settings of a run as long as these phases of the paper; ``block`` 0 means L."""
        scale = self.scale
        seq_len = scale.seq_len(corpus)
        base = scale.base
        model = base.model
        if system == "ar":
            model = replace(model, cond_width=0, time_conditioning=False)
        elif system == "sedd":
            model = replace(model, cond_width=model.cond_width or 64, time_conditioning=True)
        return replace(
            base,
            system=system,
            seq_len=seq_len,
            block_size=block or seq_len,
            batch_size=scale.batch_size(corpus),
            steps=sum(scale.steps(phase) for phase in phases),
            model=model,
            noise=NoiseConfig() if system == "ar" else NoiseConfig(estimator="bernoulli", **noise),
        )

    def scratch(
        self, system: System, corpus: str, phases: tuple[int, ...], block: int = 0, **noise: Any
    ) -> Run:
        """Settings of a run from scratch."""
        block = 1 if system == "ar" else block
        return Run(self.train(system, corpus, block, phases, **noise), corpus)

    def tuned(
        self,
        corpus: str,
        block: int,
        steps: tuple[int, int],
        *,
        pretraining: dict[str, Any] | None = None,
        clip: Clip = None,
        **noise: Any,
    ) -> Run:
        """A BD3-LM: pretrained at S = L, then fine-tuned at ``block`` (0: L)."""
        first = self.scratch("bd3lm", corpus, steps[:1], **(pretraining or {}))
        # At S = L `resample` would force a few dozen tokens into an interval: it changes nothing.
        resample = clip is not None and block != 0
        config = self.train(
            "bd3lm", corpus, block, steps[1:], clip=clip, resample=resample, **noise
        )
        return Run(config, corpus, init=first)

    def perplexity(
        self, run: Run, paper: float | None = None, original: float | None = None
    ) -> Cell:
        """PPL by the unclipped NELBO, for any training noise."""
        return Cell(run, Perplexity(rows=self.scale.valid_rows), "ppl", paper, original)

    def variance(self, run: Run, paper: float | None) -> Cell:
        """Var. NELBO under the run's own noise."""
        return Cell(run, Variance(batches=self.scale.variance_batches), "variance", paper)

    def perplexity_and_variance(
        self, run: Run, ppl: float | None, variance: float | None
    ) -> dict[str, Cell]:
        """Cells of a table of noise by their columns, with the paper's values."""
        return {"PPL": self.perplexity(run, ppl), "Var. NELBO": self.variance(run, variance)}


def joint(run: Run) -> Run:
    """A BD3-LM's run with a causal clean stream and the next-token loss, its ancestors' too."""
    model = replace(run.config.model, clean_stream="causal")
    config = replace(run.config, model=model, objective=ObjectiveConfig(ar_weight=1.0))
    return replace(run, config=config, init=None if run.init is None else joint(run.init))


def six_models(
    r: Recipes, corpus: str, steps: tuple[int, int], papers: list[float | None]
) -> list[tuple[str, Run, float | None]]:
    """The six models of tables 3, 4 and 7, at equal steps."""
    runs: list[tuple[str, Run]] = [
        ("AR", r.scratch("ar", corpus, steps)),
        ("SEDD", r.scratch("sedd", corpus, steps)),
        ("MDLM", r.scratch("mdlm", corpus, steps)),
    ]
    runs += [
        (f"BD3-LM S = {block}", r.tuned(corpus, block, steps, clip=CLIPS[block]))
        for block in (16, 8, 4)
    ]
    return [(label, run, paper) for (label, run), paper in zip(runs, papers, strict=True)]


def interval(clip: Clip) -> str:
    """Notation of a clip: U[a, b]."""
    low, high = clip or (0.0, 1.0)
    return f"U[{low:g}, {high:g}]"
