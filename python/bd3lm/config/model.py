"""Shape of the Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check


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
    mlp_bias: bool = True
    """Biases in the MLP."""
    head_bias: bool = True
    """Bias of the output head."""
    tied_embeddings: bool = False
    """Output head shares the embedding matrix."""
    cond_width: int = 0
    """Width of the adaLN conditioning vector; 0 removes adaLN."""
    time_conditioning: bool = False
    """Feed the noise level to adaLN; otherwise adaLN sees a constant."""
    dropout: float = 0.0
    """Dropout after attention and MLP, while training."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        check(
            self.width % self.heads == 0,
            "model.heads",
            self.heads,
            f"a divisor of model.width = {self.width}",
        )
        check(
            self.width // self.heads % 2 == 0,
            "model.heads",
            self.heads,
            f"such that model.width / heads is even, for rotary embeddings; width = {self.width}",
        )
        if self.kv_heads is not None:
            check(
                self.kv_heads >= 1 and self.heads % self.kv_heads == 0,
                "model.kv-heads",
                self.kv_heads,
                f"a divisor of model.heads = {self.heads}",
            )
        check(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "in [0, 1)")
        check(self.cond_width >= 0, "model.cond-width", self.cond_width, "0 (no adaLN) or more")
        check(
            self.cond_width > 0 or not self.time_conditioning,
            "model.time-conditioning",
            self.time_conditioning,
            "False where model.cond-width = 0",
        )

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
        """Features of one head."""
        return self.width // self.heads
