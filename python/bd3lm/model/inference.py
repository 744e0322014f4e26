"""Prepare a model for inference: fold constants and prepack matrices.

The result is a :class:`Transformer` that computes the same function and cannot be trained. adaLN
without time conditioning is constant, so it is folded into the norms and the last matrix of each
branch. On the CPU the matrices of linear layers are prepacked for a Rust kernel, which is several
times faster than a general product for a few rows. With a KV cache, a block on the CPU is one Rust
call before attention and one after it.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bd3lm import _core
from bd3lm.errors import ConfigError
from bd3lm.model.attention import BlockMask, CachedMask, attend
from bd3lm.model.block import Block, one_modulation
from bd3lm.model.fused import flat
from bd3lm.model.layers import KVCache, Norm
from bd3lm.model.rotary import unrotated
from bd3lm.model.threads import kernel_threads
from bd3lm.model.transformer import Transformer


@torch.inference_mode(False)
@torch.no_grad()
def for_inference(model: Transformer, dtype: torch.dtype = torch.float32) -> Transformer:
    """Copy a model into a form that computes the same function faster.

    Args:
        model: is not changed.
        dtype: of the matrices of linear layers, float32 or bfloat16. With bfloat16 their inputs
            are rounded too. On the CPU sums, everything else and the logits stay float32;
            elsewhere products and logits are bfloat16, as under autocast.

    Raises:
        ConfigError: bfloat16 on a CPU without bf16 products, or another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError("precision", dtype, "float32 or bfloat16")
    model = copy.deepcopy(model).eval()
    if model.time is not None and not model.cfg.time_conditioning:
        _fold_conditioning(model)
    if model.embed.weight.device.type == "cpu":
        _pack(model, dtype == torch.bfloat16)
        if model.time is None:
            for index, block in enumerate(model.blocks):
                assert isinstance(block, Block)
                model.blocks[index] = PackedBlock(block)
    elif dtype == torch.bfloat16:
        round_matrices(model)
    return model.requires_grad_(False)


class RoundedLinear(nn.Module):
    """Linear layer that keeps its matrix in bfloat16: half the bytes to read in every forward.

    Autocast rounds a float32 matrix anew each time, and keeps none that needs no gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.bfloat16(), requires_grad=False)
        bias = None if linear.bias is None else linear.bias.bfloat16()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to bfloat16 [..., N]."""
        return F.linear(x.bfloat16(), self.weight, self.bias)


def round_matrices(model: Transformer) -> None:
    """Replace the linear layers of the blocks and the head; embeddings stay as they are.

    So do those of adaLN, whose constants are computed in float32.
    """
    owners = [(model, "head")]
    for block in model.blocks:
        assert isinstance(block, Block)
        owners += [(block, "qkv"), (block, "out"), (block.mlp, "up"), (block.mlp, "down")]
    for owner, name in owners:
        setattr(owner, name, RoundedLinear(getattr(owner, name)))


