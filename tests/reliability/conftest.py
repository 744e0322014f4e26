"""A small run that tests damage, interrupt and resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3lm.checkpoint.steps import find_checkpoint
from bd3lm.config import TrainConfig, preset
from bd3lm.data import train_tokenizer
from bd3lm.training import run_training
from tests.integration.conftest import Silent, story, write_splits


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory with train/ and valid/, and a tokenizer of 300 ids."""
    root = tmp_path_factory.mktemp("small")
    return write_splits(root, train_tokenizer([story(1)], 300), rows=(12, 2), words=120)


@pytest.fixture(scope="session")
def small(small_data: Path) -> TrainConfig:
    """A dozen steps of a model of one layer."""
    base = preset("demo")
    return dataclasses.replace(
        base,
        data=str(small_data),
        seq_len=16,
        steps=12,
        batch_size=4,
        log_every=1,
        checkpoint_every=4,
        device="cpu",
        model=dataclasses.replace(base.model, width=16, depth=1, heads=2),
        optim=dataclasses.replace(base.optim, warmup_steps=2),
        eval=dataclasses.replace(base.eval, every=0, repeats=2),
        sample=dataclasses.replace(base.sample, num=1, length=8),
    )


@pytest.fixture(scope="session")
def trained(small: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run_training(small, out, Silent())
    return out


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The folder of its last checkpoint, alone, to be damaged."""
    return Path(shutil.copytree(find_checkpoint(trained), tmp_path / "copy"))


@pytest.fixture
def old(copy: Path) -> Path:
    """Checkpoint of version 1: no digests, so that each check behind them is reached."""

    def strip(meta: dict) -> None:
        meta["version"] = 1
        for name in ("sha256", "files", "data"):
            del meta[name]

    edit(copy, strip)
    return copy


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON of a checkpoint in place."""
    file = folder / "config.json"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))
