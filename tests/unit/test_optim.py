"""Learning rates, weight averages and optimizer state."""

import pytest
import torch

from bd3lm.config import OptimConfig
from bd3lm.errors import ConfigError
from bd3lm.train.ema import Ema
from bd3lm.train.optim import Optimizers, lr_factor
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
        optimizers.load(state[1], "the test")
    for step in range(steps):
        ids = random_ids(2, 8, seed=step if state is None else step + 3)
        model.denoise(ids, ids, 4, torch.arange(16)).square().mean().backward()
        optimizers.step(0.5)
    return model, optimizers


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
    with pytest.raises(ConfigError, match=r"optim\.ema-decay = 1\.0: in \[0, 1\)"):
        OptimConfig(ema_decay=1.0)
    with pytest.raises(ConfigError, match=r"optim\.lr = 0"):
        OptimConfig(lr=0)
