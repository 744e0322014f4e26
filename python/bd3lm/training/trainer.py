"""The training loop: loader → system → optimizer; when to log, to save, to stop, to go back."""

from __future__ import annotations

import gc
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from bd3lm.checkpoint.steps import FOLDER, StepFolders
from bd3lm.config import TrainConfig
from bd3lm.data import Batch, Dataset, Loader, Prefetcher, Rows
from bd3lm.device import autocast, compute_dtype, keep_freed_memory, resolve_device
from bd3lm.errors import (
    Bd3lmError,
    CorruptError,
    DiskFullError,
    DivergedError,
    InterruptedRunError,
    StorageError,
)
from bd3lm.evaluate import (
    Likelihood,
    count_statistics,
    evaluate_likelihood,
    scoring_rows,
    search_clip,
)
from bd3lm.model import Transformer
from bd3lm.model.flops import peak_flops, step_flops
from bd3lm.systems import BlockDiffusion, System, build_system
from bd3lm.training.ema import Ema
from bd3lm.training.guard import StepGuard, Window
from bd3lm.training.interrupt import deferred
from bd3lm.training.metrics import MetricsLog
from bd3lm.training.optim import Optimizers, clip_gradients, lr_factor
from bd3lm.training.persistence import DataWatch, digest_of, resume, save, start_from
from bd3lm.training.profile import AVERAGE, DATA, StepProfiler
from bd3lm.training.reporter import Reporter


