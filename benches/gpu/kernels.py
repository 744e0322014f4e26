"""Sections that time attention: our kernels, FlexAttention, SDPA; tile sizes; counters."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checks import masks, one_case, same_bits
from common import (
    DEVICE,
    HERE,
    OUT,
    REHEARSE,
    ROOT,
    attempt,
    compiled_stats,
    live_pairs,
    milliseconds,
    record,
    sync,
)

PEAK = 989e12
"""Dense bf16 of the H100's and H200's data sheet."""


def shapes() -> Iterator[tuple[int, int, int, int, tuple[str, ...]]]:
    """L, S, heads, width and who takes part, most telling first."""
    if REHEARSE:
        yield 32, 4, 1, 16, ("ours", "dense")
        return
    everyone = ("ours", "flex", "fa4", "dense", "causal")
    yield 1024, 16, 12, 64, everyone
    yield 4096, 16, 12, 64, everyone
    yield 16384, 16, 12, 64, ("ours", "flex", "fa4", "causal")
    yield 4096, 16, 8, 128, ("ours", "flex", "fa4", "causal")
    yield 8192, 16, 12, 64, ("ours", "flex")
    yield 1024, 4, 12, 64, ("ours", "flex")
    yield 1024, 64, 12, 64, ("ours", "flex")
    for length, block in itertools.product((4096, 16384), (4, 64)):
        yield length, block, 12, 64, ("ours",)
    yield 8192, 64, 8, 128, ("ours", "flex")


TOKENS = 32768
"""Rows of a batch times L."""


def flex_peer(mask: Any, kernel: str | None = None) -> Callable[..., Any]:
    """Compiled FlexAttention, static shapes, with the mask as arithmetic, as its users write it.

    Args:
        mask: the mask.
        kernel: FLASH for the kernels of FlashAttention-4; None: Triton's.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask as TileMask
    from torch.nn.attention.flex_attention import flex_attention

    from bd3lm.model.attention.flex import TILE, _listed, tile_coverage

    length, block = mask.seq_len, mask.block_size

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
        q_noised, k_noised = q < length, k < length
        q_block, k_block = (q % length) // block, (k % length) // block
        own = (q_block == k_block) & (q_noised == k_noised)
        return own | ((q_block > k_block) & ~k_noised)

    some, every = tile_coverage(mask, mask.intervals(DEVICE))
    tiles = TileMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=TILE, mask_mod=allowed,
        seq_lengths=(2 * length, 2 * length),
    )  # fmt: skip
    torch._dynamo.reset()  # or the second length would make the shapes of all dynamic
    run = torch.compile(flex_attention, dynamic=False)
    options = {} if kernel is None else {"kernel_options": {"BACKEND": kernel}}
    return lambda q, k, v: run(q, k, v, block_mask=tiles, **options)


def contenders(mask: Any) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Inputs of a timed call, made when it is timed."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from bd3lm.model.attention import attend
    from bd3lm.model.attention.hopper import hopper_attention
    from bd3lm.model.attention.triton import triton_attention

    def causal() -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
                             set_priority=True):  # fmt: skip
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    return {
        "ours": lambda: lambda q, k, v: triton_attention(q, k, v, mask),
        "hopper": lambda: lambda q, k, v: hopper_attention(q, k, v, mask),
        "flex": lambda: flex_peer(mask),
        "fa4": lambda: flex_peer(mask, "FLASH"),
        "dense": lambda: lambda q, k, v: attend(q, k, v, mask, backend="dense"),
        "causal": causal,
    }


