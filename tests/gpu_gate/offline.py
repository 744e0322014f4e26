"""Compile the kernels for GPUs that are not there, and read registers, spills and instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from cases import DTYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.triton import backward, decode, forward
from bd3lm.model.attention.triton.ranges import ranges
from bd3lm.model.attention.triton.tuning import Kernel, Tiles, tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of one block, from the CUDA programming guide's table of compute capabilities.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_120": 99 * 1024}
# sm_120 has no table of its own: it takes that of sm_89, which has the same limits.
TABLE = {"sm_120": "sm_89"}
FUNCTIONS = {
    "forward": forward.forward_kernel,
    "keys": backward.key_kernel,
    "queries": backward.query_kernel,
    "decode": decode.decode_kernel,
}
# Those that multiply no matrices are launched the same everywhere (launch.py).
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_120")
# Heads of other widths are padded to the next multiple of 16 before they come here.
WIDTHS = (32, 48, 64, 80, 96, 112, 128, 192, 256)
PLAIN = {
    "delta": (backward.delta_kernel, Tiles(64, 0, 4, 3)),
    "combine": (decode.combine_kernel, Tiles(0, 0, 4, 3)),
}
# Those of other dtypes than the matrices.
POINTERS = {
    **dict.fromkeys(("LSE", "DELTA", "PART", "PART_LSE", "WEIGHT", "NLL", "MASS"), "fp32"),
    **dict.fromkeys(("RANGES", "LO", "HI", "PAGES", "FORBIDDEN"), "i32"),
    **dict.fromkeys(("TARGET", "TOKEN"), "i64"),
    **dict.fromkeys(("UNIFORM", "SHARE", "LOG_P"), "fp64"),
    "SEEN": "u8",
}
FLOATS = {"scale", "inv_sqrt", "inv_temperature", "penalty"}


@dataclass(frozen=True)
class Compiled:
    """Figures of one compiled kernel."""

    tiles: Tiles
    registers: int
    spills: int
    """Instructions that read or write local memory."""
    shared: int
    """Bytes of shared memory a block."""
    tensor_core: dict[str, int]
    """Count of each family of matrix instruction."""
    async_copies: int
    wide_loads: int
    """Loads of 16 bytes a thread from global memory into registers."""
    tma_loads: int
    overlaps: int
    """Waits for warp-group products that leave the last one under way."""


def compile_kernel(
    kernel: Kernel, arch: str, width: int, dtype: str = "bf16", page: int = 64
) -> Compiled:
    """Compile one kernel for ``arch`` with the launch of the shipped table."""
    chosen = tiles(kernel, TABLE.get(arch, arch), width, dtype == "fp32")
    return compile_function(FUNCTIONS[kernel], arch, width, dtype, chosen, page)


def compile_function(
    function: triton.JITFunction, arch: str, width: int, dtype: str, chosen: Tiles, page: int = 0
) -> Compiled:
    """Compile a kernel of attention for ``arch`` with the given launch."""
    padded = max(16, triton.next_power_of_2(width))
    constants = {
        "D": width, "DP": padded, "BM": chosen.block_m, "BN": chosen.block_n,
        "INTERPRET": False, "PAGE": page, "CP": 64,
    }  # fmt: skip
    return compile_with(function, arch, dtype, constants, chosen)


def compile_with(
    function: triton.JITFunction, arch: str, dtype: str, constants: dict[str, Any], chosen: Tiles
) -> Compiled:
    """Compile any kernel for ``arch``; pointers are capitals, floats are :data:`FLOATS`."""
    signature, attributes = {}, {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name.isupper():
            signature[name] = f"*{POINTERS.get(name, dtype)}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if not parameter.do_not_specialize and name not in FLOATS:
            attributes[(index,)] = [["tt.divisibility", 16]]  # as ``launch.laid_out`` sees to
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={
            (function.arg_names.index(n),): value
            for n, value in constants.items()
            if n in function.arg_names
        },
        attrs=attributes,
    )
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    built = triton.compile(source, target=target, options=options)
    return _read(chosen, built.asm["cubin"], built.metadata.shared)


def compile_hopper(kernel: str, width: int, dtype: str = "bf16") -> Compiled:
    """Compile a Hopper kernel as its launch module launches it, up to the driver.

    Args:
        kernel: ``forward``, ``keys`` (dK and dV) or ``queries`` (dQ).
        width: D.
        dtype: of the matrices.
    """
    from bd3lm.model.attention.hopper import backward, forward, launch
    from bd3lm.model.attention.hopper.worklist import ROWS, key_worklist, query_worklist

    mask = BlockMask.training(128, 16)
    q = torch.zeros(1, 2, mask.num_queries, width, dtype=DTYPES[dtype])
    sums = torch.zeros(q.shape[:3])
    keys, queries = ranges(mask, "cpu")
    work = query_worklist(mask, "cpu"), key_worklist(mask, "cpu", width)
    wanted = {"keys": False, "queries": True}.get(kernel)
    built = []

    class Warmup:
        """In the place of a kernel: compiles the wanted one, and launches nothing."""

        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: tuple[int]) -> Any:
            def compile_only(*args: Any, **options: Any) -> None:
                if options.get("OWN_QUERIES") == wanted:
                    built.append(self.function.warmup(*args, grid=grid, **options))

            return compile_only

    # A driver without a device, as far as compiling asks for one.
    absent = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    with (
        mock.patch.object(driver, "_active", absent),
        mock.patch.object(forward, "forward_kernel", Warmup(forward.forward_kernel)),
        mock.patch.object(backward, "gradient_kernel", Warmup(backward.gradient_kernel)),
        mock.patch.object(launch, "section", return_value=2),
        mock.patch.object(launch, "run_delta", return_value=sums),
    ):
        # Without the choice of a device, which there is none of.
        run_forward = launch.run_forward.__wrapped__  # type: ignore[attr-defined]
        run_backward = launch.run_backward.__wrapped__  # type: ignore[attr-defined]
        if kernel == "forward":
            run_forward(q, q, q, keys, work[0], True, 1.0)
        else:
            run_backward(q, q, q, q, q, sums, keys, queries, *work, True, 1.0)
    (found,) = built
    assert found.metadata.global_scratch_size == 0, "Triton would ask for an allocator"
    shape = launch.SHAPES[kernel, width]
    chosen = Tiles(ROWS, shape.met, found.metadata.num_warps, shape.stages)
    return _read(chosen, found.asm["cubin"], found.metadata.shared)


def _read(chosen: Tiles, cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump said no number of registers: {usage!r}")
    return Compiled(
        tiles=chosen,
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=shared,
        tensor_core={name: len(re.findall(rf"\b{name}\b", code)) for name in ("HMMA", "HGMMA")},
        async_copies=len(re.findall(r"\bLDGSTS\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.E\S*\.128\b", code)),
        tma_loads=len(re.findall(r"\bUTMALDG\b", code)),
        overlaps=len(re.findall(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
