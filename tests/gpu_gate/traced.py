"""A training step through the operators on the CPU, in Triton's interpreter.

Compiled without a graph break, checkpointed, and sharded, each against the dense backend; and
PyTorch's own checks of the operators. Called by ``interpret.py``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import bd3lm.model.attention as attention
from bd3lm.config import ModelConfig
from bd3lm.model import Transformer, transformer
from bd3lm.model.attention import triton
from bd3lm.model.attention.mask import BlockMask
from bd3lm.model.attention.triton import ops
from bd3lm.model.attention.triton.ranges import ranges

LENGTH, BLOCK = 12, 4


def small_model(**settings: Any) -> Transformer:
    """Two layers with shared keys; the residual branches are opened, so that attention counts."""
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "norm": "rmsnorm", "mlp": "relu2"}
    model = Transformer(ModelConfig(**{**shape, **settings}), 50)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def step(model: Transformer, xt: Tensor, x0: Tensor, select: Tensor, doc_ids: Tensor) -> Tensor:
    """A loss like that of training."""
    logits = model.logits(model.denoise(xt, x0, BLOCK, select, doc_ids=doc_ids))
    return torch.nn.functional.cross_entropy(logits, x0.flatten()[select])


def step_of_views(
    model: Transformer, xt: Tensor, x0: Tensor, select: Tensor, doc_ids: Tensor
) -> Tensor:
    """A loss like that of two views and the next tokens of the clean stream that they share."""
    views = torch.cat([xt, torch.where(xt == 49, x0, 49)])
    other = torch.nonzero_static((xt != 49).flatten(), size=xt.numel() - len(select)).flatten()
    chosen = torch.cat([select, other + xt.numel()])
    predict = torch.arange(0, xt.numel() - 1, 2)
    features = model.denoise_and_predict(views, x0, BLOCK, chosen, predict, doc_ids=doc_ids)
    targets = x0.flatten()[torch.cat([select, other, predict + 1])]
    return torch.nn.functional.cross_entropy(model.logits(features), targets)


JOINT = {"clean_stream": "causal", "previous_tokens": 2}
"""Model of :func:`step_of_views`."""


def gradients(
    run: Callable[..., Tensor],
    prepare: Callable[[Transformer], object] = lambda model: None,
    **settings: Any,
) -> list[Tensor]:
    """Loss and gradients of one step of the model that ``prepare`` has changed."""
    model = small_model(**settings)
    prepare(model)
    x0 = torch.arange(2 * LENGTH).view(2, LENGTH) % 50
    xt = torch.where(x0 % 3 == 0, 49, x0)
    select = (xt == 49).flatten().nonzero().flatten()
    doc_ids = torch.zeros(2, LENGTH, dtype=torch.int32)
    doc_ids[0, 5:], doc_ids[1, 10:] = 1, -1
    loss = run(model, xt, x0, select, doc_ids)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in grads)]


def shard(model: Transformer) -> None:
    """FSDP over a group of this process alone: each block gathers its weights when it runs."""
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The root gathers its own weights, embedding and head, around these calls as around forward.
    for name in ("denoise", "logits"):
        register_fsdp_forward_method(model, name)


def sharded() -> list[Tensor]:
    """Loss and gradients under FSDP with activation checkpointing inside it."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

        def prepare(model: Transformer) -> None:
            for index, block in enumerate(model.blocks):
                model.blocks[index] = checkpoint_wrapper(block)
            shard(model)

        try:
            return gradients(step, prepare)
        finally:
            torch.distributed.destroy_process_group()


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of any tensor over its largest value."""
    assert len(found) == len(wanted)
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in zip(found, wanted, strict=True)
    )


def checked_operators() -> dict[str, str]:
    """Schema, shapes, gradient registration and tracing of each operator."""
    mask = BlockMask.training(5, 2)
    keys, queries = ranges(mask, "cpu")
    q, k, v = (torch.randn(1, h, 10, 16, requires_grad=True) for h in (2, 1, 1))
    out, lse = ops.block_attention(q, k, v, keys, queries, True, 0.25)
    lo, hi = torch.zeros(1, 10, dtype=torch.int32), torch.full((1, 10), 10, dtype=torch.int32)
    plain: list[Any] = [x.detach() for x in (q, k, v)]
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.block_attention, (q, k, v, keys, queries, True, 0.25)),
        (
            ops.block_attention_backward,
            (torch.ones(out.shape), *plain, out.detach(), lse, keys, queries, True, 0.25),
        ),
        (ops.decode_attention, (*plain, None, lo, hi, 0.25, 2)),
    ]
    found: dict[str, str] = {}
    for op, arguments in calls:
        for name, verdict in torch.library.opcheck(op, arguments).items():
            found[f"{op._name} {name}"] = verdict
    return found


def decoded() -> float:
    """Queries over a long cache, plain and in pages, against dense; the worst of the two."""
    torch.manual_seed(1)
    mask = BlockMask.clean(530, 4, first=522)
    q, k, v = torch.randn(1, 2, 8, 16), torch.randn(1, 1, 530, 16), torch.randn(1, 1, 530, 16)
    wanted = attention.attend(q, k, v, mask, backend="dense")
    plain = triton.triton_attention(q, k, v, mask)

    order = torch.randperm(9)
    pools = []
    for x in (k, v):
        rows = torch.nn.functional.pad(x, (0, 0, 0, 9 * 64 - 530)).unflatten(2, (9, 64))
        pools.append(rows[0].transpose(0, 1)[order])
    pages = order.argsort().int()[None]
    length = torch.tensor([530], dtype=torch.int32)
    paged = triton.paged_attention(q, *pools, pages, length, 4)
    return max(difference([plain], [wanted]), difference([paged], [wanted]))


def padded() -> float:
    """A head width that is no multiple of 16, output and gradients, against dense."""
    torch.manual_seed(2)
    mask = BlockMask.training(21, 4)
    qkv = [torch.randn(1, h, 42, 24, requires_grad=True) for h in (2, 1, 1)]
    dout = torch.randn(1, 2, 42, 24)
    found, wanted = (
        [out, *torch.autograd.grad(out, qkv, dout)]
        for out in (
            triton.triton_attention(*qkv, mask),
            attention.attend(*qkv, mask, backend="dense"),
        )
    )
    return difference(found, wanted)


def run() -> dict[str, Any]:
    """Figures that ``test_tracing.py`` asserts."""
    attention.AUTO["cpu"] = ("dense",)
    wanted = gradients(step)
    wanted_of_views = gradients(step_of_views, **JOINT)
    here = attention.BACKENDS["triton"]._replace(supports=lambda *_: True, available=lambda: True)
    attention.BACKENDS["triton"] = here
    attention.AUTO["cpu"] = ("triton", "dense")
    transformer.wants_last_clean = lambda device: True  # as on a GPU
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    return {
        "compiled": difference(gradients(compiled), wanted),
        "views": difference(gradients(step_of_views, **JOINT), wanted_of_views),
        "views, compiled": difference(
            gradients(torch.compile(step_of_views, fullgraph=True, backend="aot_eager"), **JOINT),
            wanted_of_views,
        ),
        "checkpointed": difference(
            gradients(lambda *args: checkpoint(step, *args, use_reentrant=False)), wanted
        ),
        "sharded": difference(sharded(), wanted),
        "padded": padded(),
        "decoded": decoded(),
        "operators": checked_operators(),
    }
