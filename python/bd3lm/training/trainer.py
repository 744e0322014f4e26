"""The training loop: loader → system → optimizer, with everything needed to stop and go on."""

from __future__ import annotations

import gc
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import assign_weights, read_meta, read_tensors, save_checkpoint
from bd3lm.config import ModelConfig, TrainConfig
from bd3lm.data import Dataset, Loader, Prefetcher, Rows
from bd3lm.device import autocast, compute_dtype, keep_freed_memory, resolve_device
from bd3lm.errors import Bd3lmError, CheckpointError
from bd3lm.evaluate import (
    Likelihood,
    count_statistics,
    evaluate_likelihood,
    scoring_rows,
    search_clip,
)
from bd3lm.files import write_text
from bd3lm.model import Transformer
from bd3lm.model.flops import peak_flops, step_flops
from bd3lm.systems import build_system
from bd3lm.training.ema import Ema
from bd3lm.training.optim import Optimizers, lr_factor
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


class InterruptedRunError(Bd3lmError):
    """Ctrl-C was pressed; the run was saved and the message says how to go on."""

    exit_code = 130


class DivergedError(Bd3lmError):
    """The loss is no longer a number; the last checkpoint was kept."""


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
        use_device = partial(torch.cuda.set_device, self.device) if pinned else None
        self.batches = Prefetcher(self.loader, cfg.steps, self.parts, use_device)
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
        # Since the last logged line; the sum stays on the device until a line is due.
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._loss_steps = 0

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
        with _ctrl_c() as pressed, closing(self.batches), frozen():
            while self.steps_done < cfg.steps:
                started = time.perf_counter()
                loss, norm = self.step() if self.profiler is None else self.profiler.run(self.step)
                self._loss_sum += loss
                self._loss_steps += 1
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
        self._write_metrics(line | clip | ({} if result.bpb is None else {"val_bpb": result.bpb}))
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
        total, last_norm = torch.stack([self._loss_sum, norm.double()]).tolist()
        mean = total / self._loss_steps
        self._loss_sum.zero_()
        self._loss_steps = 0
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
        self._write_metrics({"step": self.steps_done, **self.last, "seconds": self.seconds})

    def _write_metrics(self, line: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # --- saving and resuming ----------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint in place of the previous one."""
        training = {f"model/{k}": p.detach() for k, p in self.model.named_parameters()}
        training |= {f"optimizer/{k}": v for k, v in self.optimizers.state().items()}
        state: dict[str, Any] = {
            "seconds": self.seconds,
            "ema_updates": self.ema.updates,
            "window": [self._loss_sum.item(), self._loss_steps],
            "last": self.last,
            "system": self.system.state(),
        }
        save_checkpoint(
            self.checkpoint,
            self.cfg,
            self.tokenizer,
            step=self.steps_done,
            averaged=self.ema.weights,
            training=training,
            state=state,
        )

    def start_from(self, path: Path) -> None:
        """Begin with the averaged weights of another run (and its optimizer's state, if asked).

        The learning-rate schedule, the data order and the average begin anew.

        Raises:
            CheckpointError: a model of another kind, shape or vocabulary, or another optimizer.
        """
        loaded = load_checkpoint(path, tokenizer=self.tokenizer)
        _check_same_function(self.cfg.model, loaded.config.model, path)
        assign_weights(self.model, loaded.model.state_dict(), path)
        if self.cfg.init_optimizer:
            state = self._training_state(path)["optimizer"]
            self.optimizers.load(state, path)
        for name, parameter in self.model.named_parameters():
            self.ema.weights[name].copy_(parameter.detach())

    def resume(self) -> None:
        """Continue from the run's checkpoint; on the CPU, bit for bit.

        Raises:
            CheckpointError: the checkpoint does not fit this run.
        """
        meta = read_meta(self.checkpoint)
        file = self.checkpoint / "training.safetensors"
        parts = self._training_state(self.checkpoint)
        if self.cfg.model.tied_embeddings:
            parts["model"]["head.weight"] = parts["model"]["embed.weight"]
        assign_weights(self.model, parts["model"], file)
        self.optimizers.load(parts["optimizer"], file)
        averaged = read_tensors(self.checkpoint / "model.safetensors")
        for name, tensor in self.ema.weights.items():
            tensor.copy_(averaged[name])
        state = meta["state"]
        self.steps_done = int(meta["step"])
        self.seconds = state["seconds"]
        self.ema.updates = state["ema_updates"]
        self._loss_sum.fill_(state["window"][0])
        self._loss_steps = state["window"][1]
        self.last = state["last"]
        self.system.load_state(state["system"])
        self._forget_metrics_after(self.steps_done)

    def _training_state(self, path: Path) -> dict[str, dict[str, Tensor]]:
        """Raw weights (``model``) and optimizer tensors (``optimizer``) of a checkpoint."""
        file = path / "training.safetensors"
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, tensor in read_tensors(file).items():
            kind, rest = name.split("/", 1)
            if kind not in parts:
                raise CheckpointError(f"{file} holds an unknown tensor {name}")
            parts[kind][rest] = tensor
        return parts

    def _forget_metrics_after(self, step: int) -> None:
        file = self.out / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(file, "".join(line + "\n" for line in kept))


def _check_same_function(wanted: ModelConfig, found: ModelConfig, path: Path) -> None:
    """Refuse weights that would fit and mean something else: heads, norms, rotations.

    Shapes are checked tensor by tensor where the weights are assigned. A model may begin to be
    told the noise level, or stop; and dropout is no part of the function.

    Raises:
        CheckpointError: names the setting.
    """
    names = ("heads", "mlp", "norm", "norm_eps", "rope_theta", "tied_embeddings")
    for name in (*names, "rope_scaling", "nope_layers"):
        mine, theirs = getattr(wanted, name), getattr(found, name)
        if mine != theirs:
            raise CheckpointError(
                f"init-from = {path}: was trained with model.{name.replace('_', '-')} = {theirs}; "
                f"this model has {mine}"
            )


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


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that becomes non-empty when Ctrl-C is pressed; a second press stops at once."""
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: whoever runs us owns the signals
        yield pressed
        return
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
