"""The optimizer step as a CUDA graph, on a CPU: over its buffers, and replayed by an emulator."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bd3lm.model.fused as fused
import bd3lm.model.head as head
import bd3lm.model.layers as layers
import bd3lm.model.transformer as transformer
import bd3lm.training.cuda_graph as cuda_graph
from bd3lm.config import NoiseConfig, ObjectiveConfig, OptimConfig
from bd3lm.data.resolve import open_splits
from bd3lm.model.cross_entropy import composed_cross_entropy_
from bd3lm.ranks.group import ALONE
from bd3lm.training import Trainer
from tests.integration.conftest import Silent
from tests.integration.test_step import SYSTEMS, NoWaits, of_system

EXACT = {"lr": 2**-8, "warmup_steps": 4, "decay_fraction": 0.0}
"""Learning rates that are the same in float32, as a device holds them, and in float64."""


def addresses(tensors):
    return [x.untyped_storage().data_ptr() for x in tensors if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Emulates a CUDA graph: repeats operations on the same memory and with the same numbers.

    Results of operations go where those of the recording went, so a step that depends on a number
    of the host, or on an object that Python made anew, repeats that of the recording.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.recordings = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def warm_up(self, run):
        return run()

    def record(self, run):
        self.recordings += 1
        self.calls = []
        state, generator = [x.clone() for x in self.state], torch.get_rng_state()
        with self:
            outcome = run()
        calls = self.calls
        torch.set_rng_state(generator)
        for x, before in zip(self.state, state, strict=True):
            x.copy_(before)  # recording computes nothing
        return lambda: self.replay(calls), outcome

    @torch.no_grad()
    def replay(self, calls):
        for func, args, kwargs, out in calls:
            again = func(*args, **kwargs)
            inputs = set(addresses(tree_leaves((args, kwargs))))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and not inputs & set(addresses([old])):
                    old.copy_(new)


@pytest.fixture
def splits(config, tmp_path):
    return open_splits(config.data, None, "default", tmp_path / "work", print)


def trainer_of(config, splits, folder, **changes):
    config = dataclasses.replace(config, **{"micro_batch": None, "precision": "fp32"} | changes)
    trainer = Trainer(config, splits.train, splits.valid, folder, Silent())
    trainer.optimizers.host_decides = False  # as on a GPU
    return trainer


def state_of(trainer):
    guard, optimizers = trainer.guard, trainer.optimizers
    kept = [*trainer.model.parameters(), *optimizers.state().values()]
    return [x.detach() for x in (*kept, guard._loss, guard._counts, guard._starts)]


def run(trainer, steps):
    """Losses and norms [steps, 2], and all state after them; nothing is read back meanwhile."""
    with NoWaits():
        outcomes = [torch.stack(trainer.step()) for _ in range(steps)]
    trainer.batches.close()
    return torch.stack(outcomes), [*state_of(trainer), *trainer.ema.weights.values()]


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_over_buffers_is_the_step(config, splits, tmp_path, monkeypatch, system):
    """Bit for bit where learning rates are, since both pad to the same number of positions."""
    monkeypatch.setattr(head, "cross_entropy_", composed_cross_entropy_)
    config = dataclasses.replace(of_system(config, system), optim=OptimConfig(**EXACT))
    plain, mine = (trainer_of(config, splits, tmp_path) for _ in range(2))
    mine.recorded = cuda_graph.over_buffers(mine, None)
    (wanted, state), (found, own) = run(plain, 4), run(mine, 4)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(own, state, strict=True))


def composed(patch):
    """Let a CPU take the operations of PyTorch, which an emulator sees."""
    for module in (fused, layers):
        patch.setattr(module, "on_cpu", lambda *tensors: False)
    patch.setattr(head, "cross_entropy_", composed_cross_entropy_)
    patch.setattr(transformer, "wants_last_clean", lambda device: True)


def varied(get):
    """Batches whose numbers of noisable tokens differ; the loss of step 2 is NaN."""

    def varied_get(step, noise):
        (batch,) = get(step, noise)
        weight = batch.weight * (torch.nan if step == 2 else 1.0)
        return [dataclasses.replace(batch, weight=weight, num_noisable=200 + 10 * step)]

    return varied_get


def both_ways(config, splits, folder, steps):
    """The tape of a replayed run, and what the runs with and without it give."""
    plain, mine = (trainer_of(config, splits, folder, attention="dense") for _ in range(2))
    for trainer in (plain, mine):
        trainer.batches.get = varied(trainer.batches.get)
    tape = Tape()
    mine.recorded, tape.state = cuda_graph.over_buffers(mine, tape), state_of(mine)
    before = addresses(tape.state)
    replayed = run(mine, steps)
    assert addresses(state_of(mine)) == before
    return tape, run(plain, steps), replayed


def assert_close(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6, equal_nan=True)
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_replayed_step_is_the_step(config, splits, tmp_path, monkeypatch):
    """Up to rounding: the head has other numbers of rows, and Muon's rate is a float32."""
    composed(monkeypatch)
    monkeypatch.setattr(cuda_graph, "SHARES", 2)
    config = of_system(config, "bd3lm")
    model = dataclasses.replace(config.model, depth=1)
    optim = OptimConfig(optimizer="muon", matrix_lr=2**-6, **EXACT)
    config = dataclasses.replace(config, model=model, optim=optim)
    tape, wanted, found = both_ways(config, splits, tmp_path, 4)
    assert tape.recordings == 1
    assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_replayed_steps_of_every_system(config, splits, tmp_path, monkeypatch, system):
    """With dropout, which draws the same since both pad to the same number of positions."""
    composed(monkeypatch)
    config = of_system(config, system)
    model = dataclasses.replace(config.model, dropout=0.2)
    config = dataclasses.replace(config, model=model, optim=OptimConfig(**EXACT))
    tape, wanted, found = both_ways(config, splits, tmp_path, 6)
    assert tape.recordings >= 1
    assert_close(found, wanted)


