"""SDAR in plain PyTorch, for transformers 4.57 and 5: block diffusion on the tensors of Qwen3.

This file is copied into the folder of exported weights, so it imports nothing but PyTorch,
transformers and the files next to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.utils import ModelOutput  # pyright: ignore[reportMissingImports]

from .block_generation import BlockDiffusionGeneration
from .configuration_sdar import SDARConfig


@dataclass
class SDAROutput(ModelOutput):
    """Output of the models here.

    Attributes:
        loss: mean cross-entropy of the labels, in nats.
        logits: [B, T, V].
        last_hidden_state: normalised features [B, T, D].
        cache: keys and values, with those of this call; also as ``past_key_values``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Any = None

    @property
    def past_key_values(self) -> Any:
        """The cache under its name before transformers 5."""
        return self.cache


class SDARRMSNorm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class SDARAttention(nn.Module):
    """Grouped-query attention; heads are normalised before the rotation."""

    def __init__(self, cfg: SDARConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        self.groups = cfg.num_attention_heads // cfg.num_key_value_heads
        self.dropout = cfg.attention_dropout
        widths = (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads)
        q, k, v = (n * cfg.head_dim for n in widths)
        bias = cfg.attention_bias
        self.q_proj = nn.Linear(cfg.hidden_size, q, bias=bias)
        self.k_proj = nn.Linear(cfg.hidden_size, k, bias=bias)
        self.v_proj = nn.Linear(cfg.hidden_size, v, bias=bias)
        self.o_proj = nn.Linear(q, cfg.hidden_size, bias=bias)
        self.q_norm = SDARRMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.k_norm = SDARRMSNorm(cfg.head_dim, cfg.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Attend from [B, T, D] to the cached positions and to itself."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = _rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), rope)
        k = _rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), rope)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SDARMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: SDARConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SDARDecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, cfg: SDARConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = SDARRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SDARAttention(cfg, layer)
        self.post_attention_layernorm = SDARRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SDARMLP(cfg)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """One layer on [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class SDARPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = SDARConfig
    base_model_prefix = "model"
    _no_split_modules = ["SDARDecoderLayer"]  # noqa: RUF012 (the library's own style)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, SDARRMSNorm):
            nn.init.ones_(module.weight)


class SDARModel(SDARPreTrainedModel):
    """Token ids to normalised features.

    A position attends to its own block and to all earlier ones; blocks lie at absolute positions
    k·S. With S = 1 this is causal attention.
    """

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(SDARDecoderLayer(config, layer) for layer in layers)
        self.norm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        block_size: int | None = None,
        **ignored: Any,
    ) -> SDAROutput:
        """Encode one stream.

        Args:
            input_ids: [B, T], the positions after the cached ones.
            attention_mask: 1 where a position may be attended to [B, cached + T]; None: all.
            past_key_values: cache of a multiple of S positions; the T new ones are appended.
            cache: its name since transformers 5.
            inputs_embeds: [B, T, D] in place of ``input_ids``.
            use_cache: return a new cache where none is given.
            block_size: S; None: that of the configuration.
            ignored: arguments of other models (``output_attentions``, …).
        """
        h: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache if cache is not None else past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        first = 0 if cache is None else cache.get_seq_length()
        size = block_size or self.config.block_size
        if first % size:
            raise ValueError(f"the cache holds {first} positions: must be a multiple of {size}")
        length, device = h.shape[1], h.device
        position = torch.arange(first + length, device=device)
        mask = (position[None] // size <= position[first:, None] // size)[None, None]
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        rope = _rope(position[first:], self.config, h.dtype)
        for layer in self.layers:
            h = layer(h, rope, mask, cache)
        return SDAROutput(last_hidden_state=self.norm(h), cache=cache)


class SDARForCausalLM(BlockDiffusionGeneration, SDARPreTrainedModel):
    """SDAR with its output head; the logits of a position are those of its own token."""

    def __init__(self, config: SDARConfig) -> None:
        if config.tie_word_embeddings:
            raise ValueError("tie_word_embeddings = True: must be False, engines read lm_head")
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **arguments: Any,
    ) -> SDAROutput:
        """Logits [B, T, V], or of the last ``logits_to_keep`` positions.

        Args:
            input_ids: [B, T], the mask id where a token is hidden.
            labels: true ids [B, T], -100 where there is no loss; not shifted.
            logits_to_keep: 0 keeps all.
            arguments: of :meth:`SDARModel.forward`.
        """
        out = self.model(input_ids, **arguments)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return SDAROutput(loss=loss, logits=logits, cache=out.cache)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""
        return DynamicCache()

    def block_logits(self, ids: Tensor, cache: DynamicCache, block_size: int) -> Tensor:
        """Logits [B, T, V] of the positions after the cached ones, which are appended to it."""
        return self(ids, cache=cache, block_size=block_size).logits

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head


def _rope(position: Tensor, cfg: SDARConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, Dh] of the positions, from float32 angles."""
    even = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device=position.device)
    angle = position[:, None].float() * cfg.rope_theta ** (-even / cfg.head_dim)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads [B, H, T, Dh], the two halves against each other."""
    a, b = x.chunk(2, -1)
    return x * rope[0] + torch.cat([-b, a], -1) * rope[1]
