"""The Hopper kernels: emulated on a CPU, and compiled for a GPU that is not there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are written in Gluon, a part of Triton")

import emulated as cases
import triton
from hopper_mutations import MUTATIONS, Mutation
from interpreter import too_large
from offline import SHARED_LIMIT, compile_hopper

from bd3lm.model.attention.hopper import TRITONS

DESCRIPTORS = ("q_desc", "k_desc", "v_desc", "own1", "own2", "met1", "met2")


def test_values_and_gradients(emulated: dict[str, Any]) -> None:
    assert set(emulated["operator"]) == {"out", "dq", "dk", "dv"}
    assert not too_large(emulated["operator"], cases.GROUPED.dtype)
    assert all(cases.is_good(errors, cases.QUICK.dtype) for errors in emulated["quick"])


def test_every_size_runs_the_same_code() -> None:
    """Triton compiles anew for an integer of 1 or a multiple of 16, if not forbidden."""
    from bd3lm.model.attention.hopper import backward, forward

    for kernel in (forward.forward_kernel, backward.gradient_kernel):
        for parameter in kernel.params:
            name = parameter.name
            number = not (parameter.is_constexpr or name.isupper())
            if number and name not in DESCRIPTORS:
                # Strides of an output, which are multiples of 16, and floats.
                free = name in ("stride_ob", "stride_oh", "stride_ot", "scale", "inv_sqrt")
                assert parameter.do_not_specialize != free, name


@pytest.mark.slow
@pytest.mark.parametrize(("index", "case"), list(enumerate(cases.EXHAUSTIVE)), ids=str)
def test_every_shape_under_every_schedule(
    emulated_exhaustive: dict[str, Any], index: int, case: cases.Case
) -> None:
    for schedule, errors in zip(cases.SCHEDULES, emulated_exhaustive["errors"][index], strict=True):
        assert cases.is_good(errors, case.dtype), f"{schedule}: {errors}"


@pytest.mark.slow
def test_probes_pass_unchanged(emulated_exhaustive: dict[str, Any]) -> None:
    for errors in emulated_exhaustive["probes"]:
        assert cases.is_good(errors, "bf16"), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "mutation"), list(enumerate(MUTATIONS)), ids=[m.what for m in MUTATIONS]
)
def test_every_mutation_is_caught(
    emulated_exhaustive: dict[str, Any], index: int, mutation: Mutation
) -> None:
    assert emulated_exhaustive["caught"][index], mutation.what


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ not in TRITONS, reason="its Gluon has other names")
@pytest.mark.parametrize(
    ("kernel", "width", "dtype"),
    list(itertools.product(("forward", "keys", "queries"), (64, 128), ("bf16", "fp16"))),
)
def test_the_launch_compiles_without_spills(kernel: str, width: int, dtype: str) -> None:
    compiled = compile_hopper(kernel, width, dtype)
    assert compiled.spills == 0
    assert compiled.shared <= SHARED_LIMIT["sm_90"]
    assert compiled.tensor_core["HGMMA"] > 0
    assert compiled.tensor_core["HMMA"] == 0
    # A copy is at most 128 bytes wide: of the owned tiles and of both rings.
    tiles = 4 if kernel == "forward" else 6
    assert compiled.tma_loads == tiles * width * 2 // 128
    assert compiled.registers * 3 * 128 <= 65536
    # ptxas waits for each product at once where it cannot prove that nobody touches its registers.
    assert compiled.overlaps == (4 if kernel == "keys" else 2)
