"""A sweep that is killed: nothing finished is lost, and nothing half-made is taken for whole."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow


def sweep(out):
    code = "from bd3lm_paper.cli import main; main()"
    command = [sys.executable, "-c", code, "table1", "table2", "--scale", "smoke"]
    return subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)


def cells(out):
    return {file.name: file.read_text() for file in (out / "cells").glob("*.json")}


def tables(out):
    return [
        json.loads((out / "tables" / f"{name}.json").read_text()) for name in ("table1", "table2")
    ]


def test_killed_at_random_moments(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sweep(whole).wait() == 0
    rng = random.Random(1)
    kept: dict[str, str] = {}
    for _ in range(4):
        process = sweep(killed)
        before = len(cells(killed))
        while len(cells(killed)) < before + 2 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.random() / 4)  # short of the 30 cells of the whole
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = cells(killed)
        assert found.items() >= kept.items()  # finished files stay unchanged
        assert all(json.loads(text)["values"] for text in found.values())
        kept = found
    assert 0 < len(kept) < len(cells(whole))
    assert sweep(killed).wait() == 0
    assert cells(killed).items() >= kept.items()
    assert tables(killed) == tables(whole)
