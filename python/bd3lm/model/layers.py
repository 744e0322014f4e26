"""The Transformer's parts: norms, rotations, MLP, and the key/value cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3lm.config import ModelConfig
from bd3lm.model.fused import activated, activated_linear, normalised, on_cpu
from bd3lm.model.previous import tokens_before


class Norm(nn.Module):
    """LayerNorm or RMSNorm with a weight; a bias only where a constant was folded into it."""

    bias: nn.Parameter | None

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", None)
        self.kind = kind
        self.eps = eps

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Normalise the last axis, then ``x * (1 + scale) + shift`` where there is adaLN.

        A modulation of one row [..., 1, D] is folded into the weight.
        """
        return self.fork(x, shift, scale)[1]

    def fork(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``(x, norm(x))``; the gradients of both are added in one pass."""
        weight, bias = self.weight, self.bias
        if x.dtype == torch.float32:
            weight = weight.float()  # FSDP gathers it in the dtype of the products
        if shift is None or scale is None:
            return normalised(x, weight, bias, self.kind, self.eps)
        if shift.numel() == shift.shape[-1]:
            weight, bias = weight * (1 + scale.flatten()), shift.flatten()
            return normalised(x, weight, bias, self.kind, self.eps)
        x, out = normalised(x, weight, None, self.kind, self.eps)
        return x, out * (1 + scale) + shift


def linear_parts(
    linear: nn.Module,
    x: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``gate * linear(f(x + before))``; return ``(out, pending_bias)``.

    On the CPU the next fused operation adds ``pending_bias``. Elsewhere the product includes the
    bias, and ``pending_bias`` is None.

    Args:
        linear: the layer, or its packed form for inference.
        x: [..., K].
        gate: of one row [..., 1, D], folded into the smaller factor, or of every row.
        activation: f (:func:`bd3lm.model.fused.activated`); None for none.
        before: the pending bias [K] of ``x``; only with an activation.
    """
    if not isinstance(linear, nn.Linear):
        out = linear(x if activation is None else activated(x, before, activation))
        return (out if gate is None else gate * out), None
    weight, bias = linear.weight, linear.bias
    if gate is not None and gate.numel() == gate.shape[-1] and x.numel() >= weight.numel():
        row, gate = gate.flatten(), None
        weight, bias = row[:, None] * weight, None if bias is None else row * bias
    later = on_cpu(x)
    if activation is not None and later:
        out = activated_linear(x, before, weight, activation)
    else:
        h = x if activation is None else activated(x, before, activation)
        out = F.linear(h, weight, None if later else bias)
    left = bias if later else None
    if gate is None:
        return out, left
    return gate * (out if left is None else out + left), None


class Mlp(nn.Module):
    """Position-wise MLP: GELU (tanh), squared ReLU, or SwiGLU with gate and value fused."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.kind = cfg.mlp
        up = cfg.hidden * (2 if cfg.mlp == "swiglu" else 1)
        self.up = nn.Linear(cfg.width, up, bias=cfg.mlp_bias)
        self.down = nn.Linear(cfg.hidden, cfg.width, bias=cfg.mlp_bias)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Map [..., D] to [..., D], times ``gate``; returns ``(out, pending_bias)``."""
        h, bias = linear_parts(self.up, x)
        if self.kind != "swiglu":
            return linear_parts(self.down, h, gate, activation=self.kind, before=bias)
        open_, value = (h if bias is None else h + bias).chunk(2, dim=-1)
        return linear_parts(self.down, F.silu(open_) * value, gate)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of sigma = -log(alpha) through a two-layer MLP."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(self.FEATURES, width)
        self.down = nn.Linear(width, width)

    def forward(self, sigma: Tensor) -> Tensor:
        """Embed sigma of any shape [...] as [..., width]."""
        half = self.FEATURES // 2
        rate = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angle = sigma.float()[..., None] * torch.exp(-math.log(10_000.0) * rate)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.down(F.silu(self.up(features)))


class KVCache:
    """Rotated keys and values of committed positions, preallocated for ``capacity`` of them.

    They are float32. On CUDA they have autocast's dtype at the time the cache is made, because the
    kernels there take queries and keys of one dtype.

    Attributes:
        length: number of filled positions.
        capacity: number of positions allocated.
        k: one tensor a layer, [B, Hkv, capacity, Dh].
        v: as ``k``.
        tokens: ids of the positions, int64 [B, capacity], for models that read the tokens before;
            None for others.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is None:
            cast = device.type == "cuda" and torch.is_autocast_enabled("cuda")
            dtype = torch.get_autocast_dtype("cuda") if cast else torch.float32
        # Keys of a head are adjacent, because decoding reads all of them for every token.
        shape = (batch, cfg.num_kv_heads, capacity, cfg.head_width)
        self.capacity = capacity
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.tokens = None
        if cfg.previous_tokens:
            self.tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.length = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write [B, T, Hkv, Dh] after the filled positions of one layer; ``length`` stays."""
        end = self.length + k.shape[1]
        self.k[layer][:, :, self.length : end] = k.transpose(1, 2)
        self.v[layer][:, :, self.length : end] = v.transpose(1, 2)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` positions of one layer, [B, Hkv, length, Dh]."""
        return self.k[layer][:, :, :length], self.v[layer][:, :, :length]

    def read_tokens(self, length: int) -> Tensor:
        """Ids of the first ``length`` positions, [B, length]."""
        assert self.tokens is not None
        return self.tokens[:, :length]

    def tokens_before(self, ids: Tensor, count: int, *, doc_ids: Tensor | None = None) -> Tensor:
        """Write ``ids`` [B, T] after the filled positions; return the N before each, [B, T, N]."""
        assert self.tokens is not None
        end = self.length + ids.shape[1]
        self.tokens[:, self.length : end] = ids
        return tokens_before(self.tokens[:, :end], count, doc_ids)[:, self.length :]

    def keep(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order."""
        self.k = [k.index_select(0, rows) for k in self.k]
        self.v = [v.index_select(0, rows) for v in self.v]
        if self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)


class CacheAt:
    """A cache written at positions held on the device, and always read as a whole.

    Args:
        cache: keys and values.
        position: positions of the next keys and values, int64 [T].
    """

    length = 0

    def __init__(self, cache: KVCache, position: Tensor) -> None:
        self.cache, self.position = cache, position

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write [B, T, Hkv, Dh] at the positions of one layer."""
        for kept, new in ((self.cache.k[layer], k), (self.cache.v[layer], v)):
            kept.index_copy_(2, self.position, new.transpose(1, 2).to(kept.dtype))

    def tokens_before(self, ids: Tensor, count: int) -> Tensor:
        """Write ``ids`` [B, T] at the positions; return the N before each, [B, T, N]."""
        tokens = self.cache.read_tokens(self.cache.capacity)
        tokens.index_copy_(1, self.position, ids)
        return tokens_before(tokens, count).index_select(1, self.position)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """All positions of one layer, [B, Hkv, capacity, Dh], unfilled ones included."""
        return self.cache.read(layer, self.cache.capacity)


class CacheSlots(CacheAt):
    """A cache written at slots of each row, and always read as a whole.

    Args:
        cache: keys and values.
        position: slots of the next keys and values, int64 [B, T].
    """

    def __init__(self, cache: KVCache, position: Tensor) -> None:
        super().__init__(cache, position)
        self.row = torch.arange(len(position), device=position.device)[:, None]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write [1, B·T, Hkv, Dh], one row after the other, at the slots of one layer."""
        for kept, new in ((self.cache.k[layer], k), (self.cache.v[layer], v)):
            values = new.view(*self.position.shape, *new.shape[2:])
            kept.transpose(1, 2)[self.row, self.position] = values.to(kept.dtype)
