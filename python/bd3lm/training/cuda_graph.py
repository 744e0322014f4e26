"""The optimizer step as CUDA graphs: recorded once, then replayed by one call each.

A step of a small model is thousands of short kernels, and a host launches them more slowly than a
GPU runs them. Here forward, backward, clipping and optimizer are recorded as one graph. A graph
repeats its kernels at the same addresses and with the same numbers, so everything that changes from
step to step is copied into buffers first: the batch, its number of noisable tokens, the learning
rates and the number of the step. Dropout draws from the generator that the trainer seeds before
every step. The average of the weights follows after the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bd3lm.config import ObjectiveConfig
from bd3lm.data import Batch
from bd3lm.model.attention.mask import collected_forms
from bd3lm.model.head import TILE_ROWS

if TYPE_CHECKING:
    from bd3lm.training.trainer import Trainer

SHARES = 16
"""Counts of masked tokens are rounded up to multiples of this share of the batch's tokens. A few
multiples occur, and each has a graph of its own; the head computes 5% more positions."""

Outcome = tuple[Tensor, Tensor]
"""Loss and norm of the gradient."""
Update = Callable[[Batch, Tensor, Tensor], Outcome]
"""``(batch, noisable tokens float32 [], number of the step int64 [])``: computes a step from values
on the device alone, and updates weights and state in place."""
Replay = Callable[[], None]


class Recorder(Protocol):
    """A way to record calls."""

    def warm_up(self, run: Callable[[], Outcome]) -> Outcome:
        """Run a call where nothing is recorded."""
        ...

    def record(self, run: Callable[[], Outcome]) -> tuple[Replay, Outcome]:
        """Record a call without running it; returns the replay and the tensors that it fills."""
        ...


class NotRecordedError(Exception):
    """A step could not be recorded, by its cause; nothing was computed or changed."""


def recorded_step(trainer: Trainer) -> RecordedStep | None:
    """The step of a run as CUDA graphs; None, and a note, where it cannot be one."""
    reason = obstacle(trainer)
    if reason is not None:
        trainer.reporter.note(f"cuda-graph: off, since {reason}")
        return None
    return over_buffers(trainer, CudaRecorder())


def over_buffers(trainer: Trainer, recorder: Recorder | None) -> RecordedStep:
    """The step of a run over fixed buffers."""
    trainer.optimizers.hold_rates_on(trainer.device)

    def update(batch: Batch, noisable: Tensor, number: Tensor) -> Outcome:
        return trainer.update([batch], noisable, number)

    return RecordedStep(update, trainer.device, recorder)


def obstacle(trainer: Trainer) -> str | None:
    """Why the steps of a run cannot be recorded; None if they can be."""
    cfg = trainer.cfg
    clusters = bool(cfg.model.softmax_cutoffs)
    joint = cfg.objective != ObjectiveConfig()
    reasons = {
        "it needs a CUDA device": trainer.device.type != "cuda",
        "several ranks exchange gradients": trainer.ranks.size > 1,
        "micro-batch splits the step": trainer.parts > 1,
        "recompute reads the state of the generator": cfg.recompute,
        "model.softmax-cutoffs makes the host count the tokens of each cluster": clusters,
        "objective adds losses, sizes or views that the host counts": joint,
        "noise.fit-counts makes the host read losses": cfg.noise.fit_counts,
        "documents or padding give every batch a mask of its own": trainer.rows.doc_ids_len > 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class RecordedStep:
    """A step with fixed shapes and addresses.

    The first step of a shape runs as it is, since kernels compile when they are first used. The
    second one is recorded and replayed, later ones are replayed. Where nothing records, on a CPU,
    every step runs as it is over the same buffers.

    Args:
        update: the step; its parameters and state may change, but not move.
        device: of the model.
        recorder: records calls; None: nothing is recorded.

    Attributes:
        recording: whether a call is being recorded.
    """

    def __init__(
        self, update: Update, device: torch.device, recorder: Recorder | None = None
    ) -> None:
        self._update, self._device, self._recorder = update, device, recorder
        self._batch: Batch | None = None
        self._noisable = torch.zeros((), device=device)
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[Replay, Outcome] | None] = {}
        self._kept: list[object] = []
        self.recording = False

    def __call__(self, batch: Batch, number: int) -> Outcome:
        """Run one step; nothing is read back from the device.

        Args:
            batch: of the host; every batch has the same shape.
            number: of the step, from 1.

        Returns:
            The loss and the norm of its gradient, in tensors of their own.

        Raises:
            NotRecordedError: PyTorch or CUDA refused.
        """
        static = self._filled(batch, number)
        size = len(static.masked)

        def run() -> Outcome:
            return self._update(static, self._noisable, self._number)

        if self._recorder is None:
            return run()
        if size not in self._graphs:
            self._graphs[size] = None
            return self._recorder.warm_up(run)
        graph = self._graphs[size]
        if graph is None:
            graph = self._graphs[size] = self._recorded(self._recorder, run)
        replay, (loss, norm) = graph
        replay()
        return loss.clone(), norm.clone()

    def _recorded(self, recorder: Recorder, run: Callable[[], Outcome]) -> tuple[Replay, Outcome]:
        self.recording = True
        try:
            with collected_forms() as forms:
                graph = recorder.record(run)
        except Exception as error:
            raise NotRecordedError from error
        finally:
            self.recording = False
        self._kept += forms
        return graph

    def _filled(self, batch: Batch, number: int) -> Batch:
        """Copy a batch into the buffers, with masked positions up to a multiple of the share."""
        tokens = batch.x0.numel()
        if self._batch is None:
            self._batch = replace(batch, **_buffers(batch, self._device))
        buffers = self._batch
        for name in ("x0", "xt", "mask_prob", "noisable"):
            getattr(buffers, name).copy_(getattr(batch, name), non_blocking=True)
        self._noisable.fill_(batch.num_noisable)
        self._number.fill_(number)
        count = len(batch.masked)
        size = min(_rounded(count, tokens), len(buffers.masked))
        masked, weight = buffers.masked[:size], buffers.weight[:size]
        masked[:count].copy_(batch.masked, non_blocking=True)
        weight[:count].copy_(batch.weight, non_blocking=True)
        # Positions that are masked already, each once more, so that no gradient has many addends.
        at = count
        while count > 0 and at < size:
            some = batch.masked[: size - at]
            masked[at : at + len(some)].copy_(some, non_blocking=True)
            at += len(some)
        weight[count:].zero_()
        return replace(buffers, masked=masked, weight=weight)


def _rounded(count: int, tokens: int) -> int:
    """Positions of a graph for so many masked tokens: whole tiles, and at least one."""
    share = -(-tokens // (SHARES * TILE_ROWS)) * TILE_ROWS
    return max(-(-count // share), 1) * share


def _buffers(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Room on the device for the tensors of a batch in which every token may be masked."""
    room = -(-batch.x0.numel() // TILE_ROWS) * TILE_ROWS
    return {
        name: torch.zeros(
            room if name in ("masked", "weight") else value.shape, dtype=value.dtype, device=device
        )
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }


class CudaRecorder:
    """Records calls as CUDA graphs that share one pool of memory; see :class:`Recorder`."""

    def __init__(self) -> None:
        self._pool, self._side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def warm_up(self, run: Callable[[], Outcome]) -> Outcome:
        """Run a call on the stream that records: libraries keep workspaces for each stream."""
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            outcome = run()
        main.wait_stream(self._side)
        return outcome

    def record(self, run: Callable[[], Outcome]) -> tuple[Replay, Outcome]:
        """Record a call as a graph."""
        graph = torch.cuda.CUDAGraph()
        # Meanwhile the thread that makes batches may pin memory, which a stricter mode refuses.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
        ):
            outcome = run()
        return graph.replay, outcome
