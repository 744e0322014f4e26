"""The Hopper kernel in the emulator: shapes, schedules, and mutations of its text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import FORWARD_LIMIT, Case, error, reference
from emulator import SCHEDULES, Hazard, Kernel

from bd3lm.model.attention import hopper
from bd3lm.model.attention.hopper import forward, launch
from bd3lm.model.attention.hopper.worklist import worklist
from bd3lm.model.attention.triton.ranges import ranges

LSE_LIMIT = 2e-5
"""Largest difference of a log2-sum-exp, from sums of products in float32."""
DOCUMENTS = ((70, 50), (100, 3, 27))
QUICK = Case("training", 90, 7, 64, "bf16", heads=2)
"""Checked with its gradient, in the ordinary run."""
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
        for documents in [DOCUMENTS, ((5,), ())]
    ),
    Case("clean", 300, 6, 64, "bf16", heads=2, first=138),
    Case("clean", 200, 8, 64, "fp16", causal_end=190),
    Case("training", 150, 8, 64, "bf16", batch=2, causal_end=130, documents=((60, 90), (150,))),
    Case("training", 700, 16, 128, "bf16"),
)


@contextmanager
def emulated(schedule: str, mutation: tuple[str, str] | None = None) -> Iterator[None]:
    """Launch the emulator where the kernel would be."""
    kernel = Kernel(Path(forward.__file__), "forward_kernel", schedule, mutation)
    with mock.patch.object(forward, "forward_kernel", kernel):
        yield


def log2_sum_exp(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Logarithms of the sums of exponentials in float64; +inf where a query sees nothing."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.double() @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~allowed[:, None], -math.inf)
    found = scores.logsumexp(-1) / math.log(2)
    return found.masked_fill(found == -math.inf, math.inf)


def attention(case: Case, schedule: str, mutation: tuple[str, str] | None = None) -> dict[str, Any]:
    """Errors of output and log-sum-exp, or the fault that the emulator found."""
    from interpret import borders_are_nan, poisoned, poisoned_afar

    mask = case.mask()
    q, k, v, dout = case.inputs(mask)
    keys, _ = ranges(mask, "cpu")
    work = worklist(mask, "cpu")
    allowed = mask.dense()
    place = poisoned_afar if case.far else poisoned
    with emulated(schedule, mutation), mock.patch.object(launch, "empty_rows", place):
        try:
            out, lse = launch.run_forward(q, k, v, keys, work, mask.noised, case.width**-0.5)
        except Hazard as fault:
            return {"fault": str(fault)}
    wanted, sums = reference(q, k, v, dout, allowed)[0], log2_sum_exp(q, k, allowed)
    same = lse.double() == sums  # also where both are infinite
    errors = {"out": error(out, wanted), "lse": float((lse - sums).abs()[~same].max().nan_to_num(math.inf)) if not same.all() else 0.0}
    if not case.far and not borders_are_nan(out):
        errors["borders"] = math.inf
    return errors


def is_good(errors: dict[str, Any], dtype: str) -> bool:
    """Return whether no fault was found, and all errors are within their limits."""
    return (
        "fault" not in errors
        and "borders" not in errors
        and errors["out"] <= FORWARD_LIMIT[dtype]
        and errors["lse"] <= LSE_LIMIT
    )


def with_gradient(case: Case, schedule: str) -> dict[str, float]:
    """Errors of the operator and of its gradient, which the Triton kernels compute."""
    mask = case.mask()
    q, k, v, dout = case.inputs(mask)
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    with emulated(schedule):
        out = hopper.hopper_attention(mine[0], mine[1], mine[2], mask)
        gradients = torch.autograd.grad(out, mine, dout)
    wanted = reference(q, k, v, dout, mask.dense())
    found = zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), wanted, strict=True)
    return {name: error(a, b) for name, a, b in found}


class Mutation(NamedTuple):
    """A change of the kernel's text that some schedule of the probe has to notice."""

    what: str
    old: str
    new: str
    probe: Case | None = None


