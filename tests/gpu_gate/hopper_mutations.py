"""Ways to break the Hopper kernels that the emulator has to notice."""

# ruff: noqa: E501  (the text of the kernels is quoted)
from __future__ import annotations

from typing import NamedTuple

from cases import Case


class Mutation(NamedTuple):
    """A change of the kernels' text that some schedule of the probe has to notice."""

    what: str
    old: str
    new: str
    probe: Case | None = None


# More rounds of the rings than one, and of those that one consumer passes over: before its own steps
# in the last program, after them in the first.
PROBE = Case("clean", 512, 512, 64, "bf16", documents=((64, 384, 64),))
DOCUMENTED = Case("clean", 450, 16, 64, "bf16", documents=((250, 200),))
BOTH = Case("training", 130, 7, 64, "bf16", heads=2)
SHARED = Case("clean", 200, 200, 64, "bf16", heads=2)
FAR_ROWS = Case("clean", 66, 4, 64, "bf16", far=True)
WAIT_K = "mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)"
WAIT_V = "mbarrier.wait(v_full.index(last), ((t - 1) // STAGES) & 1)"
FREE_K = "mbarrier.arrive(k_free.index(stage), count=1)"
FREE_V = "mbarrier.arrive(v_free.index(last), count=1)"
FIRST = "s = warpgroup_mma_wait(0, deps=(s,))"
SCORES = "s = warpgroup_mma_wait(1, deps=(s_next,))"
SUMS = "acc = warpgroup_mma_wait(0, deps=(acc_next,))"
WAIT = "mbarrier.wait(full.index(stage), phase)"
FREE = "mbarrier.arrive(free.index(stage), count=1)"
DQ = "acc1 = warpgroup_mma_wait(0, deps=(acc1_next,))"
BOTH_SUMS = "acc1, acc2 = warpgroup_mma_wait(0, deps=(acc1_next, acc2_next))"
IN, DEEP = "\n            ", "\n                "
MUTATIONS = (
    Mutation("forward: keys of the wrong phase", WAIT_K, WAIT_K.replace("& 1", "& 1 ^ 1")),
    Mutation("forward: keys not waited for", WAIT_K, "pass"),
    Mutation("forward: values of the wrong phase", WAIT_V, WAIT_V.replace("& 1", "& 1 ^ 1")),
    Mutation("forward: values not waited for", WAIT_V, "pass"),
    Mutation("forward: queries not waited for", "mbarrier.wait(q_full.index(g), 0)", "pass"),
    Mutation("forward: keys freed before they are read", f"{FIRST}\n        {FREE_K}", f"{FREE_K}\n        {FIRST}"),
    Mutation("forward: values freed before they are read", f"{SUMS}{IN}{FREE_V}", f"{FREE_V}{IN}{SUMS}"),
    Mutation("forward: keys never freed", f"{SCORES}{IN}{FREE_K}", SCORES),
    Mutation("forward: values never freed", f"{SUMS}{IN}{FREE_V}", SUMS),
    Mutation("forward: values of the next buffer", "last = (t - 1) % STAGES", "last = t % STAGES"),
    Mutation("forward: scores read too early", SCORES, SCORES.replace("wait(1", "wait(2")),
    Mutation("forward: sums read too early", SUMS, SUMS.replace("wait(0", "wait(1")),
    Mutation("forward: frees twice", FREE_K, FREE_K.replace("count=1", "count=2")),
    Mutation("forward: leaves the last steps", "for t in range(end, work[3])", "for t in range(0, 0)"),
    Mutation("forward: leaves the first steps", "for t in range(0, begin):\n        pass_over(t,", "for t in range(0, 0):\n        pass_over(t,"),
    Mutation("passes over without waiting", "    mbarrier.wait(full.index(stage), (n // STAGES) & 1)\n", ""),
    Mutation("loader: keys overwritten", "mbarrier.wait(k_free.index(stage), phase ^ 1)", "pass"),
    Mutation("loader: values overwritten", "mbarrier.wait(v_free.index(stage), phase ^ 1)", "pass"),
    Mutation("loader: free of the wrong phase", "mbarrier.wait(k_free.index(stage), phase ^ 1)", "mbarrier.wait(k_free.index(stage), phase)"),
    Mutation("loader: half of the bytes expected", "BN * D * 2)", "BN * D)"),
    Mutation("loader: keys and values exchanged", "load(k_desc, [batch, kv_head, stream, row, 0]", "load(v_desc, [batch, kv_head, stream, row, 0]"),
    Mutation("loader: keys of the wrong stream", "gl.where(noised, 0, clean_stream)", "0", BOTH),
    Mutation("loader: keys of the wrong head", "                  head // group,", "                  head,", SHARED),
    Mutation("loader: one step too few", "for t in range(0, work[3])", "for t in range(0, work[3] - 1)"),
    Mutation("barriers: one arrival frees", "init(k_free.index(j), count=2)", "init(k_free.index(j), count=1)"),
    Mutation("barriers: no fence", "    fence_async_shared()\n", ""),
    Mutation("forward: sums not rescaled", "acc * gl.convert_layout(decay, ROW_O)[:, None]", "acc"),
    Mutation("forward: total not rescaled", "total * decay +", "total +"),
    Mutation("forward: lse without the sum", "peak + gl.log2(safe)", "peak"),
    Mutation("forward: sums stored past the stream", "mask=start + row < length", "mask=start + row < queries", BOTH),
    Mutation("forward: mask dropped", "if not is_full(t, full)", "if False", DOCUMENTED),
    Mutation("backward: mask dropped", "if not is_full(t, whole)", "if False", DOCUMENTED),
    Mutation("upper bound one too far", "(met[None, :] < hi[:, None])", "(met[None, :] <= hi[:, None])", DOCUMENTED),
    Mutation("lower bound one too far", "(met[None, :] >= lo[:, None])", "(met[None, :] > lo[:, None])", DOCUMENTED),
    Mutation("noised bounds for clean keys", "hi = gl.where(noised, n_hi, c_hi)", "hi = gl.where(noised, c_hi, n_hi)", BOTH),
    Mutation("full clean steps one too many", "(t < clean[1])", "(t <= clean[1])", DOCUMENTED),
    Mutation("full noised steps one too many", "(t < noised[1])", "(t <= noised[1])", BOTH),
    Mutation("rows stored past the stream", "mask=inside[:, None]", "mask=None", BOTH),
    Mutation("rows addressed in 32 bits", "(stream * length + start).to(gl.int64) * stride_t", "(stream * length + start) * stride_t", FAR_ROWS),
    Mutation("order: sections overlap", "first + left % width", "left % width", Case("denoise", 37, 4, 64, "bf16", batch=3)),
    Mutation("backward: tiles of the wrong phase", WAIT, WAIT.replace("phase", "phase ^ 1")),
    Mutation("backward: tiles not waited for", WAIT, "pass"),
    Mutation("backward: half of a step expected", "2 * BN * D * 2)", "BN * D * 2)"),
    Mutation("backward: owned tiles not waited for", "mbarrier.wait(own_full.index(g), 0)", "pass"),
    Mutation("backward: half of the owned tiles waited for", "2 * BM * D * 2)", "BM * D * 2)"),
    Mutation("dQ: keys freed before they are read", DQ, f"{FREE}{DEEP}{DQ}{DEEP}continue"),
    Mutation("dK: queries freed before they are read", BOTH_SUMS, f"{FREE}{DEEP}{BOTH_SUMS}{DEEP}continue"),
    Mutation("backward: tiles never freed", f"            {FREE}\n        for", "        for"),
    Mutation("backward: frees twice", FREE, FREE.replace("count=1", "count=2")),
    Mutation("backward: one arrival frees", "init(free.index(j), count=2)", "init(free.index(j), count=1)"),
    Mutation("dQ: read too early", DQ, DQ.replace("wait(0", "wait(1")),
    Mutation("dK: read too early", BOTH_SUMS, BOTH_SUMS.replace("wait(0", "wait(1")),
    Mutation("backward: scores read too early", "s = warpgroup_mma_wait(1, deps=(s_next,))\n            p =", "s = warpgroup_mma_wait(2, deps=(s_next,))\n            p ="),
    Mutation("dQ: dP read too early", "d = warpgroup_mma_wait(0", "d = warpgroup_mma_wait(1"),
    Mutation("dK: dP read too early", "d = warpgroup_mma_wait(1", "d = warpgroup_mma_wait(2"),
    Mutation("backward: leaves the last steps", "for t in range(end, steps):\n            pass_over(h", "for t in range(steps, steps):\n            pass_over(h"),
    Mutation("backward: leaves the first steps", "for t in range(0, begin):\n            pass_over(h", "for t in range(0, 0):\n            pass_over(h"),
    Mutation("backward: rounds begin anew with each head", "stage = (h * steps + t) % STAGES", "stage = t % STAGES", SHARED),
    Mutation("backward: loader overwrites", "mbarrier.wait(free.index(stage), phase ^ 1)", "pass"),
    Mutation("backward: one head of the group", "met_heads = group", "met_heads = 1", SHARED),
    Mutation("backward: the same head of the group", "head = met_head + h", "head = met_head", SHARED),
    Mutation("backward: sums of the first head", "query = h * met_rows + query", "query = query", SHARED),
    Mutation("backward: sums of the wrong stream", "gl.where(noised, 0, clean_stream) * met_length", "0", BOTH),
    Mutation("backward: delta dropped", "(p * (d - delta))", "(p * d)"),
    Mutation("backward: scale dropped", "acc1 * inv_sqrt", "acc1"),
)  # fmt: skip
