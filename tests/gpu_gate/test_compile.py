"""The kernels compiled for GPUs that are not there: no spills, tensor cores, shared memory."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from offline import (
    FUNCTIONS,
    PLAIN,
    SHARED_LIMIT,
    Compiled,
    compile_function,
    compile_kernel,
)

from bd3lm.model.attention.cuda.tuning import Kernel

ARCHS = ("sm_80", "sm_89", "sm_90")


def check(kernel: Kernel, arch: str, width: int, compiled: Compiled) -> None:
    """What every chosen launch has to be."""
    assert compiled.spills == 0
    assert compiled.shared <= SHARED_LIMIT[arch]
    # A warp group's instruction takes 64 rows. A decoding tile has 16, and dK and dV of a wide
    # head leave no registers for more than 32.
    small = kernel == "decode" or (kernel == "keys" and width == 256)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kernel", "width", "dtype"),
    [
        *itertools.product((*ARCHS, "sm_120"), FUNCTIONS, (32, 96, 128, 256), ("bf16",)),
        *itertools.product(ARCHS, FUNCTIONS, (64, 128), ("fp16",)),
        ("sm_89", "forward", 64, "bf16"),
        ("sm_89", "queries", 64, "bf16"),
        ("sm_89", "decode", 64, "bf16"),
        *itertools.product(("sm_120",), FUNCTIONS, (64,), ("bf16",)),
    ],
)
def test_all_widths(kernel: Kernel, arch: str, width: int, dtype: str) -> None:
    check(kernel, arch, width, compile_kernel(kernel, arch, width, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kernel", "width"), list(itertools.product(ARCHS, FUNCTIONS, (64, 128, 256)))
)
def test_float32_fits(kernel: Kernel, arch: str, width: int) -> None:
    assert compile_kernel(kernel, arch, width, "fp32").shared <= SHARED_LIMIT[arch]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "width"), list(itertools.product(ARCHS, (64, 256))))
def test_decoding_from_a_plain_cache(arch: str, width: int) -> None:
    check("decode", arch, width, compile_kernel("decode", arch, width, page=0))


@pytest.mark.parametrize(("name", "width"), list(itertools.product(PLAIN, (64, 256))))
def test_kernels_without_products(name: str, width: int) -> None:
    function, launch = PLAIN[name]
    assert compile_function(function, "sm_80", width, "bf16", launch).spills == 0
