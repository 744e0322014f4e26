"""BD3-LM in plain PyTorch, for transformers 4.57 and 5.

Modules have the names of the published checkpoints, so their weights load as they are. This file
is copied next to exported weights, so it imports nothing but PyTorch, transformers and the other
copied files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.utils import ModelOutput  # pyright: ignore[reportMissingImports]

from .block_generation import (
    BlockDiffusionGeneration,
    BlockDiffusionOutput,
)
from .configuration_bd3lm import BD3LMConfig


@dataclass
class BD3LMOutput(ModelOutput):
    """Output of :class:`BD3LM`.

    Attributes:
        loss: mean cross-entropy of the labels, in nats.
        logits: [B, T, V].
        hidden_states: residual stream before each block and after the last, [B, T, D].
        cache: keys and values, with those of this call; also as ``past_key_values``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cache: Any = None

    @property
    def past_key_values(self) -> Any:
        """The cache under its name before transformers 5."""
        return self.cache


class Norm(nn.Module):
    """LayerNorm or RMSNorm with a weight and no bias, in float32."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.kind, self.eps = kind, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        h, weight = x.float(), self.weight.float()
        if self.kind == "layernorm":
            out = F.layer_norm(h, weight.shape, weight, None, self.eps)
        else:
            out = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps) * weight
        return out.to(x.dtype)


class Activation(nn.Module):
    """Nonlinearity of the MLP."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] to [..., W], or to [..., W/2] for SwiGLU."""
        if self.kind == "swiglu":
            gate, value = x.chunk(2, -1)
            return F.silu(gate) * value
        return F.gelu(x, approximate="tanh") if self.kind == "gelu" else F.relu(x).square()


class EmbeddingLayer(nn.Module):
    """Token embeddings; the parameter has the published name."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))

    @property
    def weight(self) -> nn.Parameter:
        """The matrix [V, D] under the name that other embeddings have."""
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to [B, T, D]."""
        return F.embedding(ids, self.embedding)


