"""Start ``interpret.py``, wait for its results, and judge them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cases import BACKWARD_LIMIT, FORWARD_LIMIT, Case
from mutations import DECODE, MUTATIONS

Errors = dict[str, float]
DECODES: list[dict[str, Any]] = [
    {
        "lengths": lengths, "heads": heads, "kv_heads": kv_heads, "width": width, "rows": rows,
        "page": page, "block_size": block_size, "dtype": dtype, "chunks": chunks,
    }
    for lengths, heads, kv_heads, width, rows, page, block_size, dtype, chunks in (
        ([37, 70], 4, 2, 24, 8, 16, 4, "fp32", 3),
        ([9], 2, 2, 16, 3, 5, 3, "fp32", 1),
        ([130, 20, 65], 6, 1, 32, 5, 64, 5, "bf16", 4),
        ([40, 16], 1, 1, 64, 16, 16, 16, "fp16", 5),
    )
]  # fmt: skip


class Child:
    """``interpret.py`` at work in the background.

    Its results come in a file: libraries print to standard output.
    """

    def __init__(self, jobs: dict[str, list[dict[str, Any]]]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.results = Path(self.folder.name) / "results.json"
        self.errors = Path(self.folder.name) / "stderr.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("interpret.py")), str(self.results)],
                stdin=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "TRITON_INTERPRET": "1"},
            )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(jobs))
        self.process.stdin.close()

    def finish(self) -> dict[str, Any]:
        """Wait, and give the results by name."""
        code = self.process.wait()
        assert code == 0, (
            f"the interpreter ended with {code}; a traceback is above, a signal has none"
        )
        return json.loads(self.results.read_text())

    def kill(self) -> None:
        """End it, where it is not at its end already."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()


def job(
    cases: Iterable[Case],
    decode: Iterable[dict[str, Any]] = (),
    mutation: list[str] | None = None,
    backward: bool = True,
    order: bool = False,
) -> dict[str, Any]:
    """One job as :mod:`interpret` reads it."""
    return {
        "mutation": mutation,
        "backward": backward,
        "order": order,
        "cases": [dataclasses.asdict(case) for case in cases],
        "decode": list(decode),
    }


def mutation_jobs() -> list[dict[str, Any]]:
    """The probes on the kernels as they are, then on every mutation."""
    probes = {m.probe for m in MUTATIONS if isinstance(m.probe, Case)}
    jobs = [job(sorted(probes, key=repr), [DECODE], order=True)]
    for m in MUTATIONS:
        cases = [m.probe] if isinstance(m.probe, Case) else []
        decode = [DECODE] if m.probe == "decode" else []
        text = [m.file, m.old, m.new]
        jobs.append(job(cases, decode, text, m.backward, order=m.probe == "order"))
    return jobs


def too_large(errors: Errors, dtype: str) -> dict[str, float]:
    """Errors that exceed the limit of their kind."""
    forward = ("out", "paged", "plain")
    return {
        name: value
        for name, value in errors.items()
        if not value <= (FORWARD_LIMIT if name in forward else BACKWARD_LIMIT)[dtype]
    }