# More rounds of the ring than one; steps that one consumer passes over, before and after its own.
PROBE = Case("clean", 450, 16, 64, "bf16", documents=((250, 200),))
BOTH = Case("training", 130, 7, 64, "bf16", heads=2)
FAR_ROWS = Case("clean", 66, 4, 64, "bf16", far=True)
WAIT_K = "mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)"
WAIT_V = "mbarrier.wait(v_full.index(last), ((t - 1) // STAGES) & 1)"
FREE_K = "mbarrier.arrive(k_free.index(stage), count=1)"
FREE_V = "mbarrier.arrive(v_free.index(last), count=1)"
SCORES = "s = warpgroup_mma_wait(1, deps=(s_next,))"
SUMS = "acc = warpgroup_mma_wait(0, deps=(acc_next,))"
MUTATIONS = (
    Mutation("consumer: keys of the wrong phase", WAIT_K, WAIT_K.replace("& 1", "& 1 ^ 1")),
    Mutation("consumer: keys not waited for", WAIT_K, "pass"),
    Mutation("consumer: values of the wrong phase", WAIT_V, WAIT_V.replace("& 1", "& 1 ^ 1")),
    Mutation("consumer: values not waited for", WAIT_V, "pass"),
    Mutation("consumer: queries not waited for", "mbarrier.wait(q_full.index(g), 0)", "pass"),
    Mutation("consumer: keys freed before they are read", f"{SCORES}\n            {FREE_K}", f"{FREE_K}\n            {SCORES}"),
    Mutation("consumer: values freed before they are read", f"{SUMS}\n            {FREE_V}", f"{FREE_V}\n            {SUMS}"),
    Mutation("consumer: keys never freed", f"{SCORES}\n            {FREE_K}", SCORES),
    Mutation("consumer: values never freed", f"{SUMS}\n            {FREE_V}", SUMS),
    Mutation("consumer: values of the next buffer", "last = (t - 1) % STAGES", "last = t % STAGES"),
    Mutation("consumer: scores read too early", SCORES, SCORES.replace("wait(1", "wait(2")),
    Mutation("consumer: sums read too early", SUMS, SUMS.replace("wait(0", "wait(1")),
    Mutation("consumer: passes over without waiting", "    mbarrier.wait(k_full.index(stage), phase)\n", ""),
    Mutation("consumer: frees twice", FREE_K, FREE_K.replace("count=1", "count=2")),
    Mutation("consumer: leaves the last steps", "for t in range(end, steps)", "for t in range(steps, steps)"),
    Mutation("consumer: leaves the first steps", "for t in range(0, begin)", "for t in range(0, 0)"),
    Mutation("loader: keys overwritten", "mbarrier.wait(k_free.index(stage), phase ^ 1)", "pass"),
    Mutation("loader: values overwritten", "mbarrier.wait(v_free.index(stage), phase ^ 1)", "pass"),
    Mutation("loader: free of the wrong phase", "mbarrier.wait(k_free.index(stage), phase ^ 1)", "mbarrier.wait(k_free.index(stage), phase)"),
    Mutation("loader: half of the bytes expected", "BN * D * 2)", "BN * D)"),
    Mutation("loader: keys and values exchanged", "load(k_desc, [batch, kv_head, stream, row, 0]", "load(v_desc, [batch, kv_head, stream, row, 0]"),
    Mutation("loader: keys of the wrong stream", "gl.where(noised, 0, clean_stream)", "0", BOTH),
    Mutation("loader: keys of the wrong head", "head // group", "head", Case("denoise", 66, 4, 64, "bf16", heads=2)),
    Mutation("loader: one step too few", "for t in range(0, steps)", "for t in range(0, steps - 1)"),
    Mutation("barriers: one arrival frees", "init(k_free.index(j), count=2)", "init(k_free.index(j), count=1)"),
    Mutation("barriers: no fence", "    fence_async_shared()\n", ""),
    Mutation("mask dropped", "if not full:", "if False:"),
    Mutation("upper bound one too far", "< hi[:, None]", "<= hi[:, None]"),
    Mutation("lower bound dropped", "(key[None, :] >= lo[:, None]) & ", ""),
    Mutation("full clean steps one too many", "t < c_full_end", "t <= c_full_end"),
    Mutation("noised steps taken for full", "t < n_full_end", "t < n_full_end + 1", BOTH),
    Mutation("sums not rescaled", "acc * gl.convert_layout(decay, ROW_O)[:, None]", "acc"),
    Mutation("total not rescaled", "total * decay +", "total +"),
    Mutation("lse without the sum", "peak + gl.log2(safe)", "peak"),
    Mutation("rows stored past the stream", "mask=(start + row_o < length)[:, None]", "mask=None", BOTH),
    Mutation("sums stored past the stream", "mask=start + row < length", "mask=start + row < queries", BOTH),
    Mutation("rows addressed in 32 bits", "(stream * length + start).to(gl.int64)", "(stream * length + start)", FAR_ROWS),
    Mutation("order: sections overlap", "first + left % width", "left % width", Case("denoise", 37, 4, 64, "bf16", batch=3)),
)  # fmt: skip


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
        "gradient": with_gradient(QUICK, "late copies"),
        "early": attention(QUICK, "early copies"),
    }


def run_exhaustive() -> dict[str, Any]:
    """Every case under every schedule, then every mutation."""
    probes = {m.probe or PROBE for m in MUTATIONS}
    return {
        "errors": [[attention(case, s) for s in SCHEDULES] for case in EXHAUSTIVE],
        "probes": [attention(case, s) for case in probes for s in SCHEDULES],
        "caught": [caught(m) for m in MUTATIONS],
    }
