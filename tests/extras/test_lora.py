"""Low-rank adapters: merged weights compute the same, and only adapters are trained and saved."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="needs the extra lora; run by make check-extras")

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.steps import find_checkpoint
from bd3lm.config import LoraConfig, OptimConfig, preset
from bd3lm.data import load_tokenizer, prepare
from bd3lm.errors import CheckpointError, MissingPackageError
from bd3lm.training import run_training
from bd3lm.training.adapters import add_adapters, base_tensors, merged_weights, trained_parameters
from bd3lm.training.parallel import whole_model
from tests.checkpoints import random_checkpoint
from tests.integration.conftest import Silent

SMALL = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 48}
LORA = LoraConfig(rank=3, alpha=5.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen", SMALL),
        ("qwen", SMALL | {"qk_norm": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        ("tiny", {"width": 32, "depth": 2, "heads": 2, "cond_width": 8}),
    ],
)
@pytest.mark.parametrize("targets", [LORA.targets, ("qkv",), ("mlp.down", "out")])
def test_merged_weights_compute_the_same(name, shape, targets):
    loaded = random_checkpoint(name, "bd3lm", shape)
    model, cfg = loaded.model, dataclasses.replace(LORA, targets=targets)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, cfg)
    assert base_tensors(dict(model.named_parameters())).keys() == plain.keys()
    adapters = trained_parameters(model)
    assert len(adapters) == 2 * len(targets) * loaded.config.model.depth
    ids = torch.randint(2, 1000, (2, 32))
    noised, select = ids.clone(), torch.arange(0, 64, 3)
    noised.view(-1)[select] = loaded.tokenizer.mask_id
    # An adapter's product is zero at first.
    before = whole_model(model, plain, torch.device("cpu")).denoise(noised, ids, 4, select)
    torch.testing.assert_close(model.denoise(noised, ids, 4, select), before)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    merged = whole_model(model, merged_weights(model, adapters, cfg), torch.device("cpu"))
    for run in (
        lambda m: m.denoise(noised, ids, 4, select),
        lambda m: m.encode(ids, 1, select=select),
    ):
        with torch.no_grad():
            found, expected = run(merged), run(model)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - before[: len(found)]).abs().max() > 1e-2
    model.denoise(noised, ids, 4, select).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(adapters)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Settings of a run with adapters, on a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("lora")
    text = "The old house stood by the river, and nobody lived there. " * 200
    (folder / "x.txt").write_text("\n".join(text[i : i + 90] for i in range(0, 9000, 90)))
    tokenizer = load_tokenizer("default")
    prepare([folder / "x.txt"], tokenizer, folder / "data", lines=True, valid_fraction=0.1)
    settings = preset(
        "qwen",
        data=str(folder / "data"),
        seq_len=32,
        steps=2,
        batch_size=4,
        checkpoint_every=2,
        log_every=1,
        device="cpu",
        precision="fp32",
        model=SMALL,
        eval={"every": 0},
        sample={"num": 1, "length": 16},
    )
    settings = dataclasses.replace(settings, optim=OptimConfig(lr=0.01, warmup_steps=1))
    run_training(settings, folder / "base", Silent())
    return dataclasses.replace(settings, init_from=str(folder / "base"), lora=LORA, steps=4, seed=5)


def tensors(out, name="model"):
    return load_file(find_checkpoint(Path(out)) / f"{name}.safetensors")


def test_adapters_alone_are_trained_and_a_resumed_run_is_the_same(base, tmp_path):
    summary = run_training(base, tmp_path / "whole", Silent())
    training = tensors(tmp_path / "whole", "training")
    assert {name.split("/")[0] for name in training} == {"model", "average", "optimizer"}
    assert all(".lora_" in name for name in training)
    before, after = tensors(base.init_from), tensors(tmp_path / "whole")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = {f"blocks.{i}.{name}.weight" for i in range(2) for name in LORA.targets}
    assert before.keys() == after.keys()
    assert changed == targets
    run_training(dataclasses.replace(base, steps=2), tmp_path / "parts", Silent())
    run_training(base, tmp_path / "parts", Silent(), resume=True)
    for name in ("model", "training"):
        own = tensors(tmp_path / "parts", name)
        for key, tensor in tensors(tmp_path / "whole", name).items():
            assert torch.equal(own[key], tensor), key
    # Neither loading nor scoring needs peft.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        loaded = load_checkpoint(tmp_path / "whole")
        with pytest.raises(MissingPackageError, match=r"lora\.rank needs the package peft"):
            run_training(base, tmp_path / "without", Silent())
    from bd3lm.data import Dataset
    from bd3lm.evaluate.score import Scoring, validation_path

    result = Scoring.prepare(loaded, Dataset(validation_path(loaded))).likelihood()
    assert result.nll == pytest.approx(summary["val_nelbo"], rel=1e-6)


def test_another_base_is_refused(base, tmp_path):
    first = dataclasses.replace(base, steps=2)
    run_training(first, tmp_path / "run", Silent())
    other = dataclasses.replace(base, init_from=None, lora=LoraConfig(), steps=2, seed=9)
    run_training(other, tmp_path / "other", Silent())
    (tmp_path / "moved").symlink_to(base.init_from)
    moved = dataclasses.replace(first, init_from=str(tmp_path / "moved"))
    run_training(moved, tmp_path / "linked", Silent())
    (tmp_path / "moved").unlink()
    (tmp_path / "moved").symlink_to(tmp_path / "other")
    longer = dataclasses.replace(moved, steps=4)
    with pytest.raises(CheckpointError, match="is not the one that this run began with"):
        run_training(longer, tmp_path / "linked", Silent(), resume=True)
