"""Configuration of an SDAR model: Qwen3 with attention that is bidirectional within blocks.

This file is copied into the folder of exported weights.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig  # pyright: ignore[reportMissingImports]


class SDARConfig(PretrainedConfig):
    """Shape of an SDAR model, with the keys of the published checkpoints."""

    model_type = "sdar"

    def __init__(
        self,
        vocab_size: int = 151_936,
        hidden_size: int = 2560,
        intermediate_size: int = 9728,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32_768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        rope_theta: float = 10_000.0,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        block_size: int = 4,
        mask_token_id: int = 151_669,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **others,
        )
        if hidden_act != "silu":
            raise ValueError(f"hidden_act = {hidden_act}: must be silu")
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim, self.hidden_act = head_dim, hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range, self.rms_norm_eps = initializer_range, rms_norm_eps
        self.use_cache, self.attention_bias = use_cache, attention_bias
        self.attention_dropout = attention_dropout
        # SGLang reads rope_theta; transformers 5 itself keeps it in rope_parameters only.
        self.rope_theta = rope_theta
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        if not hasattr(type(self), "rope_scaling"):  # before transformers 5
            self.rope_scaling = None
        self.block_size, self.mask_token_id = block_size, mask_token_id
        # transformers 5 sets only those of them that are given.
        self.pad_token_id, self.bos_token_id = pad_token_id, bos_token_id
        self.eos_token_id = eos_token_id
