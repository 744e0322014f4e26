"""Scores of the validation split while training, at each block size; and the search for clips."""

from __future__ import annotations

from typing import Any

from bd3lm.config import TrainConfig
from bd3lm.data import Dataset, Rows
from bd3lm.evaluate import (
    Likelihood,
    count_statistics,
    evaluate_likelihood,
    scoring_rows,
    search_clip,
)
from bd3lm.model import Transformer
from bd3lm.ranks.group import Ranks
from bd3lm.systems import BlockDiffusion, System
from bd3lm.training.reporter import Reporter


class Validation:
    """Scores the models of a run.

    Args:
        cfg: the settings of the run.
        valid: prepared validation data.
        system: of the run; a clip that is searched is set in it.
        reporter: receives the progress of a full validation.
        ranks: each scores a part of the rows.
    """

    def __init__(
        self, cfg: TrainConfig, valid: Dataset, system: System, reporter: Reporter, ranks: Ranks
    ) -> None:
        self.cfg, self.valid, self.system = cfg, valid, system
        self.reporter, self.ranks = reporter, ranks
        self._step = 0

    def score(
        self, model: Transformer, step: int, *, quick: bool
    ) -> tuple[Likelihood, dict[str, Any]]:
        """Score a model, and search the clip where the settings say so.

        Args:
            model: with the averaged weights.
            step: after which it is scored.
            quick: only ``eval.rows`` rows; otherwise everything.

        Returns:
            The likelihood at the run's own block size, and the fields to log.
        """
        self._step = step
        cfg, rows = self.cfg.eval, scoring_rows(self.cfg, self.valid)
        result = evaluate_likelihood(
            self.system,
            model,
            rows,
            estimator=self.cfg.estimator,
            repeats=cfg.repeats,
            batch_size=cfg.batch_size,
            max_rows=cfg.rows if quick else cfg.final_rows,
            num_bytes=self.valid.manifest.num_bytes,
            progress=self._quickly if quick else self._fully,
            ranks=self.ranks,
        )
        line = {"val_nelbo": result.nelbo, "val_ppl": result.ppl}
        found = self._of_every_size(model, rows)
        return result, line | found | ({} if result.bpb is None else {"val_bpb": result.bpb})

    def _of_every_size(self, model: Transformer, rows: Rows) -> dict[str, Any]:
        """Search the clip, if it is searched, and score the other block sizes of the run.

        Args:
            model: with the averaged weights.
            rows: of the run's own block size.

        Returns:
            The fields to log; those of other block sizes end with ``_S`` and the size.
        """
        system, cfg = self.system, self.cfg
        found = self._search_clip(system, model, rows) if cfg.noise.clip_search else {}
        if not isinstance(system, BlockDiffusion):
            return found
        for size in system.sizes:
            if size == cfg.block:
                continue
            alone = cfg.with_block(size)
            of_size, rows = system.at(size), scoring_rows(alone, self.valid)
            score = evaluate_likelihood(
                of_size,
                model,
                rows,
                estimator=alone.estimator,
                repeats=cfg.eval.repeats,
                batch_size=cfg.eval.batch_size,
                max_rows=cfg.eval.rows,
                progress=self._quickly,
                ranks=self.ranks,
            )
            fields = {"val_nelbo": score.nelbo}
            if cfg.noise.clip_search:
                fields |= self._search_clip(of_size, model, rows)
            found |= {f"{name}_S{size}": value for name, value in fields.items()}
        return found

    def _search_clip(self, system: System, model: Transformer, rows: Rows) -> dict[str, Any]:
        """Train on with the clip of least variance; returns the fields to log."""
        noise = self.cfg.noise
        statistics = count_statistics(
            system,
            model,
            rows,
            ranks=self.ranks,
            max_rows=self.cfg.eval.rows,
            repeats=self.cfg.eval.repeats,
            batch_size=self.cfg.eval.batch_size,
        )
        clip, variance = search_clip(
            statistics,
            system.schedule,
            resample=noise.resample,
            count_probs=system.count_probs,
        )
        system.set_clip(clip)
        return {"clip": clip, "clip_variance": variance}

    def _quickly(self, done: int, total: int) -> None:
        self.ranks.beat(f"after step {self._step}, {done} of {total} rows validated")

    def _fully(self, done: int, total: int) -> None:
        self._quickly(done, total)
        self.reporter.scoring(done, total)