class Rotary(nn.Module):
    """Angles of positions; the frequencies are stored with the weights."""

    def __init__(self, cfg: BD3LMConfig) -> None:
        super().__init__()
        frequencies, self.factor = _frequencies(cfg)
        self.register_buffer("inv_freq", frequencies)

    def forward(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, Dh]."""
        angle = position[:, None].float() * self.inv_freq.float()  # type: ignore[operator]
        angle = torch.cat([angle, angle], -1)
        return (angle.cos() * self.factor).to(dtype), (angle.sin() * self.factor).to(dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of sigma = -log(alpha) through a two-layer MLP."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        up, down = nn.Linear(self.FEATURES, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(up, nn.SiLU(), down)

    def forward(self, sigma: Tensor) -> Tensor:
        """Sigma of any shape [...] to [..., width]."""
        half = self.FEATURES // 2
        rate = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angle = sigma.float()[..., None] * torch.exp(-math.log(10_000.0) * rate)
        features = torch.cat([angle.cos(), angle.sin()], -1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class DDiTBlock(nn.Module):
    """Pre-norm attention and MLP; adaLN modulates both where there is a conditioning."""

    def __init__(self, cfg: BD3LMConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.cfg = layer, cfg
        self.rotates = layer not in cfg.nope_layers
        self.widths = [n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)]
        dim = cfg.hidden_dim
        self.norm1 = Norm(dim, cfg.norm, cfg.norm_eps)
        self.attn_qkv = nn.Linear(dim, sum(self.widths), bias=cfg.qkv_bias)
        if cfg.qk_norm:
            self.q_norm = Norm(cfg.head_dim, cfg.norm, cfg.norm_eps)
            self.k_norm = Norm(cfg.head_dim, cfg.norm, cfg.norm_eps)
        self.attn_out = nn.Linear(self.widths[0], dim, bias=cfg.out_bias)
        self.norm2 = Norm(dim, cfg.norm, cfg.norm_eps)
        up = cfg.mlp_dim * (2 if cfg.mlp == "swiglu" else 1)
        self.mlp = nn.Sequential(
            nn.Linear(dim, up, bias=cfg.mlp_bias),
            Activation(cfg.mlp),
            nn.Linear(cfg.mlp_dim, dim, bias=cfg.mlp_bias),
        )
        if cfg.adaln:
            self.adaLN_modulation = nn.Linear(cfg.cond_dim, 6 * dim)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        cond: Tensor | None,
        cache: Any = None,
    ) -> Tensor:
        """One layer on [B, T, D]."""
        p = self.cfg.dropout if self.training else 0.0
        if cond is None:
            x = x + F.dropout(self._attend(self.norm1(x), rope, mask, cache), p)
            return x + F.dropout(self.mlp(self.norm2(x)), p)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, -1)
        normed = self.norm1(x) * (1 + scale1) + shift1
        x = x + F.dropout(gate1 * self._attend(normed, rope, mask, cache), p)
        normed = self.norm2(x) * (1 + scale2) + shift2
        return x + F.dropout(gate2 * self.mlp(normed), p)

    def _attend(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: Any) -> Tensor:
        parts = self.attn_qkv(x).split(self.widths, -1)
        q, k, v = (part.unflatten(-1, (-1, self.cfg.head_dim)) for part in parts)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if self.rotates:
            q, k = _rotate(q, rope), _rotate(k, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        groups = self.cfg.n_heads // self.cfg.n_kv_heads
        k, v = (y.repeat_interleave(groups, 1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.attn_out(out.transpose(1, 2).flatten(2))


class DDiTFinalLayer(nn.Module):
    """Last norm and output head."""

    def __init__(self, cfg: BD3LMConfig) -> None:
        super().__init__()
        self.norm_final = Norm(cfg.hidden_dim, cfg.norm, cfg.norm_eps)
        self.linear = nn.Linear(cfg.hidden_dim, cfg.vocab_size, bias=cfg.head_bias)
        self.cutoffs, self.mask_id = cfg.softmax_cutoffs, cfg.mask_token_id
        if self.cutoffs:
            self.clusters = nn.Linear(cfg.hidden_dim, len(self.cutoffs))
        if cfg.adaln:
            self.adaLN_modulation = nn.Linear(cfg.cond_dim, 2 * cfg.hidden_dim)

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """[B, T, D] to logits [B, T, V].

        With an adaptive softmax the tokens of a cluster share the probability of its logit.
        """
        x = self.norm_final(x)
        if cond is not None:
            shift, scale = self.adaLN_modulation(cond).chunk(2, -1)
            x = x * (1 + scale) + shift
        logits = self.linear(x)
        if not self.cutoffs:
            return logits
        logits[..., self.mask_id] = -torch.inf
        ends = [*self.cutoffs, logits.shape[-1]]
        shortlist, *rare = logits.split([ends[0], *(b - a for a, b in pairwise(ends))], -1)
        of_clusters = self.clusters(x).split(1, -1)
        rare = [F.log_softmax(y, -1) + one for y, one in zip(rare, of_clusters, strict=True)]
        return torch.cat([shortlist, *rare], -1)


class TokenCache(DynamicCache):
    """Keys and values, and the ids of their positions [B, T] for models that read earlier ones."""

    seen_ids: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, as a beam search does."""
        super().reorder_cache(beam_idx)
        self._take(lambda ids: ids.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._take(lambda ids: ids.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._take(lambda ids: ids[indices])

    def _take(self, rows: Callable[[Tensor], Tensor]) -> None:
        if self.seen_ids is not None:
            self.seen_ids = rows(self.seen_ids)


class PreviousTokens(nn.Module):
    """Adds embeddings of the tokens before a position, weighted by feature."""

    def __init__(self, cfg: BD3LMConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(cfg.previous_tokens, cfg.hidden_dim))

    def forward(self, x: Tensor, embed: nn.Module, before: Tensor) -> Tensor:
        """Add to embeddings [B, T, D] those of ``before`` [N, B, T]; -1 is no token."""
        for ids, weight in zip(before, self.weight, strict=True):
            x = x + embed(ids.clamp(min=0)) * weight * (ids >= 0)[..., None]
        return x


class DITBackbone(nn.Module):
    """The network, with the published names."""

    def __init__(self, cfg: BD3LMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.vocab_embed = EmbeddingLayer(cfg.hidden_dim, cfg.vocab_size)
        self.previous = PreviousTokens(cfg) if cfg.previous_tokens else None
        self.embed_norm = Norm(cfg.hidden_dim, cfg.norm, cfg.norm_eps) if cfg.embed_norm else None
        if cfg.adaln:
            self.sigma_map = TimestepEmbedder(cfg.cond_dim)
        self.rotary_emb = Rotary(cfg)
        self.blocks = nn.ModuleList(DDiTBlock(cfg, layer) for layer in range(cfg.n_blocks))
        self.output_layer = DDiTFinalLayer(cfg)

    def forward(
        self,
        ids: Tensor,
        before: Tensor | None,
        mask: Tensor,
        position: Tensor,
        sigma: Tensor | None,
        cache: Any,
        kept: int | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of the first ``kept`` positions, and the residual stream around every block."""
        cond = None
        if self.cfg.adaln:
            if sigma is None or not self.cfg.time_conditioning:
                sigma = torch.zeros(1, 1, device=ids.device)
            cond = F.silu(self.sigma_map(sigma))
        x = self.vocab_embed(ids)
        if self.previous is not None:
            x = self.previous(x, self.vocab_embed, before)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        rope = self.rotary_emb(position, x.dtype)
        stream = [x]
        for block in self.blocks:
            x = block(x, rope, mask, cond, cache)
            stream.append(x)
        if cond is not None and cond.shape[1] > 1:
            cond = cond[:, :kept]
        return self.output_layer(x[:, :kept], cond), tuple(stream)


class BD3LM(PreTrainedModel, BlockDiffusionGeneration):
    """A BD3-LM, under the Auto class ``AutoModelForMaskedLM``.

    Without ``x0`` a position sees its own block and all earlier ones; blocks lie at k·S.
    """

    config_class = BD3LMConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["DDiTBlock"]  # noqa: RUF012 (the library's own style)
    _keys_to_ignore_on_load_unexpected = [r"sampling_eps_(min|max)"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config)
        self.backbone = DITBackbone(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, EmbeddingLayer):
            nn.init.normal_(module.embedding, std=0.02)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PreviousTokens):
            nn.init.zeros_(module.weight)

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        x0: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        block_size: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> BD3LMOutput | tuple[Tensor, ...]:
        """Logits of every position.

        Args:
            input_ids: [B, T], the mask id where a token is hidden.
            timesteps: sigma = -log(alpha) of every row [B], block [B, T/S] or position [B, T];
                read by time-conditioned models only. None: 0.
            x0: clean ids [B, T]; with them a block sees the clean blocks before it, as in
                training.
            attention_mask: 1 where a position may be attended to [B, cached + T]; None: all.
            labels: true ids [B, T], -100 where there is no loss; not shifted.
            cache: keys and values of a multiple of S positions; the T new ones are appended.
            past_key_values: its name before transformers 5.
            block_size: S; None: that of the configuration.
            output_hidden_states: also return the residual stream.
            return_dict: False returns a tuple.
            ignored: arguments of other models.
        """
        cache = cache if cache is not None else past_key_values
        size = self._block(block_size)
        first = 0 if cache is None else cache.get_seq_length()
        if first % size:
            raise ValueError(f"the cache holds {first} positions: must be a multiple of {size}")
        if x0 is not None and (cache is not None or attention_mask is not None):
            raise ValueError("x0: must be left out with a cache or an attention_mask")
        length, device = input_ids.shape[1], input_ids.device
        position = torch.arange(first + length, device=device)
        block = position // size
        mask = block[None] <= block[first:, None]
        sigma = _per_position(timesteps, length, size)
        ids, position = input_ids, position[first:]
        if x0 is not None:
            own, before = block[None] == block[:, None], block[None] < block[:, None]
            noised = torch.cat([own, before], 1)
            clean = torch.cat([torch.zeros_like(own), mask], 1)
            mask, ids = torch.cat([noised, clean]), torch.cat([input_ids, x0], 1)
            position = position.repeat(2)
            if sigma is not None:
                sigma = torch.cat([sigma, torch.zeros_like(sigma)], 1)
        mask = mask[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        before = self._tokens_before(input_ids, x0, cache, attention_mask, size)
        logits, stream = self.backbone(ids, before, mask, position, sigma, cache, length)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        hidden = stream if output_hidden_states else None
        out = BD3LMOutput(loss=loss, logits=logits, hidden_states=hidden, cache=cache)
        # None follows the configuration, as everywhere in transformers.
        wanted = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return out if wanted else out.to_tuple()

    def generate(self, *arguments: Any, **settings: Any) -> Tensor | BlockDiffusionOutput:
        """Continue prompts; see :meth:`BlockDiffusionGeneration.generate`.

        Raises:
            ValueError: an autoregressive model, scores that are no probabilities, or a model that
                reads the noise level.
        """
        cfg = self.config
        if cfg.causal or cfg.parameterization == "sedd" or cfg.time_conditioning:
            raise ValueError(
                f"causal = {cfg.causal}, parameterization = {cfg.parameterization}, "
                f"time_conditioning = {cfg.time_conditioning}: must be False, subs and False; "
                "other models are sampled by bd3lm-sample"
            )
        return super().generate(*arguments, **settings)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""
        return TokenCache()

    def block_logits(self, ids: Tensor, cache: DynamicCache, block_size: int) -> Tensor:
        """Logits [B, T, V] of the positions after the cached ones, which are appended to it."""
        return self(ids, cache=cache, block_size=block_size, return_dict=True).logits

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **settings: Any) -> None:
        """Save as every model of transformers, with a model card where there is none."""
        super().save_pretrained(save_directory, *arguments, **settings)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(_card(self.config), encoding="utf-8")

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.backbone.vocab_embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.backbone.output_layer.linear

    def _tokens_before(
        self, ids: Tensor, x0: Tensor | None, cache: Any, attention_mask: Tensor | None, size: int
    ) -> Tensor | None:
        """Ids before each position, the nearest first [N, B, T], or of both streams."""
        count = self.config.previous_tokens
        if not count:
            return None
        first, known = 0, ids
        if cache is not None:
            first = cache.get_seq_length()
            if first and getattr(cache, "seen_ids", None) is None:
                raise ValueError("cache: must be empty, or come from new_cache()")
            known = torch.cat([cache.seen_ids[:, :first], ids], 1) if first else ids
            cache.seen_ids = known
        if attention_mask is not None:
            known = known.masked_fill(attention_mask == 0, -1)
        before = _shifts(known, count)[..., first:]
        if x0 is None:
            return before
        inside = torch.arange(ids.shape[1], device=ids.device) % size
        distance = torch.arange(1, count + 1, device=ids.device)
        own = (inside >= distance[:, None])[:, None]
        clean = _shifts(x0, count)
        return torch.cat([torch.where(own, before, clean), clean], -1)

    def _block(self, block_size: int | None) -> int:
        if self.config.causal:
            return 1
        return block_size or self.config.block_size


BD3LMForMaskedLM = BD3LM
"""The class under transformers' usual name; its own is that of the published checkpoints."""


def _per_position(timesteps: Tensor | None, length: int, size: int) -> Tensor | None:
    """Sigma [B, T]."""
    if timesteps is None:
        return None
    if timesteps.ndim == 1:
        timesteps = timesteps[:, None]
    if timesteps.shape[1] == 1:
        return timesteps.expand(-1, length)
    return timesteps if timesteps.shape[1] == length else timesteps.repeat_interleave(size, 1)


def _shifts(ids: Tensor, count: int) -> Tensor:
    """Ids [B, T] one to N positions before, -1 where there is none, [N, B, T]."""
    length = ids.shape[1]
    return torch.stack([F.pad(ids, (n, 0), value=-1)[:, :length] for n in range(1, count + 1)])


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [B, H, T, Dh], the two halves against each other."""
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]


def _frequencies(cfg: BD3LMConfig) -> tuple[Tensor, float]:
    """Frequencies, float32 [Dh/2], and the factor of cosines and sines."""
    rope, width = cfg.rope_parameters, cfg.head_dim
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    kept = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if kind == "default":
        return kept.float(), 1.0
    stretched = kept / rope["factor"]
    if kind == "linear":
        return stretched.float(), 1.0
    turns = rope["original_max_position_embeddings"] * kept / (2 * math.pi)
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return ((1 - share) * stretched + share * kept).float(), 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type = {kind}: must be default, linear, llama3 or yarn")
    length = rope["original_max_position_embeddings"]
    first, last = (
        width * math.log(length / (rope[name] * 2 * math.pi)) / (2 * math.log(theta))
        for name in ("beta_fast", "beta_slow")
    )
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pair = torch.arange(width // 2, dtype=torch.float64)
    share = 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)
    factor = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
    return ((1 - share) * stretched + share * kept).float(), factor


def _card(cfg: BD3LMConfig) -> str:
    """Text of ``README.md``."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- bd3lm
- diffusion-language-model
---

# Block-diffusion language model

{cfg.block_size} tokens a block, {cfg.model_length} a row, width {cfg.hidden_dim},
{cfg.n_blocks} layers, {cfg.vocab_size} ids.

```python
from transformers import AutoModelForMaskedLM

model = AutoModelForMaskedLM.from_pretrained(NAME, trust_remote_code=True)
```
"""
