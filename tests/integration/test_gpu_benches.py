"""The programs for a GPU's first minutes, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "benches" / "gpu"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run(program: str, *arguments: object, out: Path) -> list[dict]:
    """Results of a program, one a line of its file."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    done = subprocess.run(
        [sys.executable, str(BENCHES / program), *map(str, arguments)],
        env={**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
        | {"FIRST_RUN_WORK": str(out / "work")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = (line for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines]


def in_benches(code: str, work: Path) -> str:
    """Output of a program that imports the benches' modules; ``work`` takes their files."""
    path = os.pathsep.join([str(BENCHES), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "FIRST_RUN_WORK": str(work)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_curves_of_a_cpu_are_those_of_the_settings(tmp_path):
    """A change of the settings, or of a preset's, needs ``first_run.py curve``: 4 minutes."""
    found = in_benches(
        "import json, learning; print(json.dumps(learning.stale_curves()))", tmp_path
    )
    assert json.loads(found) == []
    known = json.loads((BENCHES / "cpu_curve.json").read_text())
    assert all(run["losses"][-1] < run["losses"][0] - 1 for run in known.values())


@pytest.mark.slow
def test_the_loss_curves_of_a_cpu_begin_as_the_program_does(tmp_path):
    """A change of the program that moves a curve needs ``first_run.py curve``, too."""
    code = """
import dataclasses, json, learning
data = learning.splits()
cut = {n: dataclasses.replace(c, steps=3) for n, c in learning.curve_configs().items()}
found = {n: learning.losses(c, data, "cpu", validated=False)[0] for n, c in cut.items()}
print(json.dumps(found))
"""
    known = json.loads((BENCHES / "cpu_curve.json").read_text())
    for name, losses in json.loads(in_benches(code, tmp_path)).items():
        assert losses == pytest.approx(known[name]["losses"][:3], rel=1e-5)


def test_what_travels_is_small():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in tracked.stdout.split("\0") if name]
    extension = ROOT / "python" / "bd3lm" / "_core.abi3.so"
    sizes = [path.stat().st_size for path in [*files, extension] if path.exists()]
    assert sum(sizes) <= 64 << 20


def test_the_first_kernels_are_rehearsed(tmp_path):
    found = run("first_run.py", "rehearse", "--only", "smoke", out=tmp_path)
    assert {row["what"] for row in found} >= {"first kernels", "head", "draw"}
    assert all(row["ok"] for row in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [("numerics",), ("train",), ("sample",), ("attention", "tune"), ("step", "speed"), ("hopper",)],
    ids="+".join,
)
def test_sections_are_rehearsed(tmp_path, sections):
    found = run("first_run.py", "rehearse", "--only", *sections, out=tmp_path)
    assert {row["section"] for row in found} == set(sections)
    assert all(row["ok"] for row in found)


@pytest.mark.slow
def test_the_driver_is_rehearsed(tmp_path, monkeypatch):
    """Each section in a process of its own; one that outlasts its time is ended."""
    found = run("first_run.py", "run", "--rehearse", "--only", "smoke", "tune", out=tmp_path)
    ended = {row["what"]: row for row in found if row["section"] == "driver"}
    assert set(ended) == {"smoke.0", "tune.0", "end"}
    assert all(row["ok"] for row in found)
    assert (tmp_path / "summary.txt").read_text().startswith("smoke: ")
    monkeypatch.setenv("FIRST_RUN_PATIENCE", "0.001")  # milliseconds for each section
    late = run("first_run.py", "run", "--rehearse", "--only", "train", out=tmp_path)
    assert late[-2]["code"] == "out of time"
    assert late[-1]["what"] == "end"


@pytest.mark.slow
def test_table_3_is_rehearsed_and_resumed(tmp_path):
    data = tmp_path / "data"
    run("table3.py", "--rehearse", "prepare", "--data", data, out=tmp_path)
    train = ("table3.py", "--rehearse", "train", "--data", data, "--stop")
    found = run(*train, "0", out=tmp_path)
    assert [row.get("done") for row in found] == [[]]
    found = run(*train, "600", out=tmp_path)
    assert all(row["ok"] for row in found[1:]), found
    finished = [row["system"] for row in found if row.get("finished")]
    assert set(found[-1]["done"]) == set(finished)
    assert {"AR", "SEDD", "MDLM", "BD3-LM S = 16", "BD3-LM S = 8", "BD3-LM S = 4"} <= set(finished)
    before = len(found)
    again = run(*train, "600", out=tmp_path)
    assert len(again) == before + 1  # nothing is trained twice
