"""Shape of the Transformer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

from bd3lm.config.check import check, check_number, check_whole

LARGEST_WIDTH, LARGEST_DEPTH, LARGEST_VOCABULARY = 2**20, 2**14, 2**31 - 1
"""Beyond the sizes that any machine holds, and below those whose products overflow."""


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies, as Llama 3 and the YaRN paper define it."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """none; linear: every frequency divided by the factor; llama3, yarn: low frequencies only."""
    factor: float = 1.0
    """Factor by which the context has become longer."""
    original_length: int | None = None
    """Positions that the model was trained on before (llama3, yarn)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_length / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_length / this are kept."""
    beta_fast: float = 32.0
    """yarn: frequencies of more rotations than this over original_length are kept."""
    beta_slow: float = 1.0
    """yarn: frequencies of fewer rotations than this over original_length are stretched in full."""
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines. None: 0.1 log(factor) + 1."""
    truncate: bool = True
    """yarn: round the two boundaries to whole frequencies."""

    def __post_init__(self) -> None:
        name = "model.rope-scaling."
        check_number(name + "factor", self.factor, 1)
        for field_name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, field_name)
            check_number(name + field_name.replace("_", "-"), value, 0, interval="()")
        if self.attention_factor is not None:
            check_number(name + "attention-factor", self.attention_factor, 0, interval="()")
        if self.original_length is not None:
            check_whole(name + "original-length", self.original_length, 1)
        check(
            self.kind != "none" or self.factor == 1.0,
            name + "factor",
            self.factor,
            f"1 with {name}kind = none",
        )
        needs = self.kind in ("llama3", "yarn")
        length = self.original_length
        check(
            length is not None and length >= 1 if needs else length is None,
            name + "original-length",
            length,
            "at least 1" if needs else f"None with {name}kind = {self.kind}",
        )
        check(
            0.0 < self.low_freq_factor < self.high_freq_factor,
            name + "high-freq-factor",
            self.high_freq_factor,
            f"greater than {name}low-freq-factor = {self.low_freq_factor}, which is positive",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer: the DiT of the BD3-LM paper, or a Llama-like decoder."""

    width: int = 256
    """D, features of the residual stream."""
    depth: int = 8
    """Number of blocks."""
    heads: int = 8
    """H, query heads; divides the width."""
    kv_heads: int | None = None
    """Key/value heads; divides the heads. None: as many as heads."""
    head_dim: int | None = None
    """Dh, features of a head; even. None: width / heads."""
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """Nonlinearity of the MLP: tanh-approximated GELU, SwiGLU or squared ReLU."""
    mlp_width: int | None = None
    """Hidden features of the MLP. None: four times the width."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation; both have a weight and no bias."""
    norm_eps: float = 1e-5
    """Added to the variance inside every norm."""
    qk_norm: bool = False
    """Normalise queries and keys of each head before the rotation."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    nope_layers: tuple[int, ...] = ()
    """Blocks, counted from 0, whose queries and keys are not rotated (SmolLM3)."""
    qkv_bias: bool = False
    """Biases of the queries, keys and values."""
    out_bias: bool = False
    """Bias of the projection after attention."""
    mlp_bias: bool = True
    """Biases in the MLP."""
    head_bias: bool = True
    """Bias of the output head."""
    tied_embeddings: bool = False
    """Output head shares the embedding matrix."""
    vocab_size: int | None = None
    """V, rows of the embedding. None: one for every id of the tokenizer. More: the rest pads."""
    embed_norm: bool = False
    """Normalise the embeddings before the first block."""
    softmax_cutoffs: tuple[int, ...] = ()
    """First ids of the clusters of an adaptive softmax. The head first predicts a token below the
    first cutoff or a cluster. The tokens of a cluster are scored only where the target is one of
    them, so training is faster where small ids are frequent, as in BPE. A GPU's host waits for the
    number of tokens in each cluster. Cutoffs from V on are left out. Empty: one softmax over the
    whole vocabulary."""
    cond_width: int = 0
    """Width of the adaLN conditioning vector; 0 removes adaLN."""
    time_conditioning: bool = False
    """Feed the noise level to adaLN; otherwise adaLN sees a constant."""
    clean_stream: Literal["block", "causal"] = "block"
    """Attention among clean tokens: block: they see their whole block, as in the BD3-LM paper;
    causal: no later token, so the model is an autoregressive one as well (objective.ar-weight)."""
    token_shift: bool = False
    """Predict a token from the position before it, as an autoregressive model does. For the first
    token of a block that is the clean token before the block."""
    previous_tokens: int = 0
    """Number of tokens before a position whose embeddings are added to its own, each scaled by a
    learned vector. Inside a block they are those of the noised stream."""
    dropout: float = 0.0
    """Dropout after attention and MLP, while training."""

    def __post_init__(self) -> None:
        for name, high in (("width", LARGEST_WIDTH), ("depth", LARGEST_DEPTH)):
            check_whole(f"model.{name}", getattr(self, name), 1, high)
        check_whole("model.heads", self.heads, 1, LARGEST_WIDTH)
        if self.mlp_width is not None:
            check_whole("model.mlp-width", self.mlp_width, 1, LARGEST_WIDTH)
        check_number("model.norm-eps", self.norm_eps, 0, 1, interval="()")
        check_number("model.rope-theta", self.rope_theta, 0, interval="()")
        if self.head_dim is None:
            check(
                self.width % self.heads == 0,
                "model.heads",
                self.heads,
                f"a divisor of model.width = {self.width} where model.head-dim is None",
            )
            check(
                self.width // self.heads % 2 == 0,
                "model.heads",
                self.heads,
                f"such that model.width / heads is even, for rotary embeddings; "
                f"width = {self.width}",
            )
        else:
            check_whole("model.head-dim", self.head_dim, 2, LARGEST_WIDTH)
            even = self.head_dim % 2 == 0
            check(even, "model.head-dim", self.head_dim, "even, for rotary embeddings")
        if self.kv_heads is not None:
            check_whole("model.kv-heads", self.kv_heads, 1)
            check(
                self.heads % self.kv_heads == 0,
                "model.kv-heads",
                self.kv_heads,
                f"a divisor of model.heads = {self.heads}",
            )
        for layer in self.nope_layers:
            check(
                0 <= layer < self.depth,
                "model.nope-layers",
                self.nope_layers,
                f"blocks in [0, {self.depth})",
            )
        if self.vocab_size is not None:
            check_whole("model.vocab-size", self.vocab_size, 1, LARGEST_VOCABULARY)
        cutoffs, field_name = self.softmax_cutoffs, "model.softmax-cutoffs"
        for cutoff in cutoffs:
            check_whole(field_name, cutoff, 1)
        increase = all(low < high for low, high in itertools.pairwise(cutoffs))
        check(increase, field_name, cutoffs, "whole numbers of at least 1 in increasing order")
        check_number("model.dropout", self.dropout, 0, 1, interval="[)")
        check_whole("model.cond-width", self.cond_width, 0, LARGEST_WIDTH)
        check_whole("model.previous-tokens", self.previous_tokens, 0, 16)
        check(
            self.cond_width > 0 or not self.time_conditioning,
            "model.time-conditioning",
            self.time_conditioning,
            "False where model.cond-width = 0",
        )

    @property
    def causal_clean(self) -> bool:
        """Return whether clean tokens attend causally."""
        return self.clean_stream == "causal"

    @property
    def hidden(self) -> int:
        """Hidden features of the MLP."""
        return self.mlp_width or 4 * self.width

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, the default resolved."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """Features of one head, the default resolved."""
        return self.head_dim or self.width // self.heads
