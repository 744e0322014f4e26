"""Ways to break the kernels that the gate has to notice: (what, file, old text, new text)."""

# ruff: noqa: E501  (the text of the kernels is quoted)
from __future__ import annotations

from typing import Any, Literal, NamedTuple

from cases import BATCHED, FAR_ROWS, Case

# Small, yet with full, partial and empty tiles in every kernel, and padded columns.
PROBE = Case("denoise", 70, 5, 24)
GROUPED = Case("denoise", 37, 5, 16, heads=2)
# A whole tile of keys that no noised query sees: only then do all ranges of a tile lie empty.
ONE_BLOCK = Case("denoise", 34, 34, 16)
DOCUMENTS = Case("denoise", 40, 8, 16, documents=((11, 29),))
DECODE: dict[str, Any] = {
    "lengths": [37, 70], "heads": 2, "kv_heads": 1, "width": 24, "rows": 8, "page": 16,
    "block_size": 4, "dtype": "fp32", "chunks": 3,
}  # fmt: skip


class Mutation(NamedTuple):
    """One change of the kernels' text."""

    what: str
    file: str
    old: str
    new: str
    probe: Case | Literal["decode", "order"] = PROBE
    """Probe that it is run on: a case, :data:`DECODE`, or the order of launches."""

    @property
    def backward(self) -> bool:
        """Return whether it can only show in the gradients, which cost most of a probe."""
        return self.file == "backward.py" or self.probe is ONE_BLOCK or "lse" in self.what


MUTATIONS = (
    Mutation(
        "forward: mask dropped",
        "forward.py",
        'tl.where(seen, dot(q, tl.trans(k), None, INTERPRET), float("-inf"))',
        "dot(q, tl.trans(k), None, INTERPRET)",
    ),
    Mutation(
        "forward: upper bound one too far", "forward.py", "< hi[:, None]", "<= hi[:, None]"
    ),
    Mutation("forward: sums not rescaled", "forward.py", "acc * decay[:, None]", "acc"),
    Mutation("forward: total not rescaled", "forward.py", "total * decay +", "total +"),
    Mutation("forward: lse without the sum", "forward.py", "peak + tl.log2(total)", "peak"),
    Mutation("forward: keys of the wrong stream", "forward.py", "tl.where(noised, 0, clean_offset)", "0"),
    Mutation("tiles: partial taken for full", "common.py", "(tl.max(lo, 0) + TILE - 1) // TILE", "tl.max(lo, 0) // TILE", DOCUMENTS),
    Mutation("tiles: last one dropped", "common.py", "last = (end + TILE - 1) // TILE", "last = end // TILE"),
    Mutation("tiles: full ones outlast the range", "common.py", ", full_first), last)", ", full_first), 999)", ONE_BLOCK),
    Mutation("loads: one row past the end", "common.py", "(start + row < stop)", "(start + row <= stop)"),
    Mutation("loads: columns past the head", "common.py", "(col < D)[None, :], other", "(col < DP)[None, :], other"),
    Mutation("rows: addressed in 32 bits", "common.py", "start.to(tl.int64) * stride", "start * stride", FAR_ROWS),
    Mutation("order: sections overlap", "common.py", "first + left % width", "left % width", BATCHED),
    Mutation("order: a tile twice, another never", "common.py", "tiles - 1 - rank // streams", "tiles - 1 - rank // streams // 2", BATCHED),
    Mutation("order: light tiles of queries first", "common.py", "tiles - 1 - rank // streams", "rank // streams", "order"),
    Mutation("order: light tiles of keys first", "common.py", "streams - 1 - rank // tiles", "rank // tiles", "order"),
    Mutation("dK: delta dropped", "backward.py", "dprobs - delta[None, :]", "dprobs"),
    Mutation("dQ: delta dropped", "backward.py", "dprobs - delta[:, None]", "dprobs"),
    Mutation("dK/dV: mask dropped", "backward.py", "probs = tl.where(seen, tl.exp2(scores * scale - lse[None, :]), 0.0)", "probs = tl.exp2(scores * scale - lse[None, :])"),
    Mutation("dK/dV: lower bound one too far", "backward.py", "query[None, :] >= lo[:, None]", "query[None, :] > lo[:, None]"),
    Mutation("dQ: mask dropped", "backward.py", "probs = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)", "probs = tl.exp2(scores * scale - lse[:, None])"),
    Mutation("dK/dV: one head of the group", "backward.py", "range(0, group)", "range(0, 1)", GROUPED),
    Mutation("dK: scale dropped", "backward.py", "dk * inv_sqrt", "dk"),
    Mutation("decode: page offset dropped", "decode.py", "(key % PAGE) * stride_t", "0 * stride_t", "decode"),
    Mutation("decode: chunks weigh the same", "decode.py", "weight = tl.exp2(lse - tl.where(peak == float(\"-inf\"), 0.0, peak))", "weight = tl.where(used, 1.0, 0.0)", "decode"),
    Mutation("decode: last tile of a chunk dropped", "decode.py", "tl.minimum(chunk * each + each, tiles)", "tl.minimum(chunk * each + each, tiles) - 1", "decode"),
    Mutation("decode: bound ignored", "decode.py", "& (key[None, :] < hi[:, None])", "", "decode"),
)  # fmt: skip