class PackedLinear(nn.Module):
    """Linear layer on the CPU with a prepacked matrix.

    A row of the output is bitwise independent of the number of rows.
    """

    def __init__(self, linear: nn.Linear, bf16: bool) -> None:
        super().__init__()
        self.outputs = linear.out_features
        weight = linear.weight.detach().float().reshape(-1).numpy()
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        self.packed = _core.PackedLinear(weight, bias, linear.in_features, bf16)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., K] to float32 [..., N]."""
        out = torch.empty(*x.shape[:-1], self.outputs)
        self.packed.apply(flat(x.float().contiguous()), flat(out), kernel_threads())
        return out


class PackedBlock(nn.Module):
    """Runs cached forwards of a block in Rust; other calls go to the wrapped :class:`Block`.

    Args:
        block: without conditioning; its linear layers are prepacked.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        qk_norm = block.cfg.qk_norm
        self.packed = _core.PackedBlock(
            norm1=_norm(block.norm1),
            qkv=_matrix(block.qkv),
            q_norm=_norm(block.q_norm) if qk_norm else None,
            k_norm=_norm(block.k_norm) if qk_norm else None,
            out=_matrix(block.out),
            norm2=_norm(block.norm2),
            up=_matrix(block.mlp.up),
            mlp=block.mlp.kind,
            down=_matrix(block.mlp.down),
            head_width=block.cfg.head_width,
        )

    def forward(
        self,
        h: Tensor,
        mask: BlockMask | CachedMask,
        rope: tuple[Tensor, Tensor],
        cond: Tensor | None,
        **how: Any,
    ) -> Tensor:
        """Run the layer; see :meth:`Block.forward`."""
        through_cache = isinstance(how.get("cache"), KVCache) and "past" not in how
        if not through_cache or how.get("queries"):
            return self.block(h, mask, rope, cond, **how)
        return self._through_cache(h, mask, rope, **how)

    def _through_cache(
        self,
        h: Tensor,
        mask: BlockMask | CachedMask,
        rope: tuple[Tensor, Tensor],
        *,
        cache: KVCache,
        layer: int,
        queries: int | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        batch, length, _ = h.shape
        cfg, threads = self.block.cfg, kernel_threads()
        q = torch.empty(batch, length, cfg.heads, cfg.head_width)
        k, v = cache.k[layer], cache.v[layer]
        cos, sin = rope if self.block.rotates else unrotated(rope)
        self.packed.project(
            flat(h.contiguous()),
            flat(cos),
            flat(sin),
            flat(q),
            flat(k),
            flat(v),
            capacity=cache.capacity,
            first=cache.length,
            threads=threads,
        )
        if queries == 0:
            return h[:, :0]
        keys, values = cache.read(layer, cache.length + length)
        attended = attend(q.transpose(1, 2), keys, values, mask, self.block.attention)
        attended = attended.transpose(1, 2).flatten(2)
        if select is None:
            h = h.clone(memory_format=torch.contiguous_format)
        else:
            attended, h = attended.flatten(0, 1)[select], h.flatten(0, 1)[select]
        self.packed.finish(flat(attended.contiguous()), flat(h), threads)
        return h


def _matrix(linear: nn.Module) -> _core.PackedLinear:
    assert isinstance(linear, PackedLinear)
    return linear.packed


def _norm(norm: Norm) -> tuple[NDArray[Any], NDArray[Any] | None, bool, float]:
    bias = None if norm.bias is None else flat(norm.bias.float())
    return flat(norm.weight.float()), bias, norm.kind == "layernorm", norm.eps


def _pack(module: nn.Module, bf16: bool) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, bf16))
        else:
            _pack(child, bf16)


def _fold_conditioning(model: Transformer) -> None:
    """Fold adaLN: scale and shift into weight and bias of the norms, gates into a matrix."""
    cond = model.condition(None, 1)
    assert cond is not None
    for block in model.blocks:
        assert isinstance(block, Block)
        modulation = one_modulation(block.ada, cond).flatten().chunk(6)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        _shift_norm(block.norm1, shift1, scale1)
        _shift_norm(block.norm2, shift2, scale2)
        block.out.weight.mul_(gate1[:, None])
        if block.out.bias is not None:
            block.out.bias.mul_(gate1)
        block.mlp.down.weight.mul_(gate2[:, None])
        if block.mlp.down.bias is not None:
            block.mlp.down.bias.mul_(gate2)
        del block.ada
    _shift_norm(model.norm, *one_modulation(model.ada, cond).flatten().chunk(2))
    del model.ada
    model.time = None
    model.cfg = dataclasses.replace(model.cfg, cond_width=0)


def _shift_norm(norm: Norm, shift: Tensor, scale: Tensor) -> None:
    norm.weight.mul_(1 + scale)
    norm.bias = nn.Parameter(shift.clone())
