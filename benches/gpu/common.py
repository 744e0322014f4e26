"""Shared parts of the sections of the first run: results by line, timing, the rehearsal."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("OUT", "first_run_out"))
WORK = Path(os.environ.get("FIRST_RUN_WORK") or tempfile.mkdtemp(prefix="first_run"))
REHEARSE = os.environ.get("FIRST_RUN_REHEARSE") == "1"
"""Run on a CPU in Triton's interpreter over tiny shapes: shows that the code paths work."""
DEVICE = "cpu" if REHEARSE else "cuda"


def record(section: str, **values: Any) -> None:
    """Append one line to the results at once."""
    line = json.dumps({"section": section, "t": round(time.time(), 2), **values}, default=str)
    with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line[:2000], flush=True)


def attempt(section: str, what: str, run: Callable[[], Any], **also: Any) -> Any:
    """Call ``run`` and record its result or its failure; the section continues either way."""
    begun = time.perf_counter()
    try:
        found = run()
    except Exception as error:  # any exception is a finding
        record(section, what=what, ok=False, error=f"{type(error).__name__}: {error}"[:600],
               trace=traceback.format_exc()[-1500:], **also)  # fmt: skip
        return None
    extra = found if isinstance(found, dict) else {}
    seconds = round(time.perf_counter() - begun, 2)
    record(section, **{"what": what, "ok": True, "seconds": seconds, **also, **extra})
    return found if found is not None else True


def prepare_process() -> None:
    """Import what sections need; in a rehearsal let a CPU take the branches of a GPU."""
    import torch

    if REHEARSE:
        import sys

        sys.path.insert(0, str(ROOT / "tests" / "gpu_gate"))
        from compat import patch_interpreter

        patch_interpreter()
        torch.set_num_threads(1)
    from bd3lm.model.attention.triton import launch  # noqa: F401
    from bd3lm.training import Trainer  # noqa: F401

    if REHEARSE:
        pretend_gpu()


def pretend_gpu() -> None:
    """Let a CPU take every branch that a GPU takes, except streams, events and graphs."""
    import bd3lm.model.attention as attention
    from bd3lm.model import cross_entropy_triton, fused, head, inference, layers, transformer
    from bd3lm.model.cross_entropy import triton_cross_entropy_
    from bd3lm.sample import block
    from bd3lm.sample.draw_triton import run_draw
    from bd3lm.training import cuda_graph

    # The interpreter takes as long for a large block as for a small one.
    cross_entropy_triton.BLOCK = 4096
    fused.on_cpu = layers.on_cpu = lambda *tensors: False
    head.cross_entropy_ = triton_cross_entropy_
    block.draw = run_draw
    # Nothing records here: a step runs over the buffers of a recorded one.
    cuda_graph.obstacle, cuda_graph.CudaRecorder = lambda trainer: None, lambda: None
    transformer.wants_last_clean = lambda device: True
    inference._pack = lambda *a: None
    inference.PackedBlock = lambda block: block
    triton = attention.BACKENDS["triton"]
    attention.BACKENDS["triton"] = triton._replace(available=lambda: True, supports=lambda *_: True)
    attention.AUTO["cpu"] = ("triton", "dense")


def sync() -> None:
    """Wait for the device."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], repeats: int = 15, warm: int = 3) -> float:
    """Median time, by CUDA events where there are any, the L2 cache cleared before each."""
    import torch

    if DEVICE != "cuda":
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e3
    flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


def live_pairs(mask: Any) -> int:
    """Query-key pairs that attend, of one head of one row."""
    clean_lo, clean_hi, noised_lo, noised_hi = (bound.long() for bound in mask.intervals())
    return int((clean_hi - clean_lo + noised_hi - noised_lo).sum())


def errors(found: Any, wanted: Any) -> dict[str, float]:
    """Largest difference over largest value, and relative norm; infinite for NaN."""
    if not found.isfinite().all():
        return {"max": math.inf, "norm": math.inf, "nan": int((~found.isfinite()).sum())}
    difference = found.double() - wanted
    return {
        "max": (difference.abs().max() / wanted.abs().max().clamp(min=0.1)).item(),
        "norm": (difference.norm() / wanted.norm().clamp(min=1e-9)).item(),
    }


def compiled_stats(*functions: Any) -> list[dict[str, Any]]:
    """Registers, spills and shared memory of kernels as loaded; by default all Triton ones."""
    from bd3lm.model.attention.triton import backward, decode, forward

    found = []
    for function in functions or (
        forward.forward_kernel, backward.delta_kernel, backward.key_kernel,
        backward.query_kernel, decode.decode_kernel, decode.combine_kernel,
    ):  # fmt: skip
        for entry in getattr(function, "device_caches", {}).values():
            for kernel in entry[0].values():
                found.append({
                    "kernel": kernel.name, "regs": getattr(kernel, "n_regs", None),
                    "spills": getattr(kernel, "n_spills", None), "shared": kernel.metadata.shared,
                    "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages,
                })  # fmt: skip
    return found
