"""A model as decoding wants it: what never changes is worked out once, not once a forward.

What comes out is the same :class:`Transformer`, to be run and not to be trained: adaLN that is told
no noise level is a constant, so it goes into the norms and the last matrix of each branch; and on
the CPU every linear layer keeps its matrix as the Rust kernel reads it, which for a few rows is
several times faster than a general matrix product.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from bd3lm import _core
from bd3lm.errors import ConfigError
from bd3lm.model.layers import Norm
from bd3lm.model.transformer import Block, Transformer


@torch.inference_mode(False)
@torch.no_grad()
def for_inference(model: Transformer, dtype: torch.dtype = torch.float32) -> Transformer:
    """A copy of a model that computes the same function faster.

    Args:
        model: left as it is.
        dtype: of the matrices of linear layers on the CPU, float32 or bfloat16; with bfloat16 the
            activations that meet them are rounded too, and sums, everything else and the logits are
            float32. Other devices have autocast for that, and keep the weights as they are.

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
    return model.requires_grad_(False)


class PackedLinear(nn.Module):
    """A linear layer on the CPU that forgets the matrix in the layout it was trained in.

    A row comes out the same, bit for bit, whatever the number of rows beside it.
    """

    def __init__(self, linear: nn.Linear, bf16: bool) -> None:
        super().__init__()
        self.outputs = linear.out_features
        weight = linear.weight.detach().float().reshape(-1).numpy()
        bias = None if linear.bias is None else linear.bias.detach().float().numpy()
        self.packed = _core.PackedLinear(weight, bias, linear.in_features, bf16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to float32 [..., N]."""
        out = torch.empty(*x.shape[:-1], self.outputs)
        rows = x.float().reshape(-1).numpy()
        self.packed.apply(rows, out.view(-1).numpy(), torch.get_num_threads())
        return out


def _pack(module: nn.Module, bf16: bool) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child, bf16))
        else:
            _pack(child, bf16)


def _fold_conditioning(model: Transformer) -> None:
    """norm(x)·(1 + scale) + shift is a norm of another weight and a bias; gates scale a matrix."""
    cond = model.condition(None, 1, noised=False)
    assert cond is not None
    for block in model.blocks:
        assert isinstance(block, Block)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.ada(cond).flatten().chunk(6)
        _shift_norm(block.norm1, shift1, scale1)
        _shift_norm(block.norm2, shift2, scale2)
        block.out.weight.mul_(gate1[:, None])
        block.mlp.down.weight.mul_(gate2[:, None])
        if block.mlp.down.bias is not None:
            block.mlp.down.bias.mul_(gate2)
        del block.ada
    _shift_norm(model.norm, *model.ada(cond).flatten().chunk(2))
    del model.ada
    model.time = None
    model.cfg = dataclasses.replace(model.cfg, cond_width=0)


def _shift_norm(norm: Norm, shift: Tensor, scale: Tensor) -> None:
    norm.weight.mul_(1 + scale)
    norm.bias = nn.Parameter(shift.clone())
