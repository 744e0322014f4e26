"""The kernels compiled for GPUs that are not there: no spills, tensor cores, shared memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton
from offline import (
    ARCHS,
    FUNCTIONS,
    PLAIN,
    SHARED_LIMIT,
    TABLE,
    WIDTHS,
    Compiled,
    compile_function,
    compile_kernel,
    compile_with,
)

from bd3lm.model.attention.triton.tuning import Kernel, Tiles

TABLES = [arch for arch in ARCHS if arch not in TABLE]


OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
# The shipped tiles leave dK and dV one to a few registers; older Tritons need those. Tiles that
# spill nowhere with them give up prefetching, which costs more than these instructions.
SPILLS_ALLOWED = 16 if OLD_TRITON else 0


def check(kernel: Kernel, arch: str, width: int, compiled: Compiled) -> None:
    """Assert the limits of every chosen launch."""
    assert compiled.spills <= (SPILLS_ALLOWED if kernel == "keys" else 0)
    assert compiled.shared <= SHARED_LIMIT[arch]
    # A warp group's instruction takes 64 rows. A decoding tile has 16, and dK and dV of a wide
    # head leave no registers for more than 32.
    small = kernel == "decode" or (kernel == "keys" and width > 128)
    family = "HGMMA" if arch == "sm_90" and not small else "HMMA"
    assert compiled.tensor_core[family] > 0
    assert compiled.async_copies > 0


@pytest.mark.parametrize(
    ("arch", "kernel"),
    [
        *itertools.product(("sm_80", "sm_90"), FUNCTIONS),
        ("sm_89", "keys"),
    ],
)
def test_width_64(kernel: Kernel, arch: str) -> None:
    check(kernel, arch, 64, compile_kernel(kernel, arch, 64))


def test_no_kernel_spills_on_hopper_with_any_triton() -> None:
    """The table's width of 64 is that of the presets, and sm_90 the part it is tuned for first."""
    assert compile_kernel("keys", "sm_90", 64).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kernel", "width", "dtype"),
    [
        *itertools.product(ARCHS, FUNCTIONS, WIDTHS, ("bf16",)),
        *itertools.product(TABLES, FUNCTIONS, (64, 128), ("fp16",)),
    ],
)
def test_all_widths(kernel: Kernel, arch: str, width: int, dtype: str) -> None:
    check(kernel, arch, width, compile_kernel(kernel, arch, width, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kernel", "width"), list(itertools.product(TABLES, FUNCTIONS, (64, 128, 256)))
)
def test_float32_fits(kernel: Kernel, arch: str, width: int) -> None:
    assert compile_kernel(kernel, arch, width, "fp32").shared <= SHARED_LIMIT[arch]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "width"), list(itertools.product(TABLES, (64, 256))))
def test_decoding_from_a_plain_cache(arch: str, width: int) -> None:
    check("decode", arch, width, compile_kernel("decode", arch, width, page=0))


def test_what_is_compiled_here_is_what_runs_there() -> None:
    """Triton compiles anew for an integer of 1 or a multiple of 16, if not forbidden."""
    kernels = [*FUNCTIONS.values(), *(function for function, _ in PLAIN.values())]
    for function in kernels:
        for parameter in function.params:
            number = not parameter.is_constexpr and not parameter.name.isupper()
            if number and parameter.name not in ("scale", "inv_sqrt"):
                of_rows = parameter.name.startswith("stride_") and parameter.name != "stride_rb"
                assert parameter.do_not_specialize != of_rows, parameter.name


@pytest.mark.parametrize(("name", "width"), list(itertools.product(PLAIN, (64, 256))))
def test_kernels_without_products(name: str, width: int) -> None:
    function, launch = PLAIN[name]
    assert compile_function(function, "sm_80", width, "bf16", launch).spills == 0


DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"GREEDY": True, "TOP_K": False, "TOP_P": False, "PENALTY": False},
    "whole": {"GREEDY": False, "TOP_K": False, "TOP_P": False, "PENALTY": False},
    "all at once": {"GREEDY": False, "TOP_K": True, "TOP_P": True, "PENALTY": True},
}


@pytest.mark.parametrize("gradient", [False, True])
def test_cross_entropy_reads_wide_and_spills_nothing(gradient: bool) -> None:
    from bd3lm.model.cross_entropy_triton import BLOCK, WARPS, cross_entropy_kernel

    constants = {"BLOCK": BLOCK, "GRADIENT": gradient, "INTERPRET": False}
    launch = Tiles(0, 0, WARPS, 3)
    for arch in ("sm_80", "sm_90"):
        compiled = compile_with(cross_entropy_kernel, arch, "bf16", constants, launch)
        assert compiled.spills == 0
        assert compiled.wide_loads > 0


@pytest.mark.parametrize("way", DRAWS)
def test_draws_keep_to_registers_but_for_a_few_numbers(way: str) -> None:
    from bd3lm.sample.draw_triton import BLOCK, WARPS, draw_kernel

    constants = {"ROWS": 1, "BLOCK": BLOCK, **DRAWS[way]}
    for arch in ("sm_80", "sm_90"):
        compiled = compile_with(draw_kernel, arch, "bf16", constants, Tiles(0, 0, WARPS, 3))
        assert compiled.spills <= 8  # around the sixteen warps' 64-bit sums, once a row
        assert compiled.shared <= SHARED_LIMIT[arch]
