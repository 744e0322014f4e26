"""Every setting, as a tree of frozen dataclasses; data only, checked where it is made.

Presets are functions that return a :class:`TrainConfig`; the command line is derived from the
types here, and each run writes its resolved tree to ``config.json``.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from bd3lm.errors import ConfigError

T = TypeVar("T")

ScheduleName = Literal[
    "loglinear", "square", "square_root", "logarithmic", "cosine", "gaussian", "bimodal_gaussian"
]
EstimatorName = Literal["exact", "stratified", "count", "bernoulli"]

MAX_EXACT_BLOCK = 4
"""Largest S whose 2^S - 1 masks are all run by the exact estimator."""


def check(condition: bool, field_name: str, value: object, allowed: str) -> None:
    """Raise :class:`ConfigError` naming the field, its value and what is allowed."""
    if not condition:
        raise ConfigError(field_name, value, allowed)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Transformer; enough to describe the paper's DiT and a Llama or Qwen3."""

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
            f"leaves an even head width, for rotations, of model.width = {self.width}",
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
            "needs model.cond-width > 0",
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


@dataclass(frozen=True)
class NoiseConfig:
    """How training batches are noised: MATH §2 (schedules), §3 (weightings), §4 (estimators)."""

    estimator: Literal["count", "bernoulli", "full"] = "count"
    """count: draw the number of masked tokens of each block (MATH §4.2, least variance);
    bernoulli: a noise level and independent masks (the paper's); full: mask everything."""
    schedule: ScheduleName = "loglinear"
    """Mask probability p(t). `count` without a clip is the same for every schedule."""
    clip: tuple[float, float] | None = None
    """Restrict t to U[a, b]: a training objective, never a likelihood."""
    resample: bool = False
    """With a clip: also force each block's masked fraction into [a, b]."""
    mu: float = 0.5
    """gaussian, bimodal_gaussian: mean of the (first) component."""
    sigma: float = 0.2
    """gaussian, bimodal_gaussian: deviation of the (first) component; the paper is silent."""
    mu2: float = 0.8
    """bimodal_gaussian: mean of the second component; the paper is silent."""
    sigma2: float = 0.2
    """bimodal_gaussian: deviation of the second component; the paper is silent."""
    mixture: float = 0.6
    """bimodal_gaussian: weight of the first component."""
    weighting: Literal["nelbo", "edm", "iddpm", "sigmoid", "flow_matching", "simple"] = "nelbo"
    """Loss reweighting while training; likelihoods always use nelbo."""
    weighting_k: float = 0.0
    """Shift k of the sigmoid weighting."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, learning-rate schedule and weight averaging."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the blocks' matrices, AdamW for everything else."""
    lr: float = 3e-4
    """AdamW learning rate."""
    matrix_lr: float = 0.02
    """Muon learning rate (unused by adamw)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decays."""
    eps: float = 1e-8
    """AdamW denominator offset."""
    weight_decay: float = 0.0
    """Decoupled weight decay of every matrix."""
    momentum: float = 0.95
    """Muon momentum (Nesterov)."""
    warmup_steps: int = 2500
    """Steps of linear warm-up."""
    decay_fraction: float = 0.0
    """Last share of the steps in which the learning rate falls linearly to zero."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    ema_decay: float = 0.9999
    """Weight average: min(decay, (1+n)/(10+n)) after n steps (MATH §1)."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", self.lr, "greater than 0")
        check(self.matrix_lr > 0, "optim.matrix-lr", self.matrix_lr, "greater than 0")
        check(self.warmup_steps >= 0, "optim.warmup-steps", self.warmup_steps, "0 or more")
        check(
            0 <= self.decay_fraction <= 1, "optim.decay-fraction", self.decay_fraction, "in [0, 1]"
        )
        check(self.grad_clip > 0, "optim.grad-clip", self.grad_clip, "greater than 0")
        check(0 <= self.ema_decay < 1, "optim.ema-decay", self.ema_decay, "in [0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    """Validation during and after training, always with the averaged weights."""

    every: int = 0
    """Steps between quick validations; 0: only at the end."""
    rows: int = 64
    """Rows of a quick validation."""
    estimator: Literal["auto"] | EstimatorName = "auto"
    """auto: exact up to S = 4, stratified above."""
    repeats: int = 8
    """Forwards of the sampled estimators."""
    stride: int | None = None
    """Score only the last `stride` tokens of each row, so that every token but those of the
    first row is seen with seq_len - stride tokens of context. None: rows do not overlap."""
    batch_size: int = 64
    """Rows a forward."""

    def resolve(self, block_size: int) -> EstimatorName:
        """The estimator, ``auto`` resolved for this block size."""
        if self.estimator != "auto":
            return self.estimator
        return "exact" if block_size <= MAX_EXACT_BLOCK else "stratified"


@dataclass(frozen=True)
class SampleConfig:
    """Sampling (MATH §8)."""

    num: int = 4
    """Samples."""
    length: int = 128
    """Largest number of tokens, prompt and BOS included."""
    top_p: float = 0.9
    """Nucleus; 1 samples from the whole distribution."""
    temperature: float = 1.0
    """0 is greedy."""
    seed: int = 1
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check(self.num >= 1, "num", self.num, "at least 1")
        check(self.length >= 2, "length", self.length, "at least 2 (BOS and one token)")
        check(0 < self.top_p <= 1, "top-p", self.top_p, "in (0, 1]")
        check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str | None = None
    """Training data: a prepared directory, or a text file (txt, jsonl, parquet; gz, xz, zst).
    None: the English text shipped with the package."""
    valid: str | None = None
    """Validation data, likewise. None: `valid/` inside `data`, or a share of its documents."""
    tokenizer: str = "default"
    """For text that has yet to be tokenized: default, a file, a folder or a hub name."""
    packing: Literal["wrap", "aligned", "best_fit"] = "wrap"
    """wrap: concatenate and cut; aligned: documents start on block boundaries; best_fit:
    documents whole where they fit."""
    row_eos: bool = False
    """wrap: close every row with EOS, as the paper's code does."""
    system: Literal["bd3lm"] = "bd3lm"
    """What is trained."""
    seq_len: int = 128
    """L, tokens of a row."""
    block_size: int = 4
    """S, tokens of a block; divides seq_len. 1 is token by token, seq_len is plain diffusion."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 512
    """Rows of an optimizer step."""
    micro_batch: int | None = None
    """Rows of one forward (gradient accumulation). None: the whole batch at once."""
    seed: int = 1
    """Seed of weights, order and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the device has it."""
    attention: Literal["auto", "cuda", "flash", "flex", "rust", "dense"] = "auto"
    """What computes attention. auto: our kernels for CUDA or the CPU, else flex or dense."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    model: ModelConfig = field(default_factory=ModelConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        for name in (
            "seq_len",
            "block_size",
            "steps",
            "batch_size",
            "log_every",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            check(value >= 1, name.replace("_", "-"), value, "at least 1")
        check(self.seq_len >= 2, "seq-len", self.seq_len, "at least 2 (BOS and one token)")
        check(
            self.seq_len % self.block_size == 0,
            "block-size",
            self.block_size,
            f"a divisor of seq-len = {self.seq_len}",
        )
        if self.micro_batch is not None:
            check(
                self.micro_batch >= 1 and self.batch_size % self.micro_batch == 0,
                "micro-batch",
                self.micro_batch,
                f"a divisor of batch-size = {self.batch_size}",
            )
        check(
            self.eval.estimator != "exact" or self.block_size <= MAX_EXACT_BLOCK,
            "eval.estimator",
            self.eval.estimator,
            f"exact needs block-size <= {MAX_EXACT_BLOCK} (here {self.block_size}); use stratified",
        )
        if self.eval.stride is not None:
            check(
                self.eval.stride % self.block_size == 0 and 0 < self.eval.stride < self.seq_len,
                "eval.stride",
                self.eval.stride,
                f"a multiple of block-size = {self.block_size} below seq-len = {self.seq_len}",
            )


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config dataclass from :func:`to_dict`; unknown and missing names are errors.

    Raises:
        ConfigError: a name that the dataclass does not have, or a value it does not allow.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        check(name in known, name, values[name], f"not a setting of {kind.__name__}")
    return kind(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast("type[Any]", hint), value)
    if isinstance(value, list):
        return tuple(value)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


# --- presets ------------------------------------------------------------------------------------


def _paper(width: int, depth: int, heads: int, cond_width: int) -> TrainConfig:
    """The paper's shapes and recipe (PROTOCOL: 3e-4, 2,500-step warm-up, EMA 0.9999)."""
    return TrainConfig(
        model=ModelConfig(
            width=width, depth=depth, heads=heads, cond_width=cond_width, dropout=0.1
        ),
        noise=NoiseConfig(estimator="bernoulli"),
        optim=OptimConfig(),
    )


def tiny() -> TrainConfig:
    """The paper's tiny DiT (width 256, depth 8) with the paper's recipe."""
    return _paper(256, 8, 8, 64)


def small() -> TrainConfig:
    """The paper's small DiT (width 768, depth 12) with the paper's recipe."""
    return _paper(768, 12, 12, 128)


def medium() -> TrainConfig:
    """The paper's medium DiT (width 1024, depth 24) with the paper's recipe."""
    return _paper(1024, 24, 16, 128)


def demo() -> TrainConfig:
    """Minutes on two cores: a small model, Muon, the low-variance `count` estimator."""
    return TrainConfig(
        steps=1400,
        batch_size=8,
        checkpoint_every=350,
        log_every=10,
        model=ModelConfig(
            width=192,
            depth=3,
            heads=3,
            mlp="relu2",
            qk_norm=True,
            mlp_bias=False,
            head_bias=False,
            tied_embeddings=True,
        ),
        optim=OptimConfig(
            optimizer="muon",
            lr=0.01,
            matrix_lr=0.02,
            betas=(0.9, 0.95),
            warmup_steps=40,
            decay_fraction=0.6,
            ema_decay=0.98,
        ),
        eval=EvalConfig(every=350),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "tiny": tiny,
    "small": small,
    "medium": medium,
}


def preset(name: str) -> TrainConfig:
    """The preset of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    return PRESETS[name]()
