"""Learning rates, weight averages and optimizer state."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from bd3lm.config import OptimConfig, TrainConfig
from bd3lm.errors import ConfigError
from bd3lm.model.memory import training_memory
from bd3lm.training.ema import Ema
from bd3lm.training.optim import AdamW, Optimizers, lr_factor
from tests.conftest import random_ids, tiny_model


def test_learning_rate_by_hand():
    cfg = OptimConfig(warmup_steps=4, decay_fraction=0.25)
    factors = [lr_factor(step, 20, cfg) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:16] == [1.0] * 12
    assert factors[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert lr_factor(499, 500, OptimConfig()) == pytest.approx(0.2)  # still in the warm-up


def test_average_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    ema, expected = Ema(layer, 0.5), 0.0
    for n, value in enumerate([1.0, 3.0, -2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0], 1):
        layer.weight.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert ema.weights["weight"].item() == pytest.approx(expected)
    with ema.applied():
        assert layer.weight.item() == pytest.approx(expected)
    assert layer.weight.item() == 8.0


def trained(cfg, steps, state=None):
    model = tiny_model()
    optimizers = Optimizers(model, cfg)
    if state is not None:
        model.load_state_dict(state[0])
        for name, tensor in optimizers.state().items():
            tensor.copy_(state[1][name])
    for step in range(steps):
        ids = random_ids(2, 8, seed=step if state is None else step + 3)
        model.denoise(ids, ids, 4, torch.arange(16)).square().mean().backward()
        optimizers.step(0.5)
    return model, optimizers


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_estimate_of_memory_counts_what_is_there(name):
    model, optimizers = trained(OptimConfig(optimizer=name), 1)
    cfg = TrainConfig(optim=OptimConfig(optimizer=name), model=model.cfg)
    memory = training_memory(cfg, model)
    kept = sum(t.nbytes for t in optimizers.state().values() if t.ndim > 0)
    assert memory.optimizer == kept
    held = [2 * p.nbytes for p in model.parameters()]  # and its gradient
    held += [t.nbytes for t in Ema(model, 0.9).weights.values()]
    assert memory.weights == sum(held)
    halved = training_memory(dataclasses.replace(cfg, micro_batch=cfg.batch_size // 2), model)
    assert halved.activations == pytest.approx(memory.activations / 2)
    assert training_memory(dataclasses.replace(cfg, recompute=True), model).total < memory.total


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_continues_bitwise(name):
    cfg = OptimConfig(optimizer=name, weight_decay=0.01)
    whole, _ = trained(cfg, 6)
    half, optimizers = trained(cfg, 3)
    state = {k: v.clone() for k, v in optimizers.state().items()}
    again, _ = trained(cfg, 3, ({k: v.clone() for k, v in half.state_dict().items()}, state))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_the_matrices_of_the_blocks_alone():
    model = tiny_model()
    optimizers = Optimizers(model, OptimConfig(optimizer="muon"))
    muon = {id(p) for g in optimizers._peaks[1][0].param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    for name, p in named.items():
        inside = name.startswith("blocks.") and p.ndim == 2
        assert (id(p) in muon) == inside, name
    total = sum(len(g["params"]) for o, _ in optimizers._peaks for g in o.param_groups)
    assert total == len(named)


def test_bad_settings_name_themselves():
    with pytest.raises(ConfigError, match=r"optim\.ema-decay = 1\.0: must be in \[0, 1\)"):
        OptimConfig(ema_decay=1.0)
    with pytest.raises(ConfigError, match=r"optim\.lr = 0"):
        OptimConfig(lr=0)


def test_adamw_is_pytorchs_own():
    """The same kernel, driven without the class: the same numbers, bit for bit."""
    torch.manual_seed(0)
    start = [torch.randn(5, 7), torch.randn(3)]
    results = []
    for ours in (True, False):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [
            {"params": [p], "weight_decay": d} for p, d in zip(params, (0.3, 0.0), strict=True)
        ]
        if ours:
            optimizer = AdamW(groups, betas=(0.8, 0.97), eps=1e-7)
        else:
            optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-7, fused=True)
        torch.manual_seed(1)
        for lr in (0.1, 0.05, 0.2):
            for group in optimizer.param_groups:
                group["lr"] = lr
            params[0].grad = torch.randn(5, 7)
            params[1].grad = None if lr == 0.1 else torch.randn(3)  # one joins later
            optimizer.step()
            for p in params:
                p.grad = None
        assert all(p.grad is None for p in params)
        results.append([*params, *(v for p in params for v in optimizer.state[p].values())])
    assert len(results[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_on_a_cpu_does_not_import_the_compiler():
    code = """
import sys, torch
from bd3lm.config import ModelConfig, OptimConfig
from bd3lm.model import Transformer
from bd3lm.training.optim import Optimizers
model = Transformer(ModelConfig(width=8, depth=1, heads=1), 16)
ids = torch.arange(8)[None]
model.denoise(ids, ids, 2, torch.arange(8)).sum().backward()
Optimizers(model, OptimConfig(optimizer="adamw")).step(1.0)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