class Trainer:
    """One run: ``Trainer(cfg, train, valid, out).run()``.

    Args:
        cfg: the settings.
        train: prepared training data.
        valid: prepared validation data, with the same tokenizer.
        out: directory of the run, for ``checkpoint/`` and ``metrics.jsonl``; it exists.
        reporter: receives the events.
    """

    def __init__(
        self, cfg: TrainConfig, train: Dataset, valid: Dataset, out: Path, reporter: Reporter
    ) -> None:
        self.cfg, self.out, self.reporter = cfg, out, reporter
        self.train, self.valid = train, valid
        self.tokenizer = train.tokenizer
        self.device = resolve_device(cfg.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.system = build_system(cfg, self.tokenizer.mask_id)
        self.system.fit_to_data(train)
        self.rows = Rows(
            train,
            seq_len=cfg.seq_len,
            block_size=cfg.largest_block,
            packing=cfg.packing,
            row_eos=cfg.row_eos,
        )
        pinned = self.device.type == "cuda"
        self.loader = Loader(self.rows, cfg.batch_size, cfg.seed, pinned=pinned)
        self.parts = cfg.batch_size // (cfg.micro_batch or cfg.batch_size)
        self.watch = DataWatch(train, valid)
        digests = {"train": digest_of(train), "valid": digest_of(valid)}
        self.data_digests = {split: d for split, d in digests.items() if d is not None}
        use_device = partial(torch.cuda.set_device, self.device) if pinned else None
        self.batches = Prefetcher(self.loader, cfg.steps, self.parts, use_device)
        torch.manual_seed(cfg.seed)
        model = Transformer(cfg.model, self.tokenizer.vocab_size).use_attention(cfg.attention)
        model.recompute = cfg.recompute
        if self.device.type == "cuda" if cfg.compile is None else cfg.compile:
            model.compile_blocks()
        self.model = model.to(self.device)
        self.optimizers = Optimizers(self.model, cfg.optim)
        self.ema = Ema(self.model, cfg.optim.ema_decay)
        self.guard = StepGuard(self.device)
        self.metrics = MetricsLog(out / "metrics.jsonl")
        self.checkpoints = StepFolders(self.checkpoint, cfg.keep)
        self.profiler: StepProfiler | None = None
        self.steps_done = 0
        self.saved_step = -1
        self.seconds = 0.0
        self.last: dict[str, float] = {}
        self.best: float | None = None
        self._saved_at = time.monotonic()
        self._rewound = False

    @property
    def checkpoint(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.out / FOLDER

    @property
    def tokens_done(self) -> int:
        """Tokens of x0 trained on, each counted once (not once a stream)."""
        return self.steps_done * self.cfg.batch_size * self.cfg.seq_len

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second; 0 where the clock has not moved."""
        return self.tokens_done / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the run's share of the machine's fastest matrix products."""
        dtype = compute_dtype(self.cfg, self.device)
        peak = peak_flops(self.device, dtype, torch.get_num_threads()) * self.seconds
        flops = step_flops(self.cfg, self.tokenizer.vocab_size)
        return flops * self.steps_done / peak if peak else 0.0

    def run(self) -> None:
        """Train to the last step, saving checkpoints.

        Raises:
            InterruptedRunError: a signal; a checkpoint was written first.
            DivergedError: steps, or the weights after them, are not finite even after
                going back to a checkpoint.
            CorruptError: the data was changed meanwhile.
        """
        steps = self.cfg.steps
        self._saved_at = time.monotonic()
        with deferred() as signals, closing(self.batches), frozen():
            while self.steps_done < steps and not signals:
                window = self._timed_step()
                if window is None or not self._rewind_if_diverged(window):
                    self._after_step(window)
            if signals:
                self.save()
                raise InterruptedRunError(
                    f"stopped after step {self.steps_done} of {steps}; the run is saved. "
                    f"Continue it with: {resume_command(self.out)}",
                    signals[0],
                )

    def _after_step(self, window: Window | None) -> None:
        """Log, validate and save, each when it is due."""
        cfg, done = self.cfg, self.steps_done
        if window is not None:
            self._log(window)
        self.reporter.step(done, self.last)
        best = False
        if cfg.eval.every and done % cfg.eval.every == 0 and done < cfg.steps:
            best = self._is_best(self.validate(quick=True).nelbo)
        if best or self._saves(done) or self._minutes_passed():
            self.save(best=best)

    def _timed_step(self) -> Window | None:
        """Run a step; returns the window that it ends, if a line of metrics is due."""
        started = time.perf_counter()
        try:
            _, norm = self.step() if self.profiler is None else self.profiler.run(self.step)
        except Exception:
            self._check_data()  # the likelier cause of a failed step
            raise
        done = self.steps_done
        due = self._saves(done) or done % self.cfg.log_every == 0
        window = self.guard.look(norm) if due else None
        self.seconds += time.perf_counter() - started
        if window is not None:
            self._check_data()
        return window

    def step(self) -> tuple[Tensor, Tensor]:
        """Run one optimizer step; the host runs ahead of the device and never waits for it.

        Where the loss or the gradient is not finite, the weights and the optimizer's state stay
        as they are, and the step is counted as skipped.

        Returns:
            The loss (nats a noisable token) and the norm of its gradient, on the device.
        """
        cfg, step = self.cfg, self.steps_done
        self.model.train()
        with record_function(DATA):
            batches = self.batches.get(step, self.system.noise)
        try:
            total = self._accumulate(batches)
        except Exception as error:
            if not self.model.compiles_blocks or isinstance(error, torch.OutOfMemoryError):
                raise
            # If the compiler was not the cause, the same error comes again without it.
            self.model.compile_blocks(False)
            self.optimizers.zero_grad()
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.reporter.note(f"compile: off from now on, since the compiler failed ({reason})")
            total = self._accumulate(batches)
        if not self.guard.names:
            named = self.model.named_parameters()
            self.guard.names = [name for name, p in named if p.grad is not None]
        norms, norm = clip_gradients(list(self.model.parameters()), cfg.optim.grad_clip)
        finite = self.guard.judge(step + 1, total, norms, norm)
        self.optimizers.step(lr_factor(step, cfg.steps, cfg.optim), finite)
        with record_function(AVERAGE):
            self.ema.update()
        self.steps_done += 1
        self.system.update_noise_after_step(self.steps_done)
        return total, norm

    def _accumulate(self, batches: list[Batch]) -> Tensor:
        """Add the gradient of a step's loss to the parameters'; returns the loss on the device."""
        cfg = self.cfg
        if cfg.model.dropout:
            torch.manual_seed(dropout_seed(cfg.seed, self.steps_done))
        noisable = sum(batch.num_noisable for batch in batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            batch = batch.to(self.device)
            with autocast(cfg, self.device):
                loss = self.system.loss(self.model, batch) / noisable
            loss.backward()
            total += loss.detach()
        return total

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
                max_rows=cfg.rows if quick else cfg.final_rows,
                num_bytes=self.valid.manifest.num_bytes,
                progress=None if quick else self.reporter.scoring,
            )
            found = self._of_every_size(rows)
        line = {"step": self.steps_done, "val_nelbo": result.nelbo, "val_ppl": result.ppl}
        self._write(line | found | ({} if result.bpb is None else {"val_bpb": result.bpb}))
        self.reporter.validation(self.steps_done, result)
        return result

    def _of_every_size(self, rows: Rows) -> dict[str, Any]:
        """Search the clip, if it is searched, and score the other block sizes of the run.

        Args:
            rows: of the run's own block size.

        Returns:
            The fields to log; those of other block sizes end with ``_S`` and the size.
        """
        system, cfg = self.system, self.cfg
        found = self._search_clip(system, rows) if cfg.noise.clip_search else {}
        if not isinstance(system, BlockDiffusion):
            return found
        for size in system.sizes:
            if size == cfg.block:
                continue
            alone = cfg.with_block(size)
            of_size, rows = system.at(size), scoring_rows(alone, self.valid)
            score = evaluate_likelihood(
                of_size,
                self.model,
                rows,
                estimator=alone.estimator,
                repeats=cfg.eval.repeats,
                batch_size=cfg.eval.batch_size,
                max_rows=cfg.eval.rows,
            )
            fields = {"val_nelbo": score.nelbo}
            if cfg.noise.clip_search:
                fields |= self._search_clip(of_size, rows)
            found |= {f"{name}_S{size}": value for name, value in fields.items()}
        return found

    def _search_clip(self, system: System, rows: Rows) -> dict[str, Any]:
        """Train on with the clip of least variance; returns the fields to log."""
        noise = self.cfg.noise
        statistics = count_statistics(
            system,
            self.model,
            rows,
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

    def _is_best(self, nelbo: float | None) -> bool:
        if nelbo is None or not math.isfinite(nelbo):
            return False
        if self.best is not None and nelbo >= self.best:
            return False
        self.best = nelbo
        return True

    # --- logging ----------------------------------------------------------------------------

    def _log(self, window: Window) -> None:
        cfg = self.cfg
        rates = {
            "lr": cfg.optim.lr * lr_factor(self.steps_done - 1, cfg.steps, cfg.optim),
            "grad_norm": window.norm,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
        }
        line: dict[str, Any] = {"step": self.steps_done}
        if window.loss is not None:
            line["loss"] = window.loss
        line |= self.system.parts.read()
        if window.loss is not None and math.isfinite(window.norm):
            self.last = {"loss": window.loss, **rates}
        line |= rates | {"seconds": self.seconds}
        if window.skipped:
            line["skipped"] = window.skipped
            self.reporter.note(
                f"step {window.step} was skipped: {window.cause} was NaN or infinite"
            )
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        """Log a line; where the disk refuses it, save first and then stop.

        Raises:
            DiskFullError: no space left.
            StorageError: any other refusal of the system.
        """
        try:
            self.metrics.append(line)
        except (DiskFullError, StorageError) as error:
            with suppress(Bd3lmError):
                self.save()
            raise type(error)(f"{error}. {self.last_saved()}") from error

    def last_saved(self) -> str:
        """One sentence on the last checkpoint, for errors that end a run."""
        if self.saved_step < 0:
            return "No checkpoint was saved before"
        return f"The last checkpoint is of step {self.saved_step}, in {self.checkpoint}"

    # --- faults -----------------------------------------------------------------------------

    def _rewind_if_diverged(self, window: Window) -> bool:
        """Go back to the last checkpoint where two steps in a row were skipped, but only once.

        Raises:
            DivergedError: there is no checkpoint, or it happened again after going back.
        """
        if window.in_a_row < 2:
            return False
        fault = f"{window.cause} was NaN or infinite at step {window.step}"
        if self._rewound or self.saved_step < 0:
            again = ", again after going back to the last checkpoint" if self._rewound else ""
            raise DivergedError(
                f"{fault} and {window.in_a_row} steps in a row were skipped{again}; "
                f"lower optim.lr or optim.matrix-lr. {self.last_saved()}"
            )
        ended = self.steps_done
        self.resume()
        self._rewound = True
        self.reporter.note(f"{fault}; going back from step {ended} to {self.steps_done}")
        self._write({"step": self.steps_done, "rewound_from": ended})
        return True

    def _check_data(self) -> None:
        """Look whether the data is still as it was opened.

        Raises:
            CorruptError: a file was written to in place; nothing is saved that it may have spoilt.
        """
        try:
            for file in self.watch.check():
                self.reporter.note(
                    f"{file} was removed or replaced; the run reads the file that it opened"
                )
        except CorruptError as error:
            raise CorruptError(
                f"{error}; restore the data and continue the run. {self.last_saved()}"
            ) from error

    # --- saving and resuming ----------------------------------------------------------------

    def _saves(self, done: int) -> bool:
        return done % self.cfg.checkpoint_every == 0 or done == self.cfg.steps

    def _minutes_passed(self) -> bool:
        minutes = self.cfg.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of this step; see :func:`persistence.save`."""
        try:
            save(self, best=best)
        except (DiskFullError, StorageError) as error:
            raise type(error)(f"{error}. {self.last_saved()}") from error
        self._rewound = False
        self._saved_at = time.monotonic()

    def start_from(self, path: Path) -> None:
        """Begin with the averaged weights of another run; see :func:`persistence.start_from`."""
        start_from(self, path)

    def resume(self) -> None:
        """Continue from the run's last checkpoint; see :func:`persistence.resume`."""
        resume(self)


def dropout_seed(seed: int, step: int) -> int:
    """Seed of a step's dropout: a function of the step alone, so that resuming is exact."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def resume_command(out: Path) -> str:
    """The command that continues a run."""
    return f"bd3lm-train --out {shlex.quote(str(out))} --resume"


@contextmanager
def frozen() -> Iterator[None]:
    """Exclude the objects that exist already from garbage collection.

    Looking through the imported modules alone took 3% of the steps of a tiny model.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
