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
from bd3lm.device import (
    autocast,
    compute_dtype,
    keep_freed_memory,
    resolve_device,
)
from bd3lm.errors import (
    Bd3lmError,
    CorruptError,
    DiskFullError,
    DivergedError,
    InterruptedRunError,
    StorageError,
)
from bd3lm.evaluate import Likelihood
from bd3lm.model import Transformer
from bd3lm.model.flops import peak_flops, step_flops
from bd3lm.ranks.group import ALONE, Ranks
from bd3lm.systems import build_system
from bd3lm.training.adapters import add_adapters, merged_weights
from bd3lm.training.callbacks import Callbacks
from bd3lm.training.clock import StepClock
from bd3lm.training.cuda_graph import NotRecordedError, Outcome, recorded_step
from bd3lm.training.data_files import DataWatch, digest_of
from bd3lm.training.ema import Ema
from bd3lm.training.guard import StepGuard, Window
from bd3lm.training.interrupt import deferred
from bd3lm.training.metrics import MetricsLog
from bd3lm.training.mirror import Mirror
from bd3lm.training.optim import Optimizers, clip_gradients, lr_factor
from bd3lm.training.parallel import Loss, is_fsdp, micro_batches, shared, synchronized, whole_model
from bd3lm.training.persistence import resume, save, start_from
from bd3lm.training.profile import AVERAGE, DATA, StepProfiler
from bd3lm.training.reporter import Reporter
from bd3lm.training.saver import NOTHING, Saver
from bd3lm.training.shards import is_sharded, whole
from bd3lm.training.validation import Validation


