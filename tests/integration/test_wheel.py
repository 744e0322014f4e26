"""The wheel, installed into an empty environment and used there."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.integration.conftest import story

ROOT = Path(__file__).parents[2]


def call(*args, cwd, **extra):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env=environment | extra,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if shutil.which("cargo") is None:
        pytest.skip("no Rust toolchain to build a wheel with")
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "maturin", "build", "--release", "-q", "--out", out, cwd=ROOT)
    return next(out.glob("*.whl"))


def test_it_holds_what_it_needs(wheel):
    assert "abi3" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    needed_files = "_core.pyi py.typed tokenizer.json default_corpus.jsonl.xz tuning.json"
    for needed in needed_files.split():
        assert any(name.endswith(needed) for name in names), needed
    assert any("_core" in name and name.endswith(".so") for name in names)
    assert not any(name.startswith(("tests/", "benches/")) for name in names)


def test_it_trains_in_an_empty_environment(wheel, tmp_path):
    venv, python = tmp_path / "venv", tmp_path / "venv" / "bin" / "python"
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not installed beside this Python")
    call(uv, "venv", "-q", "--python", sys.executable, venv, cwd=tmp_path)
    call(uv, "pip", "install", "-q", "--python", python, wheel, cwd=tmp_path)
    # PyTorch for CUDA brings Triton along; here it has to do without.
    call(uv, "pip", "uninstall", "-q", "--python", python, "triton", cwd=tmp_path)
    (tmp_path / "t.txt").write_text("\n".join(story(i) for i in range(20)))
    args = (
        "--steps 2 --batch-size 2 --seq-len 32 --model.width 32 --model.depth 1 --model.heads 1 "
        "--sample.num 1 --sample.length 12 --eval.every 0 --device cpu --valid t.txt"
    ).split()
    train = venv / "bin" / "bd3lm-train"
    call(train, "--data", "t.txt", "--out", "run", *args, cwd=tmp_path, OMP_NUM_THREADS="1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tokens"] == 2 * 2 * 32
    assert summary["val_coverage"] == 1.0
    record = call(
        venv / "bin" / "bd3lm-sample", "run/checkpoint", "--num", "1", "--json", cwd=tmp_path
    )
    assert json.loads(record)["stop"] in ("eos", "length")
