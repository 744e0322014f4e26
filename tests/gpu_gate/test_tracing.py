"""The operators under the compiler: no graph break, the right shapes, the right gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.conftest import fake_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bd3lm.model.attention as attention
from bd3lm.config import ModelConfig
from bd3lm.model import KVCache, Transformer, head
from bd3lm.model.attention import triton


@fake_gpu
def test_training_forward_on_a_fake_gpu_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no GPU behind them; the autograd engine wants one, so forward only.

    The backward is traced on the CPU, below.
    """
    there = attention.BACKENDS["triton"]._replace(available=lambda: True)
    monkeypatch.setitem(attention.BACKENDS, "triton", there)
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with FakeTensorMode(), torch.device("cuda"):
        model = Transformer(ModelConfig(width=64, depth=2, heads=4, kv_heads=2, qk_norm=True), 100)
        ids = torch.zeros(2, 32, dtype=torch.long)
        select = torch.zeros(20, dtype=torch.long)
        doc_ids = torch.zeros(2, 32, dtype=torch.int32)

        @torch.compile(fullgraph=True, backend=capture)
        def loss(ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                logits = model.logits(model.denoise(ids, ids, 4, select, doc_ids=doc_ids))
                return torch.nn.functional.cross_entropy(logits, ids.flatten()[select])

        found = loss(ids)
    assert found.device.type == "cuda"
    assert found.shape == ()
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("block_attention" in target for target in targets) == 2
    assert not any("scaled_dot_product" in target for target in targets)


@fake_gpu
def test_scoring_and_decoding_on_a_fake_gpu_go_through_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys from a cache have the dtype of the queries, or the slow backend would take over."""
    there = attention.BACKENDS["triton"]._replace(available=lambda: True)
    monkeypatch.setitem(attention.BACKENDS, "triton", there)
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        model = Transformer(ModelConfig(width=144, depth=2, heads=2, qk_norm=True), 100)
        ids = torch.zeros(2, 32, dtype=torch.long)
        select = torch.zeros(20, dtype=torch.long)
        with bf16_autocast(), Called() as called:
            cache = KVCache(model.cfg, 2, 64, torch.device("cuda"))
            assert cache.k[0].dtype == torch.bfloat16
            model.encode(ids, 4, select=select[:0], cache=cache, commit=32)
            assert called.take() == {"bd3lm::block_attention": 1}  # the last layer only fills
            model.denoise_cached(ids, cache, 4, select)
            assert called.take() == {"bd3lm::block_attention": 2}
            start = torch.zeros((), dtype=torch.long)
            model.encode_at(ids[:, :8], start, 4, select, cache)
            assert called.take() == {"bd3lm::decode_attention": 2}


@fake_gpu
def test_the_head_on_a_fake_gpu_sums_in_float32_over_wide_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "available", lambda: True)
    positions, width, vocab = 2 * head.CUDA_CHUNK_ROWS + 5, 32, 1003
    with FakeTensorMode(), torch.device("cuda"), bf16_autocast(), Operations() as seen:
        features = torch.empty(positions, width, requires_grad=True)
        weights = torch.empty(vocab, width, requires_grad=True)
        target = torch.zeros(positions, dtype=torch.int64)
        bias = torch.empty(vocab, requires_grad=True)
        weight = torch.empty(positions)
        loss, nats = head.head_cross_entropy(
            head.HeadInputs(features, weights, bias, target, weight, vocab - 1)
        )
    assert loss.shape == ()
    assert nats.shape == (positions,)
    assert nats.dtype == torch.float32
    rows, strides = zip(*seen.logits, strict=True)
    assert rows == (head.CUDA_CHUNK_ROWS, head.CUDA_CHUNK_ROWS, 5)
    assert {stride % head.ALIGNED for stride in strides} == {0}
    assert seen.names["aten::mm.dtype_out"] == 3, "the head's gradient, once a chunk"


class Operations(TorchDispatchMode):
    """Counts operators, and keeps the shapes that cross-entropy saw."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.logits: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[f"{func._schema.name}.{func._schema.overload_name}"] += 1
        if func._schema.name == "bd3lm::cross_entropy":
            self.logits.append((len(args[0]), args[0].stride(0)))
        return func(*args, **(kwargs or {}))


@contextmanager
def bf16_autocast() -> Iterator[None]:
    """Set the state of ``torch.autocast``, which does nothing where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


class Called(TorchDispatchMode):
    """Counts the operators that compute attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if "attention" in name or "softmax" in name:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def take(self) -> dict[str, int]:
        """Operators called since the last time."""
        seen, self.seen = dict(self.seen), Counter()
        return seen


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "sharded", "views", "views, compiled"])
def test_training_step_equals_dense(traced: dict[str, Any], how: str) -> None:
    assert traced[how] <= 1e-5


def test_head_widths_that_are_padded_equal_dense(traced: dict[str, Any]) -> None:
    assert traced["padded"] <= 5e-6


def test_decoding_operators_equal_dense(traced: dict[str, Any]) -> None:
    assert traced["decoded"] <= 2e-6


def test_operators_pass_the_checks_of_pytorch(traced: dict[str, Any]) -> None:
    assert len(traced["operators"]) >= 12
    assert set(traced["operators"].values()) == {"SUCCESS"}
