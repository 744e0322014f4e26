"""The training loop: loader → system → optimizer, with everything needed to stop and go on."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from bd3lm.config import TrainConfig
from bd3lm.data import Dataset, Loader, Prefetcher, Rows
from bd3lm.device import autocast, compute_dtype, keep_freed_memory, resolve_device
from bd3lm.errors import DivergedError, InterruptedRunError
from bd3lm.evaluate import (
    Likelihood,
    count_statistics,
    evaluate_likelihood,
    scoring_rows,
    search_clip,
)
from bd3lm.model import Transformer
from bd3lm.model.flops import peak_flops, step_flops
from bd3lm.systems import build_system
from bd3lm.training.ema import Ema
from bd3lm.training.interrupt import ctrl_c
from bd3lm.training.metrics import MetricsLog
from bd3lm.training.optim import Optimizers, lr_factor
from bd3lm.training.persistence import resume, save, start_from
from bd3lm.training.profile import AVERAGE, DATA, StepProfiler


class Reporter(Protocol):
    """What a run tells whoever is watching."""

    def step(self, done: int, metrics: dict[str, float]) -> None:
        """After every optimizer step; ``metrics`` holds the latest logged values."""

    def validation(self, step: int, result: Likelihood) -> None:
        """After every validation."""

    def scoring(self, done: int, total: int) -> None:
        """While the last validation runs, in rows."""

    def note(self, message: str) -> None:
        """Anything else worth a line."""


class Trainer:
    """One run: ``Trainer(cfg, train, valid, out).run()``.

    Args:
        cfg: the settings.
        train: prepared training data.
        valid: prepared validation data, with the same tokenizer.
        out: directory of the run; ``checkpoint/`` and ``metrics.jsonl`` go there.
        reporter: told what happens.
    """

    def __init__(
        self, cfg: TrainConfig, train: Dataset, valid: Dataset, out: Path, reporter: Reporter
    ) -> None:
        self.cfg, self.out, self.reporter = cfg, out, reporter
        self.valid, self.tokenizer = valid, train.tokenizer
        self.device = resolve_device(cfg.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.system = build_system(cfg, self.tokenizer.mask_id)
        self.system.fit_to_data(train)
        self.rows = Rows(
            train,
            seq_len=cfg.seq_len,
            block_size=cfg.block,
            plan=cfg.packing,
            row_eos=cfg.row_eos,
        )
        pinned = self.device.type == "cuda"
        self.loader = Loader(self.rows, cfg.batch_size, cfg.seed, pinned=pinned)
        self.parts = cfg.batch_size // (cfg.micro_batch or cfg.batch_size)
        self.batches = Prefetcher(self.loader, cfg.steps, self.parts)
        torch.manual_seed(cfg.seed)
        model = Transformer(cfg.model, self.tokenizer.vocab_size).use_attention(cfg.attention)
        model.recompute = cfg.recompute
        self.model = model.to(self.device)
        self.optimizers = Optimizers(self.model, cfg.optim)
        self.ema = Ema(self.model, cfg.optim.ema_decay)
        self.steps_done = 0
        self.seconds = 0.0
        self.last: dict[str, float] = {}
        self.profiler: StepProfiler | None = None
        self.metrics = MetricsLog(out / "metrics.jsonl")
        # Since the last logged line; the sum stays on the device until a line is due.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_steps = 0

    @property
    def checkpoint(self) -> Path:
        """Where the run's checkpoint stands."""
        return self.out / "checkpoint"

    @property
    def tokens_done(self) -> int:
        """Tokens of x0 trained on, each counted once (not once a stream)."""
        return self.steps_done * self.cfg.batch_size * self.cfg.seq_len

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the run's share of the machine's fastest matrix products."""
        dtype = compute_dtype(self.cfg, self.device)
        peak = peak_flops(self.device, dtype, torch.get_num_threads())
        flops = step_flops(self.cfg, self.tokenizer.vocab_size)
        return flops * self.steps_done / self.seconds / peak

    def run(self) -> None:
        """Train to the last step, saving on the way.

        Raises:
            InterruptedRunError: Ctrl-C; a checkpoint was written first.
            DivergedError: the loss became infinite or NaN.
        """
        cfg = self.cfg
        with ctrl_c() as pressed, closing(self.batches), frozen():
            while self.steps_done < cfg.steps:
                started = time.perf_counter()
                loss, norm = self.step() if self.profiler is None else self.profiler.run(self.step)
                self.loss_sum += loss
                self.loss_steps += 1
                # Before every checkpoint too: what is saved was seen to be finite.
                done = self.steps_done
                saves = done % cfg.checkpoint_every == 0 or done == cfg.steps
                seen = self._look(norm) if saves or done % cfg.log_every == 0 else None
                self.seconds += time.perf_counter() - started
                if seen is not None:
                    self._log(*seen)
                self.reporter.step(done, self.last)
                if cfg.eval.every and done % cfg.eval.every == 0 and done < cfg.steps:
                    self.validate(quick=True)
                if pressed or saves:
                    self.save()
                if pressed:
                    raise InterruptedRunError(
                        f"stopped after step {done} of {cfg.steps}; the run is saved. "
                        f"Go on with: bd3lm-train --out {self.out} --resume"
                    )

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; the host runs ahead of the device and never waits for it.

        Returns:
            The loss (nats a noisable token) and the norm of its gradient, on the device.
        """
        cfg, step = self.cfg, self.steps_done
        self.model.train()
        if cfg.model.dropout:
            torch.manual_seed((cfg.seed << 32) + step)  # a function of the step: resume is exact
        with record_function(DATA):
            batches = self.batches.get(step, self.system.noise(step))
        noisable = sum(batch.num_noisable for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            batch = batch.to(self.device)
            with autocast(cfg, self.device):
                loss = self.system.loss(self.model, batch) / noisable
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), cfg.optim.grad_clip, foreach=True
        )
        self.optimizers.step(lr_factor(step, cfg.steps, cfg.optim))
        with record_function(AVERAGE):
            self.ema.update()
        self.steps_done += 1
        self.system.update_noise_after_step(self.steps_done)
        return total, norm

    def validate(self, *, quick: bool) -> Likelihood:
        """Score the validation split with the averaged weights.

        Args:
            quick: only ``eval.rows`` rows; otherwise everything.
        """
        cfg = self.cfg.eval
        rows = scoring_rows(self.cfg, self.valid)
        with self.ema.applied(), autocast(self.cfg, self.device):
            result = evaluate_likelihood(
                self.system,
                self.model,
                rows,
                estimator=self.cfg.estimator,
                repeats=cfg.repeats,
                batch_size=cfg.batch_size,
                max_rows=cfg.rows if quick else None,
                num_bytes=self.valid.manifest.num_bytes,
                progress=None if quick else self.reporter.scoring,
            )
            clip = self._search_clip(rows) if self.cfg.noise.clip_search else {}
        line = {"step": self.steps_done, "val_nelbo": result.nelbo, "val_ppl": result.ppl}
        self.metrics.append(line | clip | ({} if result.bpb is None else {"val_bpb": result.bpb}))
        self.reporter.validation(self.steps_done, result)
        return result

    def _search_clip(self, rows: Rows) -> dict[str, Any]:
        """Go on with the clip of least variance; what to log of it."""
        noise = self.cfg.noise
        statistics = count_statistics(
            self.system,
            self.model,
            rows,
            max_rows=self.cfg.eval.rows,
            repeats=self.cfg.eval.repeats,
            batch_size=self.cfg.eval.batch_size,
        )
        clip, variance = search_clip(
            statistics,
            self.system.schedule,
            resample=noise.resample,
            count_probs=self.system.count_probs,
        )
        self.system.set_clip(clip)
        return {"clip": clip, "clip_variance": variance}

    # --- logging ----------------------------------------------------------------------------

    def _look(self, norm: Tensor) -> tuple[float, float]:
        """Mean loss since the last look, and the gradient's norm: one wait for the device."""
        total, last_norm = torch.stack([self.loss_sum, norm.double()]).tolist()
        mean = total / self.loss_steps
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean, last_norm

    def _log(self, mean: float, norm: float) -> None:
        if not math.isfinite(mean):
            raise DivergedError(
                f"the loss is {mean} at step {self.steps_done}; lower optim.lr or "
                f"optim.matrix-lr. The last checkpoint is {self.checkpoint}"
            )
        cfg = self.cfg
        self.last = {
            "loss": mean,
            "lr": cfg.optim.lr * lr_factor(self.steps_done - 1, cfg.steps, cfg.optim),
            "grad_norm": norm,
            "tokens_per_second": self.tokens_done / self.seconds,
            "mfu": self.mfu,
        }
        self.metrics.append({"step": self.steps_done, **self.last, "seconds": self.seconds})

    # --- saving and resuming ----------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint in place of the previous one."""
        save(self)

    def start_from(self, path: Path) -> None:
        """Begin with the averaged weights of another run; see :func:`persistence.start_from`."""
        start_from(self, path)

    def resume(self) -> None:
        """Continue from the run's checkpoint; see :func:`persistence.resume`."""
        resume(self)


@contextmanager
def frozen() -> Iterator[None]:
    """What exists already is not looked through for garbage.

    For what was imported alone, that took 3% of the steps of a tiny model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
