"""The Hopper kernels in the emulator: shapes, schedules, and mutations of their text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import BACKWARD_LIMIT, FORWARD_LIMIT, Case, error, reference
from emulator import SCHEDULES, Hazard, Kernel
from hopper_mutations import MUTATIONS, PROBE, Mutation

from bd3lm.model.attention import hopper
from bd3lm.model.attention.hopper import backward, common, forward, launch
from bd3lm.model.attention.hopper.worklist import key_worklist, query_worklist
from bd3lm.model.attention.triton.ranges import ranges

LSE_LIMIT = 2e-5
"""Largest difference of a log2-sum-exp, from sums of products in float32."""
DOCUMENTS = ((70, 50), (100, 3, 27))
QUICK = Case("training", 70, 7, 64, "bf16")
GROUPED = Case(
    "training", 20, 5, 64, "bf16", batch=2, heads=4, kv_heads=2, documents=((9, 6), (20,))
)
EXHAUSTIVE = (
    *(
        Case(form, length, block, width, dtype, heads=heads, kv_heads=kv)
        for form in ("training", "denoise", "clean")
        for length, block, width, dtype, heads, kv in (
            (256, 16, 64, "bf16", 2, 1),
            (129, 4, 128, "fp16", 2, 2),
            (200, 70, 64, "bf16", 2, 2),
            (330, 64, 64, "fp16", 1, 1),
            (450, 1, 64, "bf16", 1, 1),
            (192, 192, 128, "bf16", 2, 1),
            (65, 100, 64, "bf16", 6, 3),
            (1, 1, 64, "fp16", 1, 1),
        )
    ),
    *(
        Case(form, 130, block, 64, "bf16", batch=2, heads=2, documents=documents)
        for form in ("training", "denoise", "clean")
        for block in (1, 13, 130)
        for documents in [DOCUMENTS, ((5,), (1,))]
    ),
    Case("clean", 300, 6, 64, "bf16", heads=2, first=138),
    Case("clean", 200, 8, 64, "fp16", causal_end=190),
    Case("training", 150, 8, 64, "bf16", batch=2, causal_end=130, documents=((60, 90), (150,))),
    Case("training", 700, 16, 128, "bf16"),
)


@contextmanager
def in_emulator(schedule: str, mutation: tuple[str, str] | None = None) -> Iterator[None]:
    """Launch the emulator where the kernels would be."""
    paths = [Path(module.__file__) for module in (common, forward, backward)]
    with (
        mock.patch.object(
            forward, "forward_kernel", Kernel(paths, "forward_kernel", schedule, mutation)
        ),
        mock.patch.object(
            backward, "gradient_kernel", Kernel(paths, "gradient_kernel", schedule, mutation)
        ),
    ):
        yield


def log2_sum_exp(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Logarithms of the sums of exponentials in float64; +inf where a query sees nothing."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.double() @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~allowed[:, None], -math.inf)
    found = scores.logsumexp(-1) / math.log(2)
    return found.masked_fill(found == -math.inf, math.inf)


def attention(case: Case, schedule: str, mutation: tuple[str, str] | None = None) -> dict[str, Any]:
    """Errors of all outputs, or the fault that the emulator found."""
    from interpret import borders_are_nan, poisoned, poisoned_afar

    mask = case.mask()
    q, k, v, dout = case.inputs(mask)
    keys, queries = ranges(mask, "cpu")
    work = query_worklist(mask, "cpu"), key_worklist(mask, "cpu", case.width)
    allowed = mask.dense()
    place = poisoned_afar if case.far else poisoned
    scale = case.width**-0.5
    with in_emulator(schedule, mutation), mock.patch.object(launch, "empty_rows", place):
        try:
            out, lse = launch.run_forward(q, k, v, keys, work[0], mask.noised, scale)
            gradients = launch.run_backward(
                dout, q, k, v, out, lse, keys, queries, *work, mask.noised, scale
            )
        except Hazard as fault:
            return {"fault": str(fault)}
    sums = log2_sum_exp(q, k, allowed)
    wanted = reference(q, k, v, dout, allowed)
    found = dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))
    errors = {n: error(f, w) for (n, f), w in zip(found.items(), wanted, strict=True)}
    # Where both are infinite their difference is not a number.
    apart = (lse.double() - sums).masked_fill(lse.double() == sums, 0.0)
    errors["lse"] = apart.abs().max().nan_to_num(math.inf, posinf=math.inf).item()
    if not case.far and not all(borders_are_nan(x) for x in found.values()):
        errors["borders"] = math.inf
    return errors


def is_good(errors: dict[str, Any], dtype: str) -> bool:
    """Return whether no fault was found, and all errors are within their limits."""
    if "fault" in errors or "borders" in errors:
        return False
    limits = {"out": FORWARD_LIMIT[dtype], "lse": LSE_LIMIT}
    return all(errors[n] <= limits.get(n, BACKWARD_LIMIT[dtype]) for n in errors)


def operator(case: Case, schedule: str) -> dict[str, float]:
    """Errors of the backend as the model calls it, and of its gradient."""
    mask = case.mask()
    q, k, v, dout = case.inputs(mask)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    with in_emulator(schedule), mock.patch.object(hopper, "kernels_take", return_value=True):
        out = hopper.hopper_attention(mine[0], mine[1], mine[2], mask)
        gradients = torch.autograd.grad(out, mine, dout)
    wanted = reference(q, k, v, dout, mask.dense())
    found = zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), wanted, strict=True)
    return {name: error(a, b) for name, a, b in found}


def caught(mutation: Mutation) -> list[str]:
    """What each schedule found wrong."""
    probe = mutation.probe or PROBE
    found = []
    for schedule in SCHEDULES:
        errors = attention(probe, schedule, (mutation.old, mutation.new))
        if not is_good(errors, probe.dtype):
            found.append(errors.get("fault") or f"error {max(errors.values()):.1e}")
    return found


def run() -> dict[str, Any]:
    """The part of the ordinary run."""
    return {
        "operator": operator(GROUPED, "random"),
        "quick": [attention(QUICK, schedule) for schedule in ("early copies", "late copies")],
    }


def run_exhaustive() -> dict[str, Any]:
    """Every case under every schedule, then every mutation."""
    probes = {m.probe or PROBE for m in MUTATIONS}
    return {
        "errors": [[attention(case, s) for s in SCHEDULES] for case in EXHAUSTIVE],
        "probes": [attention(case, s) for case in probes for s in SCHEDULES],
        "caught": [caught(m) for m in MUTATIONS],
    }
