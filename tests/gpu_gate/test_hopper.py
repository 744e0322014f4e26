"""The Hopper kernel: emulated on a CPU, and compiled for a GPU that is not there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="the kernel is written in Gluon, a part of Triton")

from bd3lm.model.attention.hopper import TRITONS

if triton.__version__ not in TRITONS:
    pytest.skip(f"the kernel does not run with Triton {triton.__version__}", allow_module_level=True)

import hopper
from interpreter import too_large
from offline import SHARED_LIMIT, compile_hopper


def test_values_and_gradients(emulated: dict[str, Any]) -> None:
    assert set(emulated["gradient"]) == {"out", "dq", "dk", "dv"}
    assert not too_large(emulated["gradient"], hopper.QUICK.dtype)
    assert hopper.is_good(emulated["early"], hopper.QUICK.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("index", "case"), list(enumerate(hopper.EXHAUSTIVE)), ids=str)
def test_every_shape_under_every_schedule(
    emulated_exhaustive: dict[str, Any], index: int, case: hopper.Case
) -> None:
    for schedule, errors in zip(
        hopper.SCHEDULES, emulated_exhaustive["errors"][index], strict=True
    ):
        assert hopper.is_good(errors, case.dtype), f"{schedule}: {errors}"


@pytest.mark.slow
def test_probes_pass_unchanged(emulated_exhaustive: dict[str, Any]) -> None:
    for errors in emulated_exhaustive["probes"]:
        assert hopper.is_good(errors, "bf16"), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "mutation"), list(enumerate(hopper.MUTATIONS)), ids=[m.what for m in hopper.MUTATIONS]
)
def test_every_mutation_is_caught(
    emulated_exhaustive: dict[str, Any], index: int, mutation: hopper.Mutation
) -> None:
    assert emulated_exhaustive["caught"][index], mutation.what


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dtype"), list(itertools.product((64, 128), ("bf16", "fp16"))))
def test_the_launch_compiles_without_spills(width: int, dtype: str) -> None:
    compiled = compile_hopper(width, dtype)
    assert compiled.spills == 0
    assert compiled.shared <= SHARED_LIMIT["sm_90"]
    assert compiled.tensor_core["HGMMA"] > 0
    assert compiled.tensor_core["HMMA"] == 0
    # Two tiles of queries, keys and values; a copy is at most 128 bytes wide.
    assert compiled.tma_loads == 4 * width * 2 // 128
    assert compiled.registers * 3 * 128 <= 65536
