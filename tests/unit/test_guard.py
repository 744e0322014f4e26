"""Steps that are not finite: skipped without a wait, counted and named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bd3lm.checkpoint.record import Record
from bd3lm.config import OptimConfig
from bd3lm.training.guard import StepGuard
from bd3lm.training.optim import Muon, Optimizers, clip_gradients
from tests.conftest import random_ids, tiny_model

CPU = torch.device("cpu")


def judged(guard, step, loss, norms):
    norms = torch.tensor(norms)
    total = torch.linalg.vector_norm(norms)
    return bool(guard.judge(step, torch.tensor(loss), norms, total)), total


def test_a_window_by_hand():
    guard = StepGuard(CPU)
    guard.names = ["a", "b"]
    nan, inf = float("nan"), float("inf")
    seen = [
        judged(guard, step, loss, norms)[0]
        for step, (loss, norms) in enumerate(
            [(2.0, [3.0, 4.0]), (1.0, [3.0, nan]), (inf, [1.0, 1.0]), (4.0, [0.0, 5.0])], 1
        )
    ]
    assert seen == [True, False, False, True]
    window = guard.look(torch.tensor(5.0))
    assert window.loss == 3.0
    assert window.norm == 5.0
    assert (window.skipped, window.in_a_row, window.step) == (2, 2, 2)
    assert window.cause == "the gradient of b"
    judged(guard, 5, 1.0, [1.0, 1.0])
    window = guard.look(torch.tensor(1.0))
    assert (window.loss, window.skipped, window.in_a_row) == (1.0, 0, 0)


@pytest.mark.parametrize(
    ("loss", "norms", "cause"),
    [
        (float("nan"), [float("nan")] * 2, "the loss"),
        (1.0, [float("inf"), 1.0], "the gradient of a"),
        (1.0, [3e38, 3e38], "the norm of the gradient"),
    ],
)
def test_causes(loss, norms, cause):
    guard = StepGuard(CPU)
    guard.names = ["a", "b"]
    assert not judged(guard, 7, loss, norms)[0]
    window = guard.look(torch.tensor(1.0))
    assert window.loss is None
    assert window.cause == cause
    assert window.step == 7


def test_steps_in_a_row_are_counted_across_windows_and_saves():
    guard = StepGuard(CPU)
    guard.names = ["a"]
    judged(guard, 1, float("nan"), [1.0])
    assert guard.look(torch.tensor(1.0)).in_a_row == 1
    again = StepGuard(CPU)
    again.names = ["a"]
    again.load_state(Record(json.loads(json.dumps(guard.state())), "the test"))
    judged(again, 2, float("nan"), [1.0])
    window = again.look(torch.tensor(1.0))
    assert (window.in_a_row, window.step) == (2, 1)


def gradients(model, seed, poison=None):
    ids = random_ids(2, 8, seed=seed)
    model.denoise(ids, ids, 4, torch.arange(16)).square().mean().backward()
    if poison is not None:
        dict(model.named_parameters())[poison].grad.view(-1)[3] = torch.nan
    return clip_gradients(list(model.parameters()), 1.0)


@pytest.mark.parametrize("host_decides", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_poisoned_step_changes_nothing(name, host_decides):
    """Neither weights nor moments nor AdamW's count; the next step is as if it had not been."""
    results = []
    for poisoned in (True, False):
        model = tiny_model()
        optimizers = Optimizers(model, OptimConfig(optimizer=name, weight_decay=0.1))
        optimizers.host_decides = host_decides
        for seed in (1, 2, 3):
            if seed == 2 and not poisoned:
                continue
            poison = "blocks.0.qkv.weight" if seed == 2 else None
            norms, total = gradients(model, seed, poison)
            finite = StepGuard(CPU).judge(seed, torch.tensor(1.0), norms, total)
            assert bool(finite) == (poison is None)
            optimizers.step(0.5, finite)
            assert all(p.grad is None for p in model.parameters())
        results.append([*model.parameters(), *optimizers.state().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_either_decides_alike():
    results = []
    for host_decides in (True, False):
        model = tiny_model()
        optimizers = Optimizers(model, OptimConfig(optimizer="muon", weight_decay=0.1))
        optimizers.host_decides = host_decides
        for seed in range(3):
            gradients(model, seed)
            optimizers.step(0.5, torch.tensor(True))
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_clipping_is_pytorchs_own():
    ours, theirs = tiny_model(), tiny_model()
    norms, total = gradients(ours, 1)
    ids = random_ids(2, 8, seed=1)
    theirs.denoise(ids, ids, 4, torch.arange(16)).square().mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0, foreach=True)
    assert torch.equal(total, expected)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    with_grad = [(a, b) for a, b in pairs if a.grad is not None]  # the head has none here
    assert len(norms) == len(with_grad)
    assert all(torch.equal(a.grad, b.grad) for a, b in with_grad)


def test_muon_is_pytorchs_own():
    torch.manual_seed(0)
    start = [torch.randn(5, 7), torch.randn(4, 4)]
    results = []
    for ours in (True, False):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        if ours:
            optimizer = Muon({"params": params, "weight_decay": 0.3}, momentum=0.9)
        else:
            optimizer = torch.optim.Muon(params, weight_decay=0.3, momentum=0.9, nesterov=True)
        torch.manual_seed(1)
        for lr in (0.1, 0.05):
            optimizer.param_groups[0]["lr"] = lr
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("lr", [0, -1, NAN, INF, 1e39, "1", True]),
        ("matrix_lr", [0, NAN, 1e39]),
        ("betas", [(1.5, 2.0), (0.9, 1.0), (-0.1, 0.5), (NAN, 0.5), (0.5,)]),
        ("eps", [0, -1e-8, NAN]),
        ("weight_decay", [-1, NAN, INF]),
        ("momentum", [-0.1, 1.0, NAN]),
        ("warmup_steps", [-1, 1.5, NAN, True]),
        ("decay_fraction", [-0.1, 1.1, NAN]),
        ("grad_clip", [0, -1, NAN, INF]),
        ("ema_decay", [-0.1, 1.0, NAN]),
    ],
)
def test_every_number_of_an_optimizer_is_checked(field, values):
    name = "optim." + field.replace("_", "-")
    for value in values:
        with pytest.raises(ValueError, match=rf"{name} = .*: must be .") as caught:
            dataclasses.replace(OptimConfig(), **{field: value})
        assert "\n" not in str(caught.value)
