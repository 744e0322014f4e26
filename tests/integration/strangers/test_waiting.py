"""No waiting for nothing; a machine that others use; sources by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm.cli import prepare, train
from tests.integration.strangers.common import TINY, refused

# --- no waiting for nothing -----------------------------------------------------------------------


def test_a_hub_that_does_not_answer_is_tried_once(monkeypatch):
    from huggingface_hub import constants

    from bd3lm import hub

    attempts = []

    def refused_connection(address, timeout):
        attempts.append((address, timeout))
        raise OSError("Network is unreachable")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub.socket, "create_connection", refused_connection)
    for _ in range(3):
        hub.connect()
    assert len(attempts) == 1
    assert constants.HF_HUB_OFFLINE
    assert hub.reason(RuntimeError("x")) == "offline, and not in the local cache"


def test_a_tokenizer_of_the_hub_is_one_sentence_offline(capsys, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("the old house")
    sentence = refused(
        capsys, prepare.main, text, "--out", tmp_path / "o", "--tokenizer", "no-one/nothing"
    )
    assert sentence.endswith("(offline, and not in the local cache)\n")


def test_the_final_scoring_has_a_size(corpus, capsys, tmp_path):
    out = tmp_path / "run"
    train.main([*TINY, "--data", str(corpus), "--out", str(out), "--eval.final-rows", "2"])
    assert "Trained in" in capsys.readouterr().out
    assert 0 < json.loads((out / "summary.json").read_text())["val_tokens"] <= 2 * 32


# --- sharing the machine --------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="masks of Linux")
def test_threads_follow_affinity_and_quota():
    code = """
import os
os.environ.pop("OMP_NUM_THREADS", None)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from bd3lm.data.prepare import available_threads
from bd3lm.device import resolve_device
assert available_threads() == 1
torch.set_num_threads(2)  # as in a container whose quota is smaller than its mask
resolve_device("cpu")
assert torch.get_num_threads() == 1
os.environ["OMP_NUM_THREADS"] = "2"
torch.set_num_threads(2)
resolve_device("cpu")
assert torch.get_num_threads() == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_streams_watch_for_busy_cores_too(checkpoint, monkeypatch):
    from bd3lm import load_checkpoint
    from bd3lm.model.threads import _State

    assert _State.users == 0
    events = load_checkpoint(checkpoint).stream("the", length=16)
    next(events)
    assert _State.users == 1
    events.close()
    assert _State.users == 0


# --- saying what things are -----------------------------------------------------------------------


def test_sources_are_named():
    """The paper and its reproduction by title, authors and link; the shipped texts by source."""
    root = Path(__file__).parents[3]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "Block Diffusion: Interpolating Between Autoregressive and" in readme
    assert "https://arxiv.org/abs/2503.09573" in readme
    results = (root / "docs" / "results.md").read_text(encoding="utf-8")
    for text in (readme, results):
        assert "Kordas" in text
    notice = (root / "NOTICE").read_text(encoding="utf-8")
    for file in ("default_corpus.jsonl.xz", "tokenizer.json"):
        assert (root / "python/bd3lm/assets" / file).is_file()
        assert file in notice
    settings = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert '"NOTICE"' in settings