class Trainer:
    """One run: ``Trainer(cfg, train, valid, out).run()``.

    Args:
        cfg: the settings.
        train: prepared training data.
        valid: prepared validation data, with the same tokenizer.
        out: directory of the run, for ``checkpoint/`` and ``metrics.jsonl``; it exists.
        reporter: receives the events; of rank 0.
        ranks: the processes that train together.
        resumes: the weights come from a checkpoint of the run, so the text is not counted for them.

    Attributes:
        callbacks: follow the lines of ``metrics.jsonl``; none at first.
        mirror: the copy of the run at a URL, on rank 0; None where there is none.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        train: Dataset,
        valid: Dataset,
        out: Path,
        reporter: Reporter,
        ranks: Ranks = ALONE,
        *,
        resumes: bool = False,
    ) -> None:
        self.cfg, self.out, self.reporter, self.ranks = cfg, out, reporter, ranks
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
        self.loader = Loader(
            self.rows, cfg.batch_size, cfg.seed, shuffle=cfg.shuffle, pinned=pinned
        )
        self.parts = micro_batches(cfg, ranks.size)
        self.watch = DataWatch(train, valid)
        digests = {"train": digest_of(train), "valid": digest_of(valid)}
        self.data_digests = {split: d for split, d in digests.items() if d is not None}
        use_device = partial(torch.cuda.set_device, self.device) if pinned else None
        share = ranks.rank, ranks.size
        self.batches = Prefetcher(self.loader, cfg.steps, self.parts, use_device, share)
        torch.manual_seed(cfg.seed)
        model = Transformer(cfg.model, self.tokenizer.vocab_size).use_attention(cfg.attention)
        if cfg.init_unigram and cfg.init_from is None and not resumes:
            model.start_from_counts(torch.from_numpy(train.token_counts().astype(np.float64)))
        model.recompute = cfg.recompute
        if cfg.lora.rank:
            add_adapters(model, cfg.lora)
        # Under FSDP it has run on CPUs alone.
        by_default = self.device.type == "cuda" and not (ranks.size > 1 and is_fsdp(cfg))
        if by_default if cfg.compile is None else cfg.compile:
            model.compile_blocks()
        self.model = model
        self.loss = shared(Loss(self.system, model), cfg, ranks, self.device)
        self.optimizers = Optimizers(self.model, cfg.optim, compute_dtype(cfg, self.device))
        self.ema = Ema(self.model, cfg.optim.ema_decay)
        self.guard = StepGuard(next(self.model.parameters()).device)
        self.recorded = recorded_step(self) if cfg.cuda_graph else None
        self.validation = Validation(cfg, valid, self.system, reporter, ranks)
        self.metrics = MetricsLog(out / "metrics.jsonl")
        self.checkpoints = StepFolders(self.checkpoint, cfg.keep)
        self.mirror: Mirror | None = None
        self.profiler: StepProfiler | None = None
        self.steps_done = 0
        self.saver = Saver(background=self.device.type != "cpu")
        self.seconds = 0.0
        self.callbacks = Callbacks((), lambda message: self.reporter.note(message))
        self.last: dict[str, float] = {}
        self.best: float | None = None
        self._saved_at = time.monotonic()
        self._rewound = False
        self._clock = StepClock()

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
        peak *= self.ranks.size
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
        self._saved_at = time.monotonic()
        with deferred() as signals, closing(self.batches), frozen():
            try:
                stop = self._steps(signals)
                self.finish_save()
            except Exception:
                if self.ranks.size == 1:  # others may be gone, and the thread may wait for them
                    with suppress(Exception):
                        self.saver.wait()
                raise
            if stop:
                raise InterruptedRunError(
                    f"stopped after step {self.steps_done} of {self.cfg.steps}; the run is saved. "
                    f"Continue it with: {resume_command(self.out)}",
                    stop,
                )

    def _steps(self, signals: list[int]) -> int:
        """Run steps to the last, or to a signal; returns its number."""
        stop = 0
        while self.steps_done < self.cfg.steps and not stop:
            window = self._timed_step()
            if window is None or not self._rewind_if_diverged(window):
                self._after_step(window)
            # A signal to one rank is one to all, and the clock of rank 0 is that of all.
            late = int(self.ranks.first and self._minutes_passed())
            signal, failed = signals[0] if signals else 0, int(self.saver.failed)
            stop, late, failed = self.ranks.largest(signal, late, failed)
            if failed:
                self.finish_save()
            if (late or stop) and self.saver.begun != self.steps_done:
                self.save()
        return stop

    def _after_step(self, window: Window | None) -> None:
        """Log, validate and save, each when it is due."""
        cfg, done = self.cfg, self.steps_done
        if window is not None:
            self._log(window)
        self.reporter.step(done, self.last)
        if self.mirror is not None:
            self.mirror.warn(self.reporter.note)
        best = False
        if cfg.eval.every and done % cfg.eval.every == 0 and done < cfg.steps:
            best = self._is_best(self.validate(quick=True).nelbo)
        if best or self._saves(done):
            self.save(best=best)

    def _timed_step(self) -> Window | None:
        """Run a step; returns the window that it ends, if a line of metrics is due."""
        started = time.perf_counter()
        try:
            _, norm = self.step() if self.profiler is None else self.profiler.run(self.step)
        except Exception:
            self._check_data(ALONE)  # the likelier cause of a failed step; others may not be there
            raise
        done = self.steps_done
        self.ranks.beat(f"after step {done}")
        due = self._saves(done) or done % self.cfg.log_every == 0
        window = self.guard.look(norm) if due else None
        self.seconds += time.perf_counter() - started
        if window is not None:
            self._check_data(self.ranks)
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
        with record_function(DATA), self._clock.waiting_for_data():
            batches = self.batches.get(step, self.system.noise)
        self.optimizers.set_rates(lr_factor(step, cfg.steps, cfg.optim))
        self._seed_dropout()
        total, norm = self._recorded_or_not(batches)
        with record_function(AVERAGE):
            self.ema.update()
        self.steps_done += 1
        observed = self.system.observations()
        if observed is not None:
            self.ranks.sum(observed)
        self.system.update_noise_after_step(self.steps_done)
        return total, norm

    def _recorded_or_not(self, batches: list[Batch]) -> Outcome:
        """Run the part of a step that a GPU can replay, as a CUDA graph where it is one."""
        number = self.steps_done + 1
        if self.recorded is not None:
            try:
                return self.recorded(batches[0], number)
            except NotRecordedError as error:
                self.recorded = None
                reason = error.__cause__ or error
                self._give_up("cuda-graph", "the step could not be recorded", reason)
        return self.update(batches, self._noisable(batches), number)

    def update(self, batches: list[Batch], noisable: int | Tensor, number: int | Tensor) -> Outcome:
        """Compute loss and gradient, and update the weights; returns loss and gradient norm.

        Args:
            batches: the micro-batches.
            noisable: tokens by which the loss is divided; float32 [] on the device.
            number: of the step, from 1; int64 [] on the device.
        """
        try:
            total = self._accumulate(batches, noisable)
        except Exception as error:
            compiled = self.model.compiles_blocks and self.ranks.size == 1
            recording = self.recorded is not None and self.recorded.recording
            if not compiled or recording or isinstance(error, torch.OutOfMemoryError):
                raise
            # If the compiler was not the cause, the same error comes again without it.
            self.model.compile_blocks(False)
            self._give_up("compile", "the compiler failed", error)
            total = self._accumulate(batches, noisable)
        if not self.guard.names:
            named = self.model.named_parameters()
            self.guard.names = [name for name, p in named if p.grad is not None]
        norms, norm = clip_gradients(list(self.model.parameters()), self.cfg.optim.grad_clip)
        finite = self.guard.judge(number, total, norms, norm)
        self.optimizers.apply(finite)
        return total, norm

    def _give_up(self, setting: str, what: str, error: BaseException) -> None:
        """Say that a setting is off from now on, and begin the step anew."""
        self.optimizers.zero_grad()
        self._seed_dropout()
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.reporter.note(f"{setting}: off from now on, since {what} ({reason})")

    def _seed_dropout(self) -> None:
        if self.cfg.model.dropout:
            torch.manual_seed(dropout_seed(self.cfg.seed, self.steps_done, self.ranks.rank))

    def _accumulate(self, batches: list[Batch], noisable: int | Tensor) -> Tensor:
        """Add the gradient of a step's loss to the parameters'; returns the loss on the device."""
        cfg = self.cfg
        self._clock.begin()
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches, 1):
            batch, last = batch.to(self.device), index == len(batches)
            with synchronized(self.loss, last=last):
                with autocast(cfg, self.device):
                    loss = self.loss(batch) / noisable
                if last:
                    self._clock.arrive()
                loss.backward()
            total += loss.detach()
        return self.ranks.sum(total) / self.ranks.size

    def _noisable(self, batches: list[Batch]) -> int | Tensor:
        """Tokens by which a rank divides its loss, so that the mean over ranks is the loss.

        That is the noisable tokens of the global batch divided by the number of ranks, for DDP and
        FSDP average the gradients of the ranks. Ranks may have different numbers of them.
        """
        own = sum(batch.num_noisable for batch in batches)
        if self.ranks.size == 1:
            return own
        everywhere = torch.tensor(own, dtype=torch.float32, device=self.device)
        return self.ranks.sum(everywhere) / self.ranks.size

    def validate(self, *, quick: bool) -> Likelihood:
        """Score the validation split with the averaged weights.

        Args:
            quick: only ``eval.rows`` rows; otherwise everything.
        """
        with self.averaged() as model, autocast(self.cfg, self.device):
            result, line = self.validation.score(model, self.steps_done, quick=quick)
        self._write({"step": self.steps_done} | line)
        self.reporter.validation(self.steps_done, result)
        return result

    @contextmanager
    def averaged(self) -> Iterator[Transformer]:
        """Yield a model with the averaged weights; all ranks call this."""
        if self.cfg.lora.rank:
            yield whole_model(self.model, self.averaged_weights(), self.device)
            return
        if not any(map(is_sharded, self.ema.weights.values())):
            with self.ema.applied():
                yield self.model
            return
        weights = {name: whole(tensor) for name, tensor in self.ema.weights.items()}
        yield whole_model(self.model, weights, self.device)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights of the whole model; adapters are merged into it."""
        if self.cfg.lora.rank:
            return merged_weights(self.model, self.ema.weights, self.cfg.lora)
        return self.ema.weights

    def _is_best(self, nelbo: float | None) -> bool:
        if nelbo is None or not math.isfinite(nelbo):
            return False
        if self.best is not None and nelbo >= self.best:
            return False
        self.best = nelbo
        return True

    # --- logging ----------------------------------------------------------------------------

    def _log(self, window: Window) -> None:
        parts = self.system.parts.read(self.ranks.sum)
        times = self._clock.read(self.ranks, self.device)
        self._write(self._line(window, parts | times) if self.ranks.first else {})

    def _line(self, window: Window, parts: dict[str, float]) -> dict[str, Any]:
        """A line of the log; the speeds in it are kept for the reporter."""
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
        line |= parts
        if window.loss is not None and math.isfinite(window.norm):
            self.last = {"loss": line["loss"], **rates}
        line |= rates | {"seconds": self.seconds}
        if window.skipped:
            line["skipped"] = window.skipped
            self.reporter.note(
                f"step {window.step} was skipped: {window.cause} was NaN or infinite"
            )
        return line

    def _write(self, line: dict[str, Any]) -> None:
        """Log a line; where the disk refuses it, save first and then stop.

        Raises:
            DiskFullError: no space left.
            StorageError: any other refusal of the system.
        """
        try:
            self.ranks.every(lambda: self.metrics.append(line) if self.ranks.first else None)
        except (DiskFullError, StorageError) as error:
            with suppress(Bd3lmError):
                self.save()
                self.finish_save()
            raise type(error)(f"{error}. {self.last_saved()}") from error
        self.callbacks.log(line)

    def last_saved(self) -> str:
        """One sentence on the last checkpoint, for errors that end a run."""
        with suppress(Exception):  # one error is enough
            self.saver.wait()
        if self.saver.saved == NOTHING:
            return "No checkpoint was saved before"
        return f"The last checkpoint is of step {self.saver.saved}, in {self.checkpoint}"

    # --- faults -----------------------------------------------------------------------------

    def _rewind_if_diverged(self, window: Window) -> bool:
        """Go back to the last checkpoint where two steps in a row were skipped, but only once.

        Raises:
            DivergedError: there is no checkpoint, or it happened again after going back.
        """
        if window.in_a_row < 2:
            return False
        fault = f"{window.cause} was NaN or infinite at step {window.step}"
        self.finish_save()
        if self._rewound or self.saver.saved == NOTHING:
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

    def _check_data(self, ranks: Ranks) -> None:
        """Look whether the data is still as it was opened.

        Raises:
            CorruptError: a file was written to in place; nothing is saved that it may have spoilt.
        """
        try:
            for file in ranks.every(self.watch.check):
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
        """Write a checkpoint of this step, after the one before; see :func:`persistence.save`.

        On an accelerator this returns as soon as the state is copied to the host; then
        :meth:`finish_save`, or the next call, raises the errors.

        Raises:
            DivergedError: a weight or a moment is not finite; nothing is written.
            Bd3lmError: as :meth:`finish_save`.
        """
        self.finish_save()
        self.ranks.beat(f"after step {self.steps_done}, saving")
        save(self, best=best)
        if not self.saver.background:
            self.finish_save()
        self._rewound = False
        self._saved_at = time.monotonic()

    def finish_save(self) -> None:
        """Wait until the last checkpoint is on the disk; all ranks call this.

        Raises:
            DiskFullError: no space left; the older checkpoints stay.
            StorageError: any other refusal of the system.
        """
        self.ranks.beat(f"after step {self.steps_done}, waiting for the last checkpoint")
        try:
            self.ranks.every(self.saver.wait)
        except (DiskFullError, StorageError) as error:
            raise type(error)(f"{error}. {self.last_saved()}") from error

    def start_from(self, source: str) -> None:
        """Begin with the averaged weights of another run; see :func:`persistence.start_from`."""
        start_from(self, source)

    def resume(self) -> None:
        """Continue from the run's last checkpoint; see :func:`persistence.resume`."""
        resume(self)


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a step's dropout: a function of step and rank alone, so that resuming is exact."""
    parts = (seed, step, rank) if rank else (seed, step)
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


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
