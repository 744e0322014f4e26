"""A small corpus on disk, and runs short enough to repeat."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm.config import TrainConfig, preset
from bd3lm.data import Tokenizer, load_tokenizer, prepare

WORDS = "the old house stood by the river and no one knew who had built it or when".split()


def story(seed: int, words: int = 400) -> str:
    """Words in a fixed but irregular order."""
    return " ".join(WORDS[(seed * 7 + i * i * 5 + i // 3) % len(WORDS)] for i in range(words))


def write_splits(root: Path, tokenizer: Tokenizer, *, rows: tuple[int, int], words: int) -> Path:
    """Prepare train/ and valid/ of so many stories each below ``root``."""
    train, valid = rows
    for split, seeds in (("train", range(train)), ("valid", range(train, train + valid))):
        text = root / f"{split}.txt"
        text.write_text("\n".join(story(seed, words) for seed in seeds), encoding="utf-8")
        prepare([text], tokenizer, root / "data" / split, lines=True)
    return root / "data"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory with train/ and valid/."""
    root = tmp_path_factory.mktemp("corpus")
    return write_splits(root, load_tokenizer("default"), rows=(30, 3), words=400)


@pytest.fixture
def config(corpus: Path) -> TrainConfig:
    """A few steps of a very small model."""
    base = preset("demo")
    return dataclasses.replace(
        base,
        data=str(corpus),
        seq_len=32,
        steps=6,
        batch_size=8,
        log_every=1,
        checkpoint_every=100,
        device="cpu",
        model=dataclasses.replace(base.model, width=32, depth=2, heads=2),
        eval=dataclasses.replace(base.eval, every=0),
        init_unigram=False,
        sample=dataclasses.replace(base.sample, num=2, length=24),
    )


class Silent:
    """A reporter that only remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def step(self, done: int, metrics: dict[str, float]) -> None: ...
    def validation(self, step: int, result: object) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)


def command(name: str, *args: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, without the variables set here."""
    code = f"from bd3lm.cli.{name} import main; main()"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BD3LM_")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        timeout=300,
        **options,  # type: ignore[call-overload]
    )
