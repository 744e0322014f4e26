"""The decoding step that a GPU can replay, on the CPU: same numbers and addresses, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bd3lm.errors import ConfigError
from bd3lm.model import DecodeStep, KVCache, Transformer
from bd3lm.model.attention import BlockMask, CachedMask, attend
from tests.conftest import MASK_ID, random_ids, tiny_model
from tests.integration.test_step import NoWaits

ROWS, BLOCK, CAPACITY = 3, 4, 32
EVERY = torch.arange(ROWS * BLOCK)


def cache_of(model: Transformer) -> KVCache:
    """Two blocks are filled; values behind them must not count."""
    cache = KVCache(model.cfg, ROWS, CAPACITY, torch.device("cpu"))
    for kept in (*cache.k, *cache.v):
        kept.fill_(float("nan"))
    nothing = torch.empty(0, dtype=torch.int64)
    prompt = random_ids(ROWS, 2 * BLOCK, seed=1)
    model.encode(prompt, BLOCK, select=nothing, cache=cache, commit=2 * BLOCK)
    return cache


def forwards() -> list[tuple[Tensor, Tensor, int]]:
    """(ids, select, commit) of three blocks: a first step with the commit before it, and more."""
    calls = []
    for block in range(3):
        masked = torch.full((ROWS, BLOCK), MASK_ID)
        if block > 0:
            clean = random_ids(ROWS, BLOCK, seed=10 + block)
            both = torch.cat([clean, masked], dim=1)
            calls.append((both, EVERY // BLOCK * 2 * BLOCK + BLOCK + EVERY % BLOCK, BLOCK))
        for seed in range(2):
            some = masked.where(torch.rand(ROWS, BLOCK) < 0.5, random_ids(ROWS, BLOCK, seed=seed))
            calls.append((some, EVERY, 0))
    return calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 1, "qk_norm": True, "norm": "rmsnorm"},
        {"cond_width": 8, "time_conditioning": True},
        {"previous_tokens": 3},
    ],
    ids=["plain", "shared keys", "told the level", "previous tokens"],
)
def test_it_equals_encode(changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    with torch.inference_mode():
        mine, theirs = cache_of(model), cache_of(model)
        step = DecodeStep(model, mine, BLOCK, model.logits)
        for ids, select, commit in forwards():
            sigma = torch.rand(ROWS, ids.shape[1] // BLOCK) if model.time else None
            found = step(ids, select, commit=commit, sigma=sigma)
            features = model.encode(
                ids, BLOCK, select=select, cache=theirs, commit=commit, sigma=sigma
            )
            torch.testing.assert_close(found, model.logits(features), rtol=1e-5, atol=1e-5)
            assert mine.length == theirs.length
    end = mine.length + BLOCK
    for a, b in zip((*mine.k, *mine.v), (*theirs.k, *theirs.v), strict=True):
        torch.testing.assert_close(a[:, :, :end], b[:, :, :end], rtol=1e-5, atol=1e-5)


def test_a_replay_would_read_and_write_the_same_addresses() -> None:
    model = tiny_model(previous_tokens=2)
    with torch.inference_mode():
        cache = cache_of(model)
        step = DecodeStep(model, cache, BLOCK, model.logits)
        seen: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for ids, select, commit in forwards():
            step(ids, select, commit=commit)
            for shape, forward in step._forwards.items():
                cached = (*cache.k, *cache.v, cache.read_tokens(CAPACITY))
                buffers = (forward.ids, forward.select, forward.start, *cached)
                seen.setdefault(shape, set()).add(tuple(x.data_ptr() for x in buffers))
    first, later = (ROWS, BLOCK, ROWS * BLOCK, 0), (ROWS, 2 * BLOCK, ROWS * BLOCK, BLOCK)
    assert set(seen) == {first, later}
    assert all(len(addresses) == 1 for addresses in seen.values())


def test_it_never_waits_for_the_device() -> None:
    model = tiny_model(previous_tokens=2)
    with torch.inference_mode():
        step = DecodeStep(model, cache_of(model), BLOCK, model.logits)
        with NoWaits():
            for ids, select, commit in forwards():
                step(ids, select, commit=commit)


def test_it_is_one_graph_for_every_position() -> None:
    """A recorded graph must not depend on the position, or a replay would be wrong."""
    model = tiny_model(previous_tokens=2)
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.inference_mode():
        mine, theirs = cache_of(model), cache_of(model)
        step = DecodeStep(model, mine, BLOCK, model.logits)
        plain = DecodeStep(model, theirs, BLOCK, model.logits)
        compiled = torch.compile(Transformer.encode_at, fullgraph=True, backend=capture)
        for ids, select, commit in forwards():
            wanted = plain(ids, select, commit=commit)
            start = torch.tensor(mine.length)
            found = model.logits(compiled(model, ids, start, BLOCK, select, step.cache))
            mine.length += commit
            # Not bit for bit: where it compiles, PyTorch computes GELU, elsewhere Rust.
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # with and without a commit


def test_backends_that_need_to_know_the_length_say_no() -> None:
    q, k = torch.ones(1, 1, 2, 16), torch.ones(1, 1, 8, 16)
    mask = CachedMask(torch.tensor([[3, 4]], dtype=torch.int32))
    with pytest.raises(ConfigError, match="attention = rust"):
        attend(q, k, k, mask, backend="rust")
    v = torch.arange(8.0)[None, None, :, None].expand(1, 1, 8, 16)
    found = attend(q, k, v, mask)[0, 0, :, 0]
    assert found.tolist() == pytest.approx([1.0, 1.5])
    prefix = BlockMask.clean(4, 2, first=2)
    wanted = attend(q, k[:, :, :4], v[:, :, :4], prefix)[0, 0, :, 0]
    assert wanted.tolist() == pytest.approx([1.5, 1.5])
