"""Configuration of a BD3-LM, with the keys of the published checkpoints and some more.

This file is copied into the folder of exported weights.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig  # pyright: ignore[reportMissingImports]


class BD3LMConfig(PretrainedConfig):
    """Shape of a block-diffusion language model.

    The defaults of the keys that the published checkpoints do not have describe their DiT.

    Args:
        block_size: S; model_length is diffusion over the whole row.
        vocab_size: V, the mask token included.
        model_length: L, positions of a row.
        cross_attn: trained with a clean stream next to the noised one.
        causal: autoregressive; then the logits of a position are those of the next token.
        adaln: adaptive LayerNorm.
        attn_backend: read by the original's code only.
        hidden_dim: D.
        cond_dim: width of the conditioning.
        n_blocks: layers.
        n_heads: query heads.
        dropout: after attention and MLP, while training.
        time_conditioning: adaLN reads the noise level.
        var_min: the noise was clipped to a range that is among the weights.
        parameterization: ``subs`` (masked diffusion), ``sedd`` or ``ar``.
        n_kv_heads: key/value heads; None: as many as heads.
        head_dim: features of a head; None: hidden_dim / n_heads.
        mlp: ``gelu``, ``relu2`` or ``swiglu``.
        mlp_dim: hidden features of the MLP; None: four times hidden_dim.
        norm: ``layernorm`` or ``rmsnorm``.
        norm_eps: added to the variance.
        qk_norm: normalise queries and keys of each head before the rotation.
        rope_parameters: base and scaling of the rotations, as transformers 5 writes them.
        nope_layers: layers without rotations.
        mlp_bias: biases in the MLP.
        head_bias: bias of the output head.
        qkv_bias: biases of queries, keys and values.
        out_bias: bias of the projection after attention.
        tied_embeddings: head and embedding were one matrix; they are stored, and trained, apart.
        embed_norm: normalise the embeddings before the first block.
        softmax_cutoffs: first ids of the clusters of an adaptive softmax; None: one softmax.
        previous_tokens: number of tokens before a position whose embeddings are added to its own.
        mask_token_id: the mask; None: the last id.
        others: of every configuration of transformers.
    """

    model_type = "bd3lm"
    attribute_map = {  # noqa: RUF012 (the library's own style)
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    def __init__(
        self,
        block_size: int = 1,
        vocab_size: int = 50_258,
        model_length: int = 1024,
        cross_attn: bool = True,
        causal: bool = False,
        adaln: bool = True,
        attn_backend: str = "sdpa",
        hidden_dim: int = 768,
        cond_dim: int = 128,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: float = 0.1,
        time_conditioning: bool = False,
        var_min: bool = True,
        parameterization: str = "subs",
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp: str = "gelu",
        mlp_dim: int | None = None,
        norm: str = "layernorm",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        rope_parameters: dict[str, Any] | None = None,
        nope_layers: list[int] | None = None,
        mlp_bias: bool = True,
        head_bias: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        tied_embeddings: bool = False,
        embed_norm: bool = False,
        softmax_cutoffs: list[int] | None = None,
        previous_tokens: int = 0,
        mask_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.block_size, self.vocab_size, self.model_length = block_size, vocab_size, model_length
        self.cross_attn, self.causal, self.adaln = cross_attn, causal, adaln
        self.attn_backend = attn_backend
        self.hidden_dim, self.cond_dim = hidden_dim, cond_dim
        self.n_blocks, self.n_heads = n_blocks, n_heads
        self.dropout, self.time_conditioning, self.var_min = dropout, time_conditioning, var_min
        self.parameterization = parameterization
        self.n_kv_heads = n_kv_heads or n_heads
        self.head_dim = head_dim or hidden_dim // n_heads
        self.mlp, self.mlp_dim = mlp, mlp_dim or 4 * hidden_dim
        self.norm, self.norm_eps, self.qk_norm = norm, norm_eps, qk_norm
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        self.nope_layers = list(nope_layers or [])
        self.mlp_bias, self.head_bias = mlp_bias, head_bias
        self.qkv_bias, self.out_bias = qkv_bias, out_bias
        self.tied_embeddings = tied_embeddings
        self.embed_norm = embed_norm
        self.softmax_cutoffs = list(softmax_cutoffs or [])
        self.previous_tokens = previous_tokens
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        others["tie_word_embeddings"] = False
        super().__init__(**others)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, others.get(name))  # transformers 5 sets only those that are given