def test_a_step_that_is_not_recorded_costs_a_sentence(config, splits, tmp_path):
    class Refusing(Tape):
        def record(self, run):
            for p in mine.model.parameters():  # those of a failed recording must not count
                p.grad = torch.full_like(p, 1e9)
            raise RuntimeError("operation not permitted when stream is capturing")

    mine = trainer_of(of_system(config, "bd3lm"), splits, tmp_path, batch_size=2)
    mine.recorded = cuda_graph.over_buffers(mine, Refusing())
    outcomes, _ = run(mine, 2)
    assert outcomes.max() < 1e3
    assert mine.recorded is None
    (note,) = mine.reporter.notes
    assert note.startswith("cuda-graph: off from now on, since the step could not be recorded (")
    assert "not permitted" in note


def test_obstacles_are_named(config):
    config = dataclasses.replace(of_system(config, "bd3lm"), micro_batch=None)

    def found(changes, **trainer):
        whole = {"device": torch.device("cuda"), "parts": 1, "ranks": ALONE}
        whole |= {"rows": SimpleNamespace(doc_ids_len=0)} | trainer
        cfg = dataclasses.replace(config, **changes)
        return cuda_graph.obstacle(SimpleNamespace(cfg=cfg, **whole))

    assert found({}) is None
    assert "CUDA" in found({}, device=torch.device("cpu"))
    assert "ranks" in found({}, ranks=SimpleNamespace(size=2))
    assert "micro-batch" in found({}, parts=2)
    assert "documents" in found({}, rows=SimpleNamespace(doc_ids_len=32))
    assert "recompute" in found({"recompute": True})
    assert "objective" in found({"objective": ObjectiveConfig(block_sizes=(4, 8))})
    assert "fit-counts" in found({"noise": NoiseConfig(estimator="count", fit_counts=True)})
    cutoffs = dataclasses.replace(config.model, softmax_cutoffs=(100,))
    assert "softmax-cutoffs" in found({"model": cutoffs})


def test_a_cpu_is_an_obstacle(config, splits, tmp_path):
    trainer = trainer_of(config, splits, tmp_path, cuda_graph=True)
    assert trainer.recorded is None
    assert trainer.reporter.notes == ["cuda-graph: off, since it needs a CUDA device"]
