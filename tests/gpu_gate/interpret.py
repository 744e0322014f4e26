"""Run the kernels in Triton's interpreter and write their errors as JSON to a named file.

A script of its own, because Triton reads ``TRITON_INTERPRET`` when it is first imported. Standard
input holds named lists of jobs, each ``{"mutation": null or [file, old, new], "cases": [...],
"decode": [...], "order": bool, "backward": bool}``. Their results have the same names and are
lists of lists of ``{"out": ..., "dq": ..., ...}``. The names of
:data:`CHECKS` select the checks of other modules.
"""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import logits
import order
import torch
import traced
from cases import DTYPES, Case, error, guarded, reference, spread
from compat import patch_interpreter
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import bd3lm.model.attention.triton as package
from bd3lm.model.attention.triton.ranges import ranges

names = (f"mutant{i}" for i in itertools.count())


def of_emulated(function: str) -> Callable[[], Any]:
    """A check of :mod:`emulated`, which imports this module."""
    return lambda: getattr(importlib.import_module("emulated"), function)()


CHECKS: dict[str, Callable[[], Any]] = {
    "traced": traced.run,
    "logits": logits.run,
    "emulated": of_emulated("run"),
    "emulated_exhaustive": of_emulated("run_exhaustive"),
}


def load(mutation: list[str] | None, folder: Path) -> ModuleType:
    """The launch module over the kernels, or over a copy whose text was changed."""
    source = Path(package.__file__).parent
    if mutation is None:
        return importlib.import_module("bd3lm.model.attention.triton.launch")
    name = next(names)
    shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / name / "__init__.py").write_text("")
    for path in (folder / name).glob("*.py"):
        text = path.read_text().replace("bd3lm.model.attention.triton", name)
        if path.name == mutation[0]:
            if text.count(mutation[1]) < 1:
                raise SystemExit(f"{mutation[0]} no longer holds {mutation[1]!r}")
            text = text.replace(mutation[1], mutation[2])
        path.write_text(text)
    return importlib.import_module(f"{name}.launch")


def poisoned(x: torch.Tensor) -> torch.Tensor:
    """Output buffer of NaN: elements that a kernel does not write show."""
    return guarded(torch.full(x.shape, float("nan")), x.dtype)


def poisoned_afar(x: torch.Tensor) -> torch.Tensor:
    """The same with rows as far apart as those of the inputs."""
    return spread(torch.full(x.shape, float("nan")), x.dtype)


def borders_are_nan(view: torch.Tensor) -> bool:
    """Return whether nothing was written around a view made by :func:`guarded`."""
    buffer = view._base
    assert buffer is not None
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside[:, :, 32 : 32 + view.shape[2], 8 : 8 + view.shape[3]] = False
    return bool(buffer[outside].isnan().all())


def attention(launch: ModuleType, case: Case, backward: bool = True) -> dict[str, float]:
    """Errors of the output and of each gradient."""
    mask = case.mask()
    q, k, v, dout = case.inputs(mask)
    keys, queries = ranges(mask, "cpu")
    scale = case.width**-0.5
    out, lse = launch.run_forward(q, k, v, keys, mask.noised, scale)
    found = {"out": out}
    if backward:
        gradients = launch.run_backward(dout, q, k, v, out, lse, keys, queries, mask.noised, scale)
        found |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    wanted = reference(q, k, v, dout, mask.dense())
    errors = {n: error(f, w) for (n, f), w in zip(found.items(), wanted, strict=False)}
    if not case.far and not all(borders_are_nan(x) for x in found.values()):
        errors["borders"] = float("inf")
    return errors


def checked(launch: ModuleType, case: Case, backward: bool) -> dict[str, float]:
    """Run :func:`attention` with every 32-bit sum and product checked for overflow."""
    options = interpreter.InterpreterOptions(debug=True)
    with mock.patch.object(interpreter.interpreter_builder, "options", options):
        try:
            return attention(launch, case, backward)
        except InterpreterError as error:
            if "overflow" not in str(error):
                raise
            return {"overflow": float("inf")}


def decoding(launch: ModuleType, spec: dict[str, Any]) -> dict[str, float]:
    """Error of the decode kernel over a shuffled paged cache, and over a plain one."""
    lengths = torch.tensor(spec["lengths"], dtype=torch.int32)
    batch, heads, kv_heads, width = len(lengths), spec["heads"], spec["kv_heads"], spec["width"]
    rows, page, block = spec["rows"], spec["page"], spec["block_size"]
    dtype = DTYPES[spec["dtype"]]
    generator = torch.Generator().manual_seed(page)
    count = -(-int(lengths.max()) // page)
    q = torch.randn(batch, heads, rows, width, generator=generator).to(dtype)
    k, v = (
        torch.randn(batch, kv_heads, count * page, width, generator=generator).to(dtype)
        for _ in range(2)
    )
    key = torch.arange(count * page)
    for x in (k, v):  # beyond a row's length the cache holds old values
        x.masked_fill_((key >= lengths[:, None])[:, None, :, None], float("nan"))
    order = torch.randperm(batch * count, generator=generator)
    pages = torch.empty(batch * count, dtype=torch.int32)
    pages[:] = order.int()
    pools = []
    for x in (k, v):
        pool = torch.empty(batch * count, kv_heads, page, width, dtype=dtype)
        pool[order] = x.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
        pools.append(pool)
    position = lengths[:, None] - rows + torch.arange(rows, dtype=torch.int32)
    hi = ((position // block + 1) * block).minimum(lengths[:, None])
    lo = torch.zeros_like(hi)
    allowed = key < hi[..., None]
    scale = width**-0.5
    wanted = reference(q, k.nan_to_num(), v.nan_to_num(), torch.zeros_like(q), allowed)[0]
    paged = launch.run_decode(q, *pools, pages.view(batch, count), lo, hi, scale, spec["chunks"])
    plain = launch.run_decode(q, k, v, None, lo, hi, scale, spec["chunks"])
    return {"paged": error(paged, wanted), "plain": error(plain, wanted)}


def answer(job: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """The errors of one job."""
    launch = load(job["mutation"], folder)
    cases = [
        Case(**{**case, "documents": tuple(map(tuple, case["documents"]))}) for case in job["cases"]
    ]
    errors = []
    for case in cases:
        with mock.patch.object(launch, "empty_rows", poisoned_afar if case.far else poisoned):
            errors.append((checked if case.far else attention)(launch, case, job["backward"]))
    with mock.patch.object(launch, "empty_rows", poisoned):
        errors += [decoding(launch, spec) for spec in job["decode"]]
    if job["order"]:
        common = importlib.import_module(launch.__name__.replace("launch", "common"))
        errors.append({"order": order.flaw(common)})
    return errors


def main() -> None:
    """Answer standard input."""
    torch.set_num_threads(1)
    patch_interpreter()
    asked = json.load(sys.stdin)
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for name, jobs in asked.items():
            if name in CHECKS:
                answers[name] = CHECKS[name]()
            else:
                answers[name] = [answer(job, Path(folder)) for job in jobs]
    Path(sys.argv[1]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
