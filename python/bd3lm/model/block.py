"""One layer of the Transformer.

Shapes: B batch, T rows of the residual stream, D width, H heads, Dh head width, M selected rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bd3lm.config import ModelConfig
from bd3lm.model.attention import BlockMask, CachedMask, RangeMask, attend
from bd3lm.model.fused import dropout_add, projected_heads, rotate, split_heads
from bd3lm.model.layers import CacheAt, KVCache, Mlp, Norm, linear_parts
from bd3lm.model.rotary import unrotated


class Block(nn.Module):
    """Pre-norm attention and MLP; adaLN modulates both if there is a conditioning."""

    attend: Callable[..., Tensor] = staticmethod(attend)

    def __init__(self, cfg: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        self.attention = "auto"
        self.rotates = layer not in cfg.nope_layers
        self.q_width = cfg.heads * cfg.head_width
        self.kv_width = cfg.num_kv_heads * cfg.head_width
        self.norm1 = Norm(cfg.width, cfg.norm, cfg.norm_eps)
        self.qkv = nn.Linear(cfg.width, self.q_width + 2 * self.kv_width, bias=cfg.qkv_bias)
        if cfg.qk_norm:
            self.q_norm = Norm(cfg.head_width, cfg.norm, cfg.norm_eps)
            self.k_norm = Norm(cfg.head_width, cfg.norm, cfg.norm_eps)
        self.out = nn.Linear(self.q_width, cfg.width, bias=cfg.out_bias)
        self.norm2 = Norm(cfg.width, cfg.norm, cfg.norm_eps)
        self.mlp = Mlp(cfg)
        if cfg.cond_width:
            self.ada = nn.Linear(cfg.cond_width, 6 * cfg.width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the last projection of each residual branch to zero and adaLN gates to one."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.mlp.down.weight)
        for linear in (self.qkv, self.out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.cfg.mlp_bias:
            nn.init.zeros_(self.mlp.down.bias)
        if self.cfg.cond_width:
            nn.init.zeros_(self.ada.weight)
            nn.init.zeros_(self.ada.bias)
            self.ada.bias.view(6, -1)[[2, 5]] = 1.0  # the two gates

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor], queries: int | None) -> list[Tensor]:
        """Project to rotated queries [B, Tq, H, Dh] and keys, values [B, T, Hkv, Dh].

        Args:
            x: normalised residual stream [B, T, D].
            rope: cosines and signed sines of every row [T, Dh].
            queries: number of leading rows that are queries; None: all. 0: queries are unused.
        """
        head = self.cfg.head_width
        turn = not self.cfg.qk_norm  # the norms come before the rotation
        widths, turned = [self.q_width, self.kv_width, self.kv_width], [turn, turn, False]
        whole = not queries or queries == x.shape[1]
        if not isinstance(self.qkv, nn.Linear):  # packed for inference: its matrix is not a tensor
            q, k, v = split_heads(self.qkv(x), widths, turned, rope, head)
        elif whole:
            weight, bias = self.qkv.weight, self.qkv.bias
            q, k, v = projected_heads(x, weight, widths, turned, rope, head, bias)
        else:
            sizes = [self.q_width, 2 * self.kv_width]
            weight_q, weight_kv = self.qkv.weight.split(sizes)
            bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
            query_rows = x[:, :queries]
            angles = _first(rope, query_rows.shape[1])
            (q,) = projected_heads(
                query_rows, weight_q, widths[:1], turned[:1], angles, head, bias_q
            )
            k, v = projected_heads(x, weight_kv, widths[1:], turned[1:], rope, head, bias_kv)
        q = q[:, : queries or None]
        if self.cfg.qk_norm:
            q = rotate(self.q_norm(q).to(v.dtype), _first(rope, q.shape[1]))
            k = rotate(self.k_norm(k).to(v.dtype), rope)
        return [q, k, v]

    def forward(
        self,
        h: Tensor,
        mask: BlockMask | CachedMask | RangeMask,
        rope: tuple[Tensor, Tensor],
        cond: Tensor | None,
        *,
        queries: int | None = None,
        select: Tensor | None = None,
        cache: KVCache | CacheAt | None = None,
        layer: int = 0,
        past: tuple[Tensor, Tensor] | None = None,
        shares: bool = False,
    ) -> Any:
        """Run one layer.

        Args:
            h: residual stream [B, T, D].
            mask: the keys that each query sees.
            rope: angles of the rows of ``h``.
            cond: conditioning [1, 1, C] or [B, T, C]; None without adaLN.
            queries: only the first Tq rows are queries; the rest give keys and values. None: all
                rows. 0: the layer only gives keys and values, to the cache or with ``shares``.
            select: flat indices into the query rows [M]; the output is then [M, D].
            cache: written at its length, and read up to its length plus T.
            layer: index into the cache.
            past: keys and values [B, Hkv, Tp, Dh] that follow those of ``h``.
            shares: also return the keys and values, for other streams; without a cache.

        Returns:
            [B, Tq, D], or [M, D] with ``select``. With ``shares``: that, or None without queries,
            and the keys and values [B, Hkv, T, Dh].
        """
        if not self.rotates:
            rope = unrotated(rope)
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(cond)
        h, normed = self.norm1.fork(h, shift1, scale1)
        q, k, v = self.heads(normed, rope, queries)
        if cache is not None:
            cache.write(layer, k, v)
            if queries == 0:
                return h[:, :0]
            keys, values = cache.read(layer, cache.length + k.shape[1])
            q = q.to(keys.dtype)
        else:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
        own = keys, values
        if shares and queries == 0:
            return None, *own
        if past is not None:
            keys, values = torch.cat([keys, past[0]], dim=2), torch.cat([values, past[1]], dim=2)
        if len(keys) != len(q):  # the rows lie one after the other, and each has its own cache
            q = q.reshape(len(keys), -1, *q.shape[2:])
        attended = self.attend(q.transpose(1, 2), keys, values, mask, self.attention)
        attended = attended.transpose(1, 2).reshape(len(h), -1, self.q_width)
        h = h[:, :queries]
        if select is not None:
            attended, h = attended.flatten(0, 1)[select], h.flatten(0, 1)[select]
        gate1, shift2, scale2, gate2 = (
            pick(m, queries, select) for m in (gate1, shift2, scale2, gate2)
        )
        dropout = self.cfg.dropout if self.training else 0.0
        branch, bias = linear_parts(self.out, attended, gate1)
        h = dropout_add(h, branch, bias, dropout)
        h, normed = self.norm2.fork(h, shift2, scale2)
        branch, bias = self.mlp(normed, gate2)
        out = dropout_add(h, branch, bias, dropout)
        return (out, *own) if shares else out

    def _modulation(self, cond: Tensor | None) -> tuple[Tensor | None, ...]:
        if cond is None:
            return (None,) * 6
        return one_modulation(self.ada, cond).chunk(6, dim=-1)


def one_modulation(ada: nn.Module, cond: Tensor) -> Tensor:
    """Shifts, scales and gates; those of one row are float32, to be folded into weights."""
    if cond.numel() > cond.shape[-1]:
        return ada(cond)
    with torch.autocast(cond.device.type, enabled=False):
        if isinstance(ada, nn.Linear) and ada.weight.dtype != cond.dtype:  # gathered by FSDP
            return F.linear(cond, ada.weight.float(), ada.bias.float())
        return ada(cond)


def _first(rope: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Angles of the first rows."""
    return rope[0][:count], rope[1][:count]


def pick(m: Tensor | None, queries: int | None, select: Tensor | None) -> Tensor | None:
    """Select the rows of a modulation [1, 1, D] or [B, T, D] that remain after selection."""
    if m is None:
        return None
    if m.shape[1] > 1:
        m = m[:, :queries]
        return m if select is None else m.flatten(0, 1)[select]
    return m if select is None else m[0]
