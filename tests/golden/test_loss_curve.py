"""Twenty steps of training, pinned: a change of these numbers is a change of training.

After a change that is meant to: ``python -m tests.golden.test_loss_curve`` writes them anew.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bd3lm.config import preset
from bd3lm.data import Loader, Rows
from bd3lm.model import Transformer
from bd3lm.systems import build_system
from bd3lm.training.ema import Ema
from bd3lm.training.optim import Optimizers, lr_factor
from bd3lm.training.trainer import Trainer
from tests.conftest import MASK_ID, VOCAB_SIZE, token_arrays

GOLDEN = Path(__file__).with_name("loss_curve.json")
CASES = {
    "demo": {},
    "paper": {"optimizer": "adamw", "warmup_steps": 4},
}
SHAPES = {
    "demo": {"softmax_cutoffs": (5, 9)},
    "paper": {"softmax_cutoffs": (), "embed_norm": False, "head_bias": False},
}


def settings(name):
    """The demo's recipe, or the paper's, for a model of two layers."""
    base = preset("demo")
    noise = dataclasses.replace(base.noise, estimator="bernoulli" if name == "paper" else "count")
    return dataclasses.replace(
        base,
        seq_len=32,
        steps=20,
        batch_size=8,
        noise=noise,
        init_unigram=False,
        model=dataclasses.replace(
            base.model, width=32, depth=2, heads=2, cond_width=8, **SHAPES[name]
        ),
        optim=dataclasses.replace(base.optim, **CASES[name]),
    )


def curve(name):
    """Losses of 20 fp32 steps on one document of random ids, and the averaged weights' norm."""
    cfg = settings(name)
    rows = Rows(token_arrays(2000), seq_len=32, block_size=4)
    loader, system = Loader(rows, cfg.batch_size, cfg.seed), build_system(cfg, MASK_ID)
    torch.manual_seed(cfg.seed)
    model = Transformer(cfg.model, VOCAB_SIZE)
    optimizers, ema, losses = Optimizers(model, cfg.optim), Ema(model, 0.9), []
    for step in range(cfg.steps):
        batch = loader.batch(step, system.noise(step))
        loss = system.loss(model, batch) / batch.num_noisable
        loss.backward()
        optimizers.step(lr_factor(step, cfg.steps, cfg.optim))
        ema.update()
        losses.append(loss.item())
    norm = sum(w.square().sum().item() for w in ema.weights.values()) ** 0.5
    return {"losses": losses, "average_norm": norm}


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_the_recorded_one(name):
    expected, got = json.loads(GOLDEN.read_text())[name], curve(name)
    # Matrix products differ in the last bits between machines, and twenty steps amplify that.
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert got["average_norm"] == pytest.approx(expected["average_norm"], rel=1e-3)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("name", CASES)
def test_the_trainer_follows_it_in_either_precision(name, precision, limit, tmp_path):
    """`Trainer.step` itself; clipping, which the recorded steps do not do, never binds."""
    cfg = settings(name)
    optim = dataclasses.replace(cfg.optim, grad_clip=1e9)
    cfg = dataclasses.replace(cfg, optim=optim, precision=precision)
    text = token_arrays(2000)
    text.tokenizer = SimpleNamespace(mask_id=MASK_ID, vocab_size=VOCAB_SIZE)
    trainer = Trainer(cfg, text, text, tmp_path, None)
    losses = [trainer.step()[0].item() for _ in range(cfg.steps)]
    trainer.batches.close()
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name]["losses"], rel=limit)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: curve(name) for name in CASES}, indent=1) + "\n")
