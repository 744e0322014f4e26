"""The Hopper backend without its kernels: the work of every program, and when they are taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bd3lm.model.attention import AUTO, BACKENDS, BlockMask, choose, hopper
from bd3lm.model.attention.hopper.worklist import (
    ROWS,
    WIDE,
    key_worklist,
    pairs_streams,
    queries_met,
    query_worklist,
)

DOCUMENTS = torch.tensor([[0] * 11 + [1] * 109 + [-1] * 30, [7] * 80 + [8] * 70])
MASKS = {
    "training": BlockMask.training(150, 16),
    "training, S=1": BlockMask.training(64, 1),
    "training, a block is larger than a tile": BlockMask.training(200, 70),
    "training, S=L": BlockMask.training(130, 130),
    "training, documents": BlockMask.training(150, 4, DOCUMENTS.int()),
    "training, documents and large blocks": BlockMask.training(150, 75, DOCUMENTS.int()),
    "training, causal": BlockMask.training(150, 5, causal_end=150),
    "denoise": BlockMask.denoise(150, 16),
    "denoise, documents": BlockMask.denoise(150, 100, DOCUMENTS.int()),
    "clean": BlockMask.clean(200, 7),
    "clean, a prefix": BlockMask.clean(300, 6, first=138),
    "one position": BlockMask.training(1, 1),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_pair_that_attends_is_in_one_step(name: str) -> None:
    mask = MASKS[name]
    queries, keys = (2 if mask.noised and mask.clean_queries else 1), (2 if mask.noised else 1)
    for row, dense in zip(query_worklist(mask, "cpu"), mask.dense(), strict=True):
        check_row(row.tolist(), dense, queries, keys, WIDE)
    for head in (64, 128):
        for row, dense in zip(key_worklist(mask, "cpu", head), mask.dense(), strict=True):
            check_row(row.tolist(), dense.T, keys, queries, queries_met(head))


def check_row(
    entries: list[list[int]], dense: Tensor, streams: int, met_streams: int, width: int
) -> None:
    """The worklist of one row of the batch against its mask [owned rows, rows met]."""
    length, met_length = dense.shape[0] // streams, dense.shape[1] // met_streams
    times = torch.zeros(len(dense))
    for clean_first, clean_steps, noised_first, steps, *tiles in entries:
        for stream, start, begin, end, *full in (tiles[:8], tiles[8:]):
            rows = slice(stream * length + start, stream * length + min(start + ROWS, length))
            times[rows] += 1
            live = dense[rows]
            left = live.clone()
            assert 0 <= begin <= end <= steps
            for t in range(begin, end):
                noised = t >= clean_steps
                tile = noised_first + t - clean_steps if noised else clean_first + t
                offset = 0 if noised else (met_streams - 1) * met_length
                first, stop = tile * width, min(tile * width + width, met_length)
                part = slice(offset + first, offset + stop)
                left[:, part] = False
                whole = stop - first == width and bool(live[:, part].all())
                called = full[0] <= t < full[1] or full[2] <= t < full[3]
                assert called == (whole and len(live) > 0)
            assert not left.any(), "a pair is in no step"
    assert (times == 1).all()
    counts = [entry[3] for entry in entries]
    assert counts == sorted(counts, reverse=True)


def test_streams_share_a_program_where_a_block_fits_into_a_tile() -> None:
    paired = {name for name, mask in MASKS.items() if pairs_streams(mask)}
    assert paired == {
        "training", "training, S=1", "training, documents", "training, causal", "one position",
    }  # fmt: skip
    # At L = 1024: 16 pairs of tiles, of which the i-th shares i + 1 clean tiles.
    steps = query_worklist(BlockMask.training(1024, 16), "cpu")[0, :, 3]
    assert steps.tolist() == [i + 2 for i in reversed(range(16))]


def test_a_triton_whose_gluon_is_unknown_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hopper._judge.cache_clear()
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(hopper, "version", lambda package: hopper.TRITONS[0])
        assert hopper.kernels_take(torch.bfloat16, 64)
        assert not caplog.messages
        assert not hopper.kernels_take(torch.float32, 64)
        assert not hopper.kernels_take(torch.bfloat16, 80)
        monkeypatch.setattr(hopper, "version", lambda package: "3.5.0")
        for _ in range(2):
            assert not hopper.kernels_take(torch.float16, 128)
    hopper._judge.cache_clear()
    assert [message.partition(", since ")[2] for message in caplog.messages] == [
        "its kernels take fp16 and bf16 of 64 or 128 features, not float32 of 64",
        "its kernels take fp16 and bf16 of 64 or 128 features, not bfloat16 of 80",
        f"its kernels were compiled with Triton {', '.join(hopper.TRITONS)}, not with 3.5.0",
    ]


def test_it_is_taken_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all("hopper" not in names for names in AUTO.values())
    there = BACKENDS["hopper"]._replace(available=lambda: True)
    monkeypatch.setitem(BACKENDS, "hopper", there)
    with FakeTensorMode(), torch.device("cuda"):
        q = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16)
        assert choose(q, q, q, BlockMask.training(150, 16), "hopper") is there


def test_the_operator_traces_with_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "version", lambda package: hopper.TRITONS[0])
    hopper._judge.cache_clear()
    mask = BlockMask.training(70, 5)
    with FakeTensorMode():
        q = torch.empty(2, 4, 140, 64, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 2, 140, 64, dtype=torch.bfloat16, requires_grad=True)
        out = hopper.hopper_attention(q, k, k, mask)
        gradients = torch.autograd.grad(out.float().sum(), (q, k))
        assert out.shape == q.shape
        assert [x.shape for x in gradients] == [q.shape, k.shape]
    hopper._judge.cache_clear()


@pytest.mark.slow
def test_compiled_it_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "version", lambda package: hopper.TRITONS[0])
    hopper._judge.cache_clear()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return lambda *inputs: (torch.zeros(()),)

    mask = BlockMask.training(70, 5)
    q = torch.zeros(1, 2, 140, 64, dtype=torch.bfloat16)

    @torch.compile(backend=keep, fullgraph=True)
    def run(q: Tensor) -> Tensor:
        return hopper.hopper_attention(q, q, q, mask).sum()

    run(q)
    operator = torch.ops.bd3lm.hopper_attention.default
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(operator) == 1
    hopper._judge.cache_clear()
