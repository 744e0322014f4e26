"""A machine with neither GPU nor the packages for one, as far as Python can tell."""

import os
import subprocess
import sys

import pytest
import torch

from tests.integration.conftest import story


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_it_trains_and_samples_without_triton_and_flash_attn(tmp_path):
    (tmp_path / "t.txt").write_text("\n".join(story(i) for i in range(20)))
    script = """
import sys
sys.modules.update({"triton": None, "flash_attn": None})
from bd3lm.cli.train import main as train
from bd3lm.cli.sample import main
train("--data t.txt --valid t.txt --out run --steps 2 --batch-size 2 --seq-len 32 --device cpu "
      "--model.width 32 --model.depth 1 --model.heads 1 --sample.num 1 --sample.length 12 "
      "--eval.every 0".split())
main(["run/checkpoint", "--num", "1", "--length", "12", "--device", "cpu"])
main(["run/checkpoint", "--num", "1", "--device", "cpu", "--attention", "triton"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (tmp_path / "run" / "summary.json").exists(), done.stderr
    assert "sample 1: " in done.stdout
    # The last command is the one that fails, by one sentence.
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: attention = triton: must be one that runs here: triton needs an NVIDIA GPU of "
        "compute capability 8.0 or newer and the triton package"
    )