def measured(
    mask: Any, who: str, heads: int, width: int, once: bool = False, tokens: int = TOKENS
) -> dict[str, Any]:
    """Milliseconds and TFLOP/s of the pairs that attend: 4·D forward, 10·D backward."""
    import torch

    length = mask.seq_len
    batch = 1 if REHEARSE else max(1, tokens // length)
    qkv = [
        torch.randn(batch, heads, 2 * length, width, device=DEVICE).bfloat16().requires_grad_()
        for _ in range(3)
    ]
    dout = torch.randn_like(qkv[0])
    run = contenders(mask)[who]()

    def both() -> None:
        torch.autograd.grad(run(*qkv), qkv, dout)

    if once:
        with torch.no_grad():
            run(*qkv)
        both()
        sync()
        return {}
    pairs = live_pairs(mask) if who != "causal" else 2 * length * (2 * length + 1) // 2
    unit = pairs * batch * heads * width / 1e9
    with torch.no_grad():
        forward = milliseconds(lambda: run(*qkv))
    step = milliseconds(both)
    return {
        "fwd_ms": forward, "both_ms": step, "fwd_tflops": 4 * unit / forward,
        "bwd_tflops": 10 * unit / max(step - forward, 1e-9), "both_tflops": 14 * unit / step,
        "fwd_of_peak": 4 * unit / forward * 1e12 / PEAK, "batch": batch,
    }  # fmt: skip


def attention() -> None:
    """Ours, FlexAttention by Triton and FA4, SDPA over the dense mask, a plain causal kernel."""
    from bd3lm.model.attention import BlockMask, flex

    fa4 = flex.fa4_available()
    record("attention", what="fa4 is here", ok=True, available=fa4)
    # Ours first, over all shapes, so that a slow compiler cannot keep them from being timed.
    for names in (("ours", "causal"), ("flex", "dense"), ("fa4",) if fa4 else ()):
        for length, block, heads, width, who in shapes():
            mask = BlockMask.training(length, block)
            for name in (n for n in who if n in names):
                attempt("attention", name, lambda m=mask, n=name, h=heads, w=width: measured(
                    m, n, h, w), L=length, S=block, D=width, H=heads)  # fmt: skip


HOPPER = [("bf16", 64), ("bf16", 128), ("fp16", 64)]
"""Dtypes and head widths that the section checks."""


def hopper() -> None:
    """The Hopper kernels: numerics of every mask, then their time next to the Triton kernels'."""
    from bd3lm.model.attention import BlockMask, hopper

    if DEVICE == "cuda" and not hopper.available():
        record("hopper", what="skipped", ok=True, reason=f"hopper {hopper.NEEDS}")
        return
    import torch

    if not hopper.kernels_take(torch.bfloat16, 64):
        reason = f"its kernels were compiled with Triton {', '.join(hopper.TRITONS)}"
        record("hopper", what="skipped", ok=True, reason=reason)
        return
    from bd3lm.model.attention.hopper.backward import gradient_kernel
    from bd3lm.model.attention.hopper.forward import forward_kernel

    with emulated_in_rehearsal():
        for dtype, width in HOPPER[: 1 if REHEARSE else None]:
            for name, (mask, batch, heads, kv_heads) in masks(REHEARSE).items():
                if REHEARSE and name not in ("training", "clean documents"):
                    continue
                attempt(
                    "hopper", name,
                    lambda m=mask, b=batch, h=heads, kv=kv_heads, w=width, d=dtype: one_case(
                        m, w, d, batch=b, heads=h, kv_heads=kv, backend="hopper"
                    ),
                    dtype=dtype, width=width,
                )  # fmt: skip
        for length, block, heads, width, who in shapes():
            if "dense" in who or width == 128:
                for name in ("hopper", "ours"):
                    attempt("hopper", name, lambda n=length, s=block, h=heads, w=width, b=name: (
                        measured(BlockMask.training(n, s), b, h, 64 if REHEARSE else w)),
                        L=length, S=block, D=width, H=heads)  # fmt: skip
    if DEVICE == "cuda":
        attempt("hopper", "same bits", lambda: same_bits("hopper"))
        stats = compiled_stats(forward_kernel, gradient_kernel)
        record("hopper", what="compiled", ok=not any(k["spills"] for k in stats), kernels=stats)


def warm_hopper() -> None:
    """Compile the Hopper kernels into the caches, without launching any."""
    from bd3lm.model.attention import hopper

    if REHEARSE or not hopper.available():
        return
    sys.path.insert(0, str(ROOT / "tests" / "gpu_gate"))
    from offline import compile_hopper

    for dtype, width in HOPPER:
        for kernel in ("forward", "keys", "queries"):
            attempt("warm_hopper", kernel, lambda k=kernel, w=width, d=dtype: asdict(
                compile_hopper(k, w, d)), dtype=dtype, width=width)  # fmt: skip


def emulated_in_rehearsal() -> AbstractContextManager[None]:
    """On a CPU, the emulator of the gate in the place of the kernel."""
    if not REHEARSE:
        return nullcontext()
    from emulated import in_emulator

    return in_emulator("random")


def warm_flex() -> None:
    """Fill the compiler's caches, so that the timed section finds them full."""
    from bd3lm.model.attention import BlockMask

    for length, block, heads, width, who in shapes():
        if "flex" in who and not REHEARSE:
            attempt("warm_flex", "flex", lambda n=length, s=block, h=heads, w=width: measured(
                BlockMask.training(n, s), "flex", h, w, once=True), L=length, S=block)  # fmt: skip


CANDIDATES: dict[tuple[str, int], list[tuple[int, int, int, int]]] = {
    ("forward", 64): [
        (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3),
        (64, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 4),
    ],
    ("keys", 64): [
        (64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2),
        (64, 128, 8, 1), (32, 64, 4, 3), (64, 64, 8, 3),
    ],
    ("queries", 64): [
        (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2),
        (128, 64, 8, 3),
    ],
    ("forward", 128): [
        (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2),
        (64, 128, 4, 2),
    ],
    ("keys", 128): [
        (32, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2),
        (64, 128, 8, 1), (32, 64, 4, 2),
    ],
    ("queries", 128): [
        (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2), (128, 64, 8, 1),
    ],
}  # fmt: skip


def candidates() -> list[tuple[str, int, tuple[int, int, int, int]]]:
    """All of them; those of a power of two rows alone, which Triton needs."""
    if REHEARSE:
        return [("forward", 16, (32, 16, 4, 1)), ("keys", 16, (16, 32, 4, 1))]
    return [
        (kernel, width, tiles)
        for (kernel, width), entries in CANDIDATES.items()
        for tiles in entries
        if all(n & (n - 1) == 0 for n in tiles[:2])
    ]


def with_tiles(kernel: str, tiles: tuple[int, int, int, int], run: Callable[[], Any]) -> Any:
    """``run()`` with one kernel launched otherwise."""
    from unittest import mock

    from bd3lm.model.attention.triton import launch
    from bd3lm.model.attention.triton.tuning import Tiles

    shipped = launch.choose

    def choose(name: Any, x: Any) -> Any:
        return Tiles(*tiles) if name == kernel else shipped(name, x)

    with mock.patch.object(launch, "choose", choose):
        return run()


def tile_time(
    kernel: str, width: int, tiles: tuple[int, int, int, int], length: int, once: bool
) -> dict[str, Any]:
    """Milliseconds of one kernel alone, launched with these tiles."""
    import torch

    from bd3lm.model.attention import BlockMask
    from bd3lm.model.attention.triton import launch
    from bd3lm.model.attention.triton.ranges import ranges

    mask = BlockMask.training(length, 16)
    heads = 1 if REHEARSE else 768 // width
    batch = 1 if once or REHEARSE else max(1, TOKENS // length)
    q, k, v, dout = (
        torch.randn(batch, heads, 2 * length, width, device=DEVICE).bfloat16() for _ in range(4)
    )
    keys, queries = ranges(mask, DEVICE)
    scale = width**-0.5

    def forward() -> Any:
        return launch.run_forward(q, k, v, keys, True, scale)

    if kernel == "forward":
        run: Callable[[], Any] = forward
        unit = 4
    else:
        out, lse = forward()
        part = {"keys": "key_kernel", "queries": "query_kernel"}[kernel]
        unit = 8 if kernel == "keys" else 6

        def run() -> Any:
            return only(part, lambda: launch.run_backward(
                dout, q, k, v, out, lse, keys, queries, True, scale))  # fmt: skip

    if once:
        with_tiles(kernel, tiles, run)
        sync()
        return {}
    spent = with_tiles(kernel, tiles, lambda: milliseconds(run, 10, 2))
    rate = unit * live_pairs(mask) * batch * heads * width / spent / 1e9
    return {"ms": spent, "tflops": rate}


def only(part: str, run: Callable[[], Any]) -> Any:
    """``run()`` with the other kernels of the backward pass left out."""
    from unittest import mock

    from bd3lm.model.attention.triton import backward

    class Nothing:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: None

    others = [n for n in ("delta_kernel", "key_kernel", "query_kernel") if n != part]
    with mock.patch.multiple(backward, **dict.fromkeys(others, Nothing())):
        return run()


def warm_tune(shard: int, shards: int) -> None:
    """Compile every candidate; lengths do not specialize, so a short row is enough."""
    for kernel, width, tiles in candidates()[shard::shards]:
        attempt("warm_tune", kernel, lambda k=kernel, w=width, t=tiles: tile_time(
            k, w, t, 32 if REHEARSE else 256, once=True), width=width, tiles=tiles)  # fmt: skip


def tune() -> None:
    """Time every candidate, and name the best."""
    best: dict[tuple[str, int, int], tuple[float, tuple[int, ...]]] = {}
    for length in (32,) if REHEARSE else (4096, 1024):
        for kernel, width, tiles in candidates():
            if length == 1024 and width != 64:
                continue
            found = attempt("tune", kernel, lambda k=kernel, w=width, t=tiles, n=length: tile_time(
                k, w, t, n, once=False), width=width, tiles=tiles, L=length)  # fmt: skip
            if found:
                key = (kernel, width, length)
                best[key] = min(best.get(key, (math.inf, ())), (found["ms"], tiles))
    record("tune", what="best", ok=bool(best), best=[[*k, *v] for k, v in best.items()])
    if DEVICE == "cuda":
        record("tune", what="compiled", ok=True, kernels=compiled_stats())


def ncu() -> None:
    """Hardware counters of our three kernels, one launch each."""
    if REHEARSE:
        return
    program = (
        "import sys; sys.argv=['x'];"
        f"sys.path.insert(0,{str(HERE)!r});"
        "import kernels as f, common; from bd3lm.model.attention import BlockMask;"
        "common.prepare_process(); mask = BlockMask.training(4096, 16);"
        "f.measured(mask, 'ours', 12, 64, once=True, tokens=16384)"
    )
    tool = shutil.which("ncu") or next(
        map(str, Path("/opt/nvidia/nsight-compute").glob("*/ncu")), "ncu"
    )
    command = [
        tool, "--clock-control", "none", "--set", "full", "-k",
        "regex:forward_kernel|key_kernel|query_kernel", "--launch-count", "4",
        sys.executable, "-c", program,
    ]  # fmt: skip
    with (OUT / "ncu.txt").open("w") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    record("ncu", what="counters", ok=code == 0, code=code)
