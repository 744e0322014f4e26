"""The operators under the compiler: no graph break, the right shapes, the right gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bd3lm.model.attention as attention
from bd3lm.config import ModelConfig
from bd3lm.model import Transformer


def test_training_forward_on_a_fake_gpu_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no GPU behind them; the autograd engine wants one, so forward only."""
    there = attention.BACKENDS["cuda"]._replace(available=lambda: True)
    monkeypatch.setitem(attention.BACKENDS, "cuda", there)
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


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_training_step_equals_dense(traced: dict[str, Any], how: str) -> None:
    assert traced[how] <= 1e-5


def test_decoding_operators_equal_dense(traced: dict[str, Any]) -> None:
    assert traced["decoded"] <= 2e-6


def test_operators_pass_the_checks_of_pytorch(traced: dict[str, Any]) -> None:
    assert len(traced["operators"]) >= 12
    assert set(traced["operators"].values()) == {"SUCCESS"}
