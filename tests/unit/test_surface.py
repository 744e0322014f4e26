"""The public names: they exist, they are lazy, and each common task takes a few lines."""

import subprocess
import sys

import pytest
import torch

import bd3lm
from bd3lm.errors import ConfigError
from tests.conftest import MASK_ID, random_ids, tiny_model


def test_every_public_name_exists_and_no_other():
    for name in bd3lm.__all__:
        assert getattr(bd3lm, name) is not None
    assert set(bd3lm.__all__) <= set(dir(bd3lm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bd3lm.nothing  # noqa: B018


def test_import_imports_neither_torch_nor_the_extension():
    heavy = ("torch", "numpy", "bd3lm._core")
    code = f"import bd3lm, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_settings_of_a_preset_can_be_changed_by_name():
    cfg = bd3lm.preset("demo", steps=20, noise={"schedule": "cosine"})
    assert (cfg.steps, cfg.noise.schedule, cfg.noise.estimator) == (20, "cosine", "count")
    with pytest.raises(ConfigError, match="stepz"):
        bd3lm.preset("demo", stepz=20)
    with pytest.raises(ConfigError, match="colour"):
        bd3lm.preset("demo", noise={"colour": "pink"})


def test_forward_gives_the_logits_of_every_way_to_run():
    model, x0 = tiny_model(), random_ids(2, 16)
    xt = torch.where(random_ids(2, 16, seed=1) < 8, MASK_ID, x0)
    everything = model(xt, 4, x0=x0)
    assert everything.shape == (2, 16, model.vocab_size)
    select = torch.tensor([3, 9, 30])
    assert torch.allclose(model(xt, 4, x0=x0, select=select), everything.flatten(0, 1)[select])
    # The first block has no clean block before it, so both ways agree there.
    assert torch.allclose(model(xt, 4)[:, :4], everything[:, :4], atol=1e-5)
    assert torch.equal(model(x0, 16), model.logits(model.encode(x0, 16)))
