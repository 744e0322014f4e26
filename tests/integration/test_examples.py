"""The examples run from the first to the last line, on a very small model."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

import bd3lm

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "steps": 3,
    "seq_len": 32,
    "batch_size": 4,
    "device": "cpu",
    "model": {"width": 32, "depth": 2, "heads": 2},
    "eval": {"every": 0},
    "sample": {"num": 1, "length": 20},
}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Import an example by name, in a folder of its own."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(EXAMPLES))
        yield import_module
    for name in [path.stem for path in EXAMPLES.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def checkpoint(example):
    """The model that the first example trains."""
    return example("train_on_text").main(**SMALL)


def test_train_on_text(checkpoint):
    assert bd3lm.load_checkpoint(checkpoint).step == SMALL["steps"]


def test_sample_and_stream(example, checkpoint, capsys):
    example("sample_and_stream").main(checkpoint, length=24)
    printed = capsys.readouterr().out
    assert printed.count("The Mole") >= 4
    assert "▒▒▒" in printed


def test_infill(example, checkpoint, capsys):
    example("infill").main(checkpoint)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("by the river" in line and line.endswith(" home.") for line in lines)


def test_score_and_compare(example, checkpoint, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The Mole had been working very hard all the morning.\n" * 8, encoding="utf-8")
    example("score_and_compare").main(checkpoint, data=text)
    printed = capsys.readouterr().out
    assert "second - first:" in printed
    assert "least likely:" in printed


def test_own_schedule(example, capsys):
    example("own_schedule").main(**SMALL)
    assert "bits per byte" in capsys.readouterr().out


def test_finetune_block_size(example, checkpoint, capsys):
    changed = {k: v for k, v in SMALL.items() if k == "steps"}
    example("finetune_block_size").main(checkpoint, block_size=8, **changed)
    assert "S = 8:" in capsys.readouterr().out


def test_every_example_is_tested():
    here = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"def test_{path.stem}(" in here
