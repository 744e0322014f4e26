"""Exact categorical draws on an NVIDIA GPU: one Triton kernel, one program a row (docs/math.md §8).

Penalty, temperature, top-k, nucleus and the inverse of the cumulative distribution in one launch,
without a sort: where the most probable tokens end is found by bisection on the bits of their
masses, which order as the masses do. Tokens of equal mass count in the order of their ids, as in
the Rust kernel. Sums are float64.
"""

# Triton's language is not typed, and may not be installed.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803  (Triton gives arguments their types; capitals are pointers)
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from bd3lm.config import SampleConfig
from bd3lm.model.attention.triton.launch import INTERPRETED, on_device_of_first

BLOCK, WARPS = (32, 4) if INTERPRETED else (4096, 16)
"""Tokens that a program holds at once."""
ROWS = 512 if INTERPRETED else 1
"""Rows of a program; the interpreter takes as long for many as for one."""
SIZES = ("rows", "vocab", "top_k", "count", "stride_logits", "stride_seen")


@triton.jit
def cut(mass_rows, padded, most, goal, lane):
    """Tokens in falling order of mass, up to ``most`` and while those before weigh below ``goal``.

    Args:
        mass_rows: pointers to the rows of masses [T, 1], each of ``padded`` numbers up to 1.
        padded: a multiple of the block.
        most: tokens to keep at most.
        goal: float64 [T].
        lane: columns of a block [1, BLOCK].

    Returns:
        Bits of the least mass kept [T], how many of exactly that mass are, and the float64 mass of
        all that is kept.
    """
    low = (goal * 0.0).to(tl.int32)  # enough is kept from here on, or all there is
    high = low + 0x3F800001  # just above the bits of 1
    above = low
    weight = goal * 0.0
    for _ in range(0, 31):
        # The last iteration finds low + 1 = high, and sums the masses above the cut.
        middle = tl.where(high - low > 1, low + (high - low) // 2, high)
        above = low * 0
        weight = goal * 0.0
        for start in range(0, padded, lane.shape[1]):
            m = tl.load(mass_rows + start + lane)
            kept = m.to(tl.int32, bitcast=True) >= middle[:, None]
            above += tl.sum(kept.to(tl.int32), 1)
            weight += tl.sum(tl.where(kept, m, 0.0).to(tl.float64), 1)
        enough = (above >= most) | (weight >= goal)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    equal = low * 0
    for start in range(0, padded, lane.shape[1]):
        m = tl.load(mass_rows + start + lane)
        # A mass of zero is no token: it is never kept.
        same = (m.to(tl.int32, bitcast=True) == low[:, None]) & (m > 0.0)
        equal += tl.sum(same.to(tl.int32), 1)
    each = low.to(tl.float32, bitcast=True).to(tl.float64)
    wanted = tl.ceil((goal - weight) / tl.where(each > 0.0, each, 1.0))
    limit = tl.minimum(equal, most - above).to(tl.float64)
    wanted = tl.maximum(tl.minimum(wanted, limit), 0.0)
    return low, wanted.to(tl.int32), weight + wanted * each


@triton.jit(do_not_specialize=SIZES)
def draw_kernel(
    LOGITS, SEEN, FORBIDDEN, UNIFORM, SHARE, MASS, TOKEN, LOG_P,
    rows, vocab, padded, top_k, inv_temperature, penalty, count, stride_logits, stride_seen,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, PENALTY: tl.constexpr,
):  # fmt: skip
    """Tokens of some rows and their log-probabilities under the logits as they are.

    LOGITS [R, V]; SEEN bytes [R, V] with ``PENALTY``; FORBIDDEN int32 [``count``]; UNIFORM float64
    [R]; SHARE float64 [1] is top_p, which as an argument would be rounded to float32; MASS float32
    [R, ``padded``] is scratch of whole blocks; TOKEN int64 [R]; LOG_P float64 [R]. The largest
    shaped logit has mass 1, so that no mass exceeds it.
    """
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < rows
    row = tl.minimum(index, rows - 1).to(tl.int64)  # rows past the end repeat the last one
    own_rows = LOGITS + row[:, None] * stride_logits
    seen_rows = SEEN + row[:, None] * stride_seen
    mass_rows = MASS + row[:, None] * padded
    lane = tl.arange(0, BLOCK)[None, :]
    nowhere: tl.constexpr = 0x7FFFFFFF  # type: ignore[reportAssignmentType]

    peak = tl.full([ROWS], float("-inf"), tl.float32)  # of the model's own logits
    top = tl.full([ROWS], float("-inf"), tl.float32)  # of the logits to draw from
    token = tl.zeros([ROWS], tl.int32)
    for start in range(0, vocab, BLOCK):
        col = start + lane
        x = tl.load(own_rows + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.max(x, 1))
        if PENALTY:
            seen = tl.load(seen_rows + col, mask=col < vocab, other=0) != 0
            x = tl.where(seen, tl.where(x > 0, x / penalty, x * penalty), x)
        for i in range(0, count):
            x = tl.where(col == tl.load(FORBIDDEN + i), float("-inf"), x)
        best = tl.max(x, 1)
        at = tl.min(tl.where(x == best[:, None], col, nowhere), 1)
        token = tl.where(best > top, at, token)
        top = tl.maximum(top, best)

    whole = tl.zeros([ROWS], tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    for start in range(0, vocab, BLOCK):
        col = start + lane
        x = tl.load(own_rows + col, mask=col < vocab, other=float("-inf")).to(tl.float32)
        whole += tl.sum(tl.exp(x - peak[:, None]).to(tl.float64), 1)
        if not GREEDY:
            if PENALTY:
                seen = tl.load(seen_rows + col, mask=col < vocab, other=0) != 0
                x = tl.where(seen, tl.where(x > 0, x / penalty, x * penalty), x)
            for i in range(0, count):
                x = tl.where(col == tl.load(FORBIDDEN + i), float("-inf"), x)
            m = tl.exp((x - top[:, None]) * inv_temperature)
            total += tl.sum(m.to(tl.float64), 1)
            tl.store(mass_rows + col, m)
    log_z = peak.to(tl.float64) + tl.log(whole)

    if not GREEDY:
        tl.debug_barrier()  # masses are read by other threads than wrote them
        low = tl.zeros([ROWS], tl.int32)
        equal = tl.full([ROWS], nowhere, tl.int32)
        if TOP_K:
            low, equal, total = cut(mass_rows, padded, top_k, total * 4.0, lane)
        if TOP_P:
            low, equal, total = cut(mass_rows, padded, top_k, tl.load(SHARE) * total, lane)
        # The first token whose cumulative mass exceeds the uniform number's share of the kept mass.
        goal = tl.load(UNIFORM + row) * total
        before = tl.zeros([ROWS], tl.float64)
        ties = tl.zeros([ROWS], tl.int32)
        found = tl.full([ROWS], nowhere, tl.int32)
        last = tl.zeros([ROWS], tl.int32)
        for start in range(0, padded, BLOCK):
            col = start + lane
            m = tl.load(mass_rows + col)
            bits = m.to(tl.int32, bitcast=True)
            tie = (bits == low[:, None]).to(tl.int32)
            rank = ties[:, None] + tl.cumsum(tie, 1) - tie
            kept = (bits > low[:, None]) | ((tie != 0) & (rank < equal[:, None]))
            kept = kept & (m > 0.0)
            kept_mass = tl.where(kept, m, 0.0).to(tl.float64)
            upto = before[:, None] + tl.cumsum(kept_mass, 1)
            hit = kept & (upto > goal[:, None])
            found = tl.minimum(found, tl.min(tl.where(hit, col, nowhere), 1))
            last = tl.maximum(last, tl.max(tl.where(kept, col, 0), 1))
            before += tl.sum(kept_mass, 1)
            ties += tl.sum(tie, 1)
        # Rounding can make the goal equal the total: then the last token with mass.
        token = tl.where(found == nowhere, last, found)
    tl.store(TOKEN + row, token.to(tl.int64), mask=inside)
    drawn = tl.load(LOGITS + row * stride_logits + token).to(tl.float64)
    tl.store(LOG_P + row, drawn - log_z, mask=inside)


@lru_cache(maxsize=16)
def settings_on(
    device: torch.device, forbidden: tuple[int, ...], top_p: float
) -> tuple[Tensor, Tensor]:
    """Forbidden ids, int32, and top_p, float64 [1], on the device: copied once a setting."""
    ids = torch.tensor(forbidden, dtype=torch.int32, device=device)
    return ids, torch.tensor([top_p], dtype=torch.float64, device=device)


@on_device_of_first
def run_draw(
    logits: Tensor, uniform: Tensor, cfg: SampleConfig, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draw tokens, int64 [R], and give their log-probabilities under the logits, float64 [R].

    Args:
        logits: [R, V], rows contiguous.
        uniform: float64 [R], in [0, 1).
        cfg: temperature, top_p, top_k, forbidden and repetition_penalty.
        seen: bool [R, V], tokens that the penalty discourages; None: none.
    """
    rows, vocab = logits.shape
    padded = triton.cdiv(vocab, BLOCK) * BLOCK
    forbidden, share = settings_on(logits.device, cfg.forbidden, cfg.top_p)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_p = torch.empty(rows, dtype=torch.float64, device=logits.device)
    greedy, penalised = cfg.temperature == 0, seen is not None
    mass = logits.new_empty(1 if greedy else rows, padded, dtype=torch.float32)
    marks = mass if seen is None else seen.view(torch.uint8)
    if rows:
        draw_kernel[(triton.cdiv(rows, ROWS),)](
            logits, marks, forbidden, uniform, share, mass, token, log_p,
            rows, vocab, padded, min(cfg.top_k or vocab, vocab),
            1.0 if greedy else 1.0 / cfg.temperature, float(cfg.repetition_penalty),
            len(forbidden), logits.stride(0), marks.stride(0),
            ROWS=ROWS, BLOCK=BLOCK, GREEDY=greedy, TOP_K=cfg.top_k is not None, TOP_P=cfg.top_p < 1,
            PENALTY=penalised, num_warps=WARPS,
        )  # fmt: skip
    return token, log_p
