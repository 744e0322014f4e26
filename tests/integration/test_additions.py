"""Additions by the table "What to add where" of ARCHITECTURE.md: a strategy, a schedule.

A copy of the sources is changed in the places that a row names, and in no other. The addition must
then work everywhere.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STRATEGY = '''"""Halves: a forward reveals half of the masked positions."""

from collections.abc import Iterator

import numpy as np

from bd3lm.sample.block import BlockDraw


def halves(block: BlockDraw) -> Iterator[None]:
    """Reveal the first half of the masked positions of each row."""
    while block.masked.any():
        rows, pos = block.masked.nonzero()
        scored = block.score(rows, pos, np.zeros(len(block.masked), dtype=np.float32))
        half = (block.masked.sum(axis=1) + 1) // 2
        block.reveal(scored, block.masked.cumsum(axis=1)[rows, pos] <= half[rows])
        yield
'''

SAMPLE = """
import bd3lm
from bd3lm.errors import ConfigError
from tests.conftest import tiny_model
from tests.unit.test_sampler import config, sampler

(row,) = sampler(tiny_model()).generate(config(length=16, halves=True), [[]])
print(bd3lm.__file__, len(row.ids), row.nfe)
try:
    config(halves=True, steps=4)
except ConfigError as error:
    print(error)
"""


class Copy:
    """A copy of the sources that may be changed where one row of the table says so."""

    def __init__(self, folder: Path, row: str, parts: tuple[str, ...]) -> None:
        self.folder = folder
        table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
        (self.row,) = re.findall(rf"^\| {row} \|.*$", table, flags=re.MULTILINE)
        for part in parts:
            if (ROOT / part).is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "target")
                shutil.copytree(ROOT / part, folder / part, ignore=ignore)
            else:
                shutil.copy(ROOT / part, folder / part)

    def write(self, folder: str, name: str, text: str) -> None:
        """Write a new file in a folder that the row names."""
        assert f"`{folder}`" in self.row, folder
        (self.folder / folder / name).write_text(text, encoding="utf-8")

    def change(self, named: str, old: str, new: str, file: str = "") -> None:
        """Replace text once, in a file that the row names or in one of a folder that it names."""
        assert f"`{named}`" in self.row, named
        path = self.folder / named / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path}: {old!r}"
        path.write_text(text.replace(old, new), encoding="utf-8")

    def run(self, *command: str, cwd: Path = ROOT) -> str:
        """Run a command with the changed package, and return its output."""
        ours = {"PYTHONPATH": str(self.folder / "python"), "PYO3_PYTHON": sys.executable}
        variables = {**os.environ, **ours}
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_a_decoding_strategy_with_a_setting(tmp_path):
    copy = Copy(tmp_path, "a decoding strategy with a setting", ("python/bd3lm",))
    strategies, settings = "python/bd3lm/sample/strategies/", "python/bd3lm/config/sample.py"
    copy.write(strategies, "halves.py", STRATEGY)
    copy.change(
        strategies,
        '    "planned": Entry(',
        '    "halves": Entry(lambda cfg, system: cfg.halves, halves),\n    "planned": Entry(',
        file="__init__.py",
    )
    copy.change(
        strategies,
        "from bd3lm.sample.strategies.parallel",
        "from bd3lm.sample.strategies.halves import halves\nfrom bd3lm.sample.strategies.parallel",
        file="__init__.py",
    )
    setting = '    halves: bool = False\n    """Reveal half of a block in each forward."""\n'
    copy.change(settings, "    seed: int = 1\n", f"{setting}    seed: int = 1\n")
    copy.change(
        settings, "        ways = {\n", '        ways = {\n            "halves": self.halves,\n'
    )
    used, refused = copy.run(sys.executable, "-c", SAMPLE).splitlines()
    # Three tokens follow BOS in the first block: 2 and 1. Four in each of the others: 2, 1 and 1.
    assert used == f"{tmp_path}/python/bd3lm/__init__.py 15 {2 + 3 + 3 + 3}"
    assert "one at a time" in refused
    command = "from bd3lm.cli.main import sample; sample()"
    assert "--halves" in copy.run(sys.executable, "-c", command, "--help")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cargo") is None, reason="needs a Rust toolchain")
def test_a_built_in_noise_schedule(tmp_path):
    """The cubic schedule, p = t³."""
    parts = ("Cargo.toml", "Cargo.lock", "pyproject.toml", "rust", "benches", "python", "tests")
    copy = Copy(tmp_path, "a built-in noise schedule", parts)
    rust = "rust/bd3lm-core/src/noise/schedule/mod.rs"
    copy.change(rust, "NAMES: [&'static str; 8]", "NAMES: [&'static str; 9]")
    last = '        "table",\n'
    copy.change(rust, f"{last}    ];", f'{last}        "cubic",\n    ];')
    for after, line in (
        ("    /// p interpolates a table.", "    /// p = t³.\n    Cubic,"),
        ("            Schedule::Table(_) => 7,", "            Schedule::Cubic => 8,"),
        ('        ];\n        named("schedule"', '            ("cubic", |_| Ok(Schedule::Cubic)),'),
        ("            Schedule::Square => t * t,", "            Schedule::Cubic => t * t * t,"),
        ("            Schedule::Square => 2.0 / t,", "            Schedule::Cubic => 3.0 / t,"),
        ("            Schedule::Square => p.sqrt(),", "            Schedule::Cubic => p.cbrt(),"),
    ):
        copy.change(rust, after, f"{line}\n{after}")
    last = '    "table",\n'
    copy.change("python/bd3lm/config/names.py", last, f'{last}    "cubic",\n')
    tests = "tests/unit/test_schedules.py"
    line = '    "square": Reference({}, lambda t: t**2, torch.sqrt),\n'
    cubic = '    "cubic": Reference({}, lambda t: t**3, lambda p: p ** (1 / 3)),\n'
    copy.change(tests, line, line + cubic)
    package, target = tmp_path / "python" / "bd3lm", ROOT / "target" / "additions"
    build = ("cargo", "build", "-q", "-p", "bd3lm-py", "--features", "pyo3/extension-module")
    copy.run(*build, "--target-dir", str(target), cwd=tmp_path)
    (library,) = (path for path in (target / "debug").glob("lib_core.*") if path.suffix != ".d")
    (package / "_core.abi3.so").unlink()
    shutil.copy(library, package / "_core.abi3.so")
    copy.run(sys.executable, "-m", "pytest", "-m", "not slow", tests, cwd=tmp_path)
