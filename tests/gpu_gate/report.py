"""Run the gate and write its tables, and the roofline, into docs/gpu.md between their markers.

Usage: ``python tests/gpu_gate/report.py [TABLE ...]`` (minutes), of :data:`TABLES`.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import emulated as hopper
import roofline
from cases import BACKWARD_LIMIT, EXHAUSTIVE, FORWARD_LIMIT, QUICK
from hopper_mutations import MUTATIONS as HOPPER_MUTATIONS
from interpreter import DECODES, Child, job, mutation_jobs, too_large
from mutations import MUTATIONS
from offline import (
    ARCHS,
    FUNCTIONS,
    SHARED_LIMIT,
    WIDTHS,
    Compiled,
    compile_hopper,
    compile_kernel,
)

TABLES = (
    "compiled", "roofline", "numerics", "mutations", "hopper", "emulated", "hopper-mutations",
)  # fmt: skip
DOCUMENT = Path(__file__).parents[2] / "docs" / "gpu.md"


def numerics(answers: dict[str, Any]) -> str:
    """Largest errors by dtype."""
    lines = [
        "| dtype | shapes | forward | limit | dQ | dK | dV | limit | decode |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases = QUICK + EXHAUSTIVE
    errors = answers["quick"][0][: len(QUICK)] + answers["exhaustive"][0]
    decoded = answers["quick"][0][len(QUICK) :]
    for dtype in FORWARD_LIMIT:
        mine = [e for c, e in zip(cases, errors, strict=True) if c.dtype == dtype]
        cells = {name: max(e[name] for e in mine) for name in ("out", "dq", "dk", "dv")}
        decode = [
            max(e.values()) for d, e in zip(DECODES, decoded, strict=True) if d["dtype"] == dtype
        ]
        lines.append(
            f"| {dtype} | {len(mine)} | {cells['out']:.1e} | {FORWARD_LIMIT[dtype]:.1e} "
            f"| {cells['dq']:.1e} | {cells['dk']:.1e} | {cells['dv']:.1e} "
            f"| {BACKWARD_LIMIT[dtype]:.1e} | {max(decode):.1e} |"
        )
    return "\n".join(lines)


def compiled() -> str:
    """Table of each kernel on each part."""
    limits = [f"{arch} ({SHARED_LIMIT[arch] // 1024} KiB)" for arch in ARCHS]
    lines = [
        "| " + " | ".join(["kernel", "D", *limits, "spills"]) + " |",
        "| --- " * (3 + len(ARCHS)) + "|",
    ]
    for kernel, width in itertools.product(FUNCTIONS, WIDTHS):
        found = [compile_kernel(kernel, arch, width) for arch in ARCHS]
        cells = [kernel, str(width), *map(cell, found), str(sum(f.spills for f in found))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(found: Compiled) -> str:
    """Tiles, registers, shared memory and matrix instructions of one kernel on one part."""
    m, n, warps, stages = found.tiles
    products = " and ".join(name for name, count in found.tensor_core.items() if count)
    return f"{m} × {n}, {warps}, {stages}: {found.registers}, {found.shared / 1024:.0f}, {products}"


def mutations(answers: dict[str, Any]) -> str:
    """Errors of the probe under each mutation, against the limits they had to break."""
    lines = ["| mutation | largest error | caught |", "| --- | --- | --- |"]
    for mutation, (errors,) in zip(MUTATIONS, answers["mutated"][1:], strict=True):
        worst = max(errors.values())
        value = "not finite" if worst == float("inf") else f"{worst:.1e}"
        lines.append(
            f"| {mutation.what} | {value} | {'yes' if too_large(errors, 'fp32') else 'NO'} |"
        )
    return "\n".join(lines)


def compiled_hopper() -> str:
    """Table of the Hopper kernels."""
    lines = [
        "| kernel | D | tiles, buffers | KiB | HGMMA | TMA loads | spills |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, width in itertools.product(("forward", "keys", "queries"), (64, 128)):
        found = compile_hopper(kernel, width)
        m, n, _, stages = found.tiles
        lines.append(
            f"| {kernel} | {width} | {m} × {n}, {stages} | {found.shared / 1024:.0f} "
            f"| {found.tensor_core['HGMMA']} | {found.tma_loads} | {found.spills} |"
        )
    return "\n".join(lines)


def errors_emulated(answers: dict[str, Any]) -> str:
    """Largest errors by dtype, over all schedules."""
    lines = [
        "| dtype | shapes | forward | limit | lse | dQ | dK | dV | limit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = answers["emulated_exhaustive"]["errors"]
    for dtype in ("bf16", "fp16"):
        mine = [e for c, e in zip(hopper.EXHAUSTIVE, found, strict=True) if c.dtype == dtype]
        names = ("out", "lse", "dq", "dk", "dv")
        cells = {n: f"{max(e[n] for every in mine for e in every):.1e}" for n in names}
        lines.append(
            f"| {dtype} | {len(mine)} | {cells['out']} | {FORWARD_LIMIT[dtype]:.1e} "
            f"| {cells['lse']} | {cells['dq']} | {cells['dk']} | {cells['dv']} "
            f"| {BACKWARD_LIMIT[dtype]:.1e} |"
        )
    return "\n".join(lines)


def hopper_mutations(answers: dict[str, Any]) -> str:
    """What the emulator says of each mutation, and how many schedules show it."""
    lines = ["| mutation | finding | schedules |", "| --- | --- | --- |"]
    found = answers["emulated_exhaustive"]["caught"]
    for mutation, findings in zip(HOPPER_MUTATIONS, found, strict=True):
        first = findings[0] if findings else "NOT CAUGHT"
        lines.append(f"| {mutation.what} | {first} | {len(findings)} of {len(hopper.SCHEDULES)} |")
    return "\n".join(lines)


def write(name: str, table: str) -> None:
    """Put a table between ``<!-- name -->`` and ``<!-- /name -->``."""
    before, rest = DOCUMENT.read_text().split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->")[1]
    DOCUMENT.write_text(f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}")


def main() -> None:
    """Write the tables that are named, or all."""
    names = sys.argv[1:] or TABLES
    jobs: dict[str, list[dict[str, Any]]] = {}
    if {"numerics", "mutations"} & set(names):
        jobs = {
            "quick": [job(QUICK, DECODES)],
            "mutated": mutation_jobs(),
            "exhaustive": [job(EXHAUSTIVE)],
        }
    if {"emulated", "hopper-mutations"} & set(names):
        jobs["emulated_exhaustive"] = []
    child = Child(jobs) if jobs else None
    here = {"compiled": compiled, "roofline": roofline.table, "hopper": compiled_hopper}
    for name in names:
        if name in here:
            write(name, here[name]())
    if child is None:
        return
    answers = child.finish()
    there = {
        "numerics": numerics,
        "mutations": mutations,
        "emulated": errors_emulated,
        "hopper-mutations": hopper_mutations,
    }
    for name in names:
        if name in there:
            write(name, there[name](answers))


if __name__ == "__main__":
    main()
