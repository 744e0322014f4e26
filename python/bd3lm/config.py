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
SystemName = Literal["bd3lm", "mdlm", "sedd", "ar"]
AttentionName = Literal["auto", "cuda", "flash", "flex", "rust", "dense"]
EstimatorName = Literal["exact", "stratified", "count", "bernoulli"]

DetokenizerName = Literal["lm1b", "wikitext", "ptb", "lambada", "scientific_papers"]

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
    """bernoulli with a clip: also force each block's masked fraction into [a, b]."""
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
    paper_weights: bool = False
    """bimodal_gaussian: the paper's Eq. 5-7 literally, which count the bound twice; training with
    bernoulli and no clip only."""
    clip_search: bool = False
    """At every validation, go on with the clip under which this estimator's NELBO varies least
    between blocks (MATH §6)."""
    fit_counts: bool = False
    """count: learn q(k) from the training losses, for least variance (MATH §6)."""
    frequency_gap: float = 0.0
    """bernoulli: mask rare tokens more often: the exponent of the mask probability falls from
    1 + gap for the commonest to 1 - gap for the rarest token of the training data. 0: off."""
    weighting: Literal["nelbo", "edm", "iddpm", "sigmoid", "flow_matching", "simple"] = "nelbo"
    """Loss reweighting while training; likelihoods always use nelbo."""
    weighting_k: float = 0.0
    """Shift k of the sigmoid weighting."""

    def __post_init__(self) -> None:
        check(
            self.estimator != "full"
            or (self.clip is None and not self.clip_search and self.weighting == "nelbo"),
            "noise.estimator",
            "full",
            "masks everything with weight 1; clips and weightings go with bernoulli or count",
        )
        check(
            not self.resample or self.estimator == "bernoulli",
            "noise.resample",
            self.resample,
            "goes with noise.estimator = bernoulli",
        )
        gap = self.frequency_gap
        check(0 <= gap < 1, "noise.frequency-gap", gap, "in [0, 1)")
        check(
            gap == 0 or (self.estimator == "bernoulli" and not self.resample),
            "noise.frequency-gap",
            gap,
            "masking by frequency goes with noise.estimator = bernoulli, without resample",
        )
        check(
            not self.fit_counts or self.estimator == "count",
            "noise.fit-counts",
            self.fit_counts,
            "goes with noise.estimator = count",
        )
        check(
            not self.paper_weights or self.schedule == "bimodal_gaussian",
            "noise.paper-weights",
            self.paper_weights,
            "goes with noise.schedule = bimodal_gaussian",
        )
        check(
            not self.paper_weights or not self.clip_search,
            "noise.clip-search",
            self.clip_search,
            "goes without noise.paper-weights, whose p(t) has no inverse",
        )
        check(
            not self.clip_search or gap == 0,
            "noise.clip-search",
            self.clip_search,
            "one pass finds no clip where tokens are masked by frequency; use a fixed clip",
        )


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


@dataclass(frozen=True)
class SampleConfig:
    """Sampling (MATH §8)."""

    num: int = 4
    """Samples."""
    length: int | None = None
    """Largest number of tokens, prompt and BOS included. None: the trained length."""
    steps: int | None = None
    """None: first hitting, one forward a token. N: ancestral sampling on a grid of N levels a
    block; sedd needs one and takes seq_len where nothing is said."""
    tokens_per_forward: int = 1
    """First hitting: tokens revealed by one forward. More than 1 is faster and no longer exact:
    the tokens of one forward do not see each other."""
    threshold: float | None = None
    """Parallel decoding: each forward also reveals every position whose top probability is at
    least this. 1 is plain first hitting."""
    entropy_bound: float | None = None
    """Parallel decoding: each forward also reveals positions from the surest on, while the
    entropies of all but the least sure add up to at most this many nats."""
    top_p: float = 0.9
    """Nucleus; 1 samples from the whole distribution."""
    top_k: int | None = None
    """Only the k most probable tokens. None: all."""
    temperature: float = 1.0
    """0 is greedy."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens the row already holds, multiplies the negative ones."""
    forbidden: tuple[int, ...] = ()
    """Token ids that are never drawn."""
    seed: int = 1
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check(self.num >= 1, "num", self.num, "at least 1")
        check(
            self.length is None or self.length >= 2,
            "length",
            self.length,
            "at least 2 (BOS and one token)",
        )
        check(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        per = self.tokens_per_forward
        check(per >= 1, "tokens-per-forward", per, "at least 1")
        check(
            self.threshold is None or 0 < self.threshold <= 1,
            "threshold",
            self.threshold,
            "in (0, 1]",
        )
        bound = self.entropy_bound
        check(bound is None or bound >= 0, "entropy-bound", bound, "0 or more")
        ways = [self.steps is not None, per > 1, self.threshold is not None, bound is not None]
        check(
            sum(ways) <= 1,
            "steps, tokens-per-forward, threshold, entropy-bound",
            "several",
            "one of them at a time",
        )
        check(0 < self.top_p <= 1, "top-p", self.top_p, "in (0, 1]")
        check(self.top_k is None or self.top_k >= 1, "top-k", self.top_k, "at least 1")
        check(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        penalty = self.repetition_penalty
        check(penalty > 0, "repetition-penalty", penalty, "greater than 0")

    @property
    def adaptive(self) -> bool:
        """Whether what the model says decides how many tokens a forward reveals."""
        return self.threshold is not None or self.entropy_bound is not None


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str | None = None
    """Training data: a prepared directory, a text file (txt, jsonl, parquet; gz, xz, zst), or a
    data set of the Hugging Face hub: hub:openwebtext, hub:lm1b, hub:PATH[:CONFIG]@SPLIT.
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
    system: SystemName = "bd3lm"
    """bd3lm: block diffusion; mdlm: masked diffusion over the whole row; sedd: score entropy over
    the whole row; ar: one token after the other."""
    seq_len: int = 128
    """L, tokens of a row."""
    block_size: int | None = None
    """S, tokens of a block; divides seq_len. 1 is token by token, seq_len is plain diffusion.
    None: 4 for bd3lm; the others have one that is theirs (seq_len for mdlm and sedd, 1 for ar)."""
    init_from: str | None = None
    """Start from the averaged weights of this checkpoint, whatever its system or block size: one
    of ours, or the original implementation's, in a directory or by its name on the hub."""
    init_optimizer: bool = False
    """With init_from: also take over its optimizer's state."""
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
    attention: AttentionName = "auto"
    """What computes attention. auto: our kernels for CUDA or the CPU, else flex or dense."""
    recompute: bool = False
    """Keep only the residual stream of each block and compute the rest again in the backward pass
    (activation checkpointing): less memory, more time, the same gradients."""
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
        for name in ("seq_len", "steps", "batch_size", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            check(value >= 1, name.replace("_", "-"), value, "at least 1")
        check(self.seq_len >= 2, "seq-len", self.seq_len, "at least 2 (BOS and one token)")
        self._check_block()
        check(
            self.init_from is not None or not self.init_optimizer,
            "init-optimizer",
            self.init_optimizer,
            "needs init-from",
        )
        if self.micro_batch is not None:
            check(
                self.micro_batch >= 1 and self.batch_size % self.micro_batch == 0,
                "micro-batch",
                self.micro_batch,
                f"a divisor of batch-size = {self.batch_size}",
            )
        told = self.model.time_conditioning
        check_estimator(self.estimator, self.block, self.eval.repeats, told, "eval.")
        if self.eval.stride is not None:
            check(
                self.eval.stride % self.block == 0 and 0 < self.eval.stride < self.seq_len,
                "eval.stride",
                self.eval.stride,
                f"a multiple of block-size = {self.block} below seq-len = {self.seq_len}",
            )
            check(
                self.packing == "wrap" and not self.row_eos,
                "eval.stride",
                self.eval.stride,
                "goes with packing = wrap without row-eos: other rows do not overlap",
            )
        check(
            self.packing == "wrap" or not self.row_eos,
            "row-eos",
            self.row_eos,
            f"goes with packing = wrap, not {self.packing}",
        )

    def _check_block(self) -> None:
        own = _own_block(self.system, self.seq_len)
        check(
            self.block_size is None or own is None or self.block_size == own,
            "block-size",
            self.block_size,
            f"{own}, the one that system = {self.system} has",
        )
        check(self.block >= 1, "block-size", self.block, "at least 1")
        check(
            self.seq_len % self.block == 0,
            "block-size",
            self.block,
            f"a divisor of seq-len = {self.seq_len}",
        )

    @property
    def block(self) -> int:
        """S: ``block_size``, or what the system has where nothing was said."""
        if self.block_size is not None:
            return self.block_size
        return _own_block(self.system, self.seq_len) or DEFAULT_BLOCK

    @property
    def estimator(self) -> EstimatorName:
        """The likelihood's estimator, ``auto`` resolved for this block size and model."""
        if self.eval.estimator != "auto":
            return self.eval.estimator
        exact = self.block <= MAX_EXACT_BLOCK and not self.model.time_conditioning
        return "exact" if exact else "stratified"


DEFAULT_BLOCK = 4


def check_estimator(
    estimator: EstimatorName, block_size: int, repeats: int, told: bool, prefix: str = ""
) -> None:
    """Raise :class:`ConfigError` where an estimator does not go with a model or its repeats.

    Args:
        estimator: of the likelihood, not ``auto``.
        block_size: S.
        repeats: forwards of the sampled estimators.
        told: whether the model is told the noise level.
        prefix: of the settings' names in the message.
    """
    check(
        estimator != "exact" or block_size <= MAX_EXACT_BLOCK,
        f"{prefix}estimator",
        estimator,
        f"exact needs block-size <= {MAX_EXACT_BLOCK} (here {block_size}); use stratified",
    )
    check(
        estimator != "exact" or not told,
        f"{prefix}estimator",
        estimator,
        "a model that is told the noise level has no exact sum; use stratified",
    )
    check(
        estimator != "stratified" or (repeats >= 2 and repeats % 2 == 0),
        f"{prefix}repeats",
        repeats,
        "an even number, at least 2, for stratified",
    )
    check(
        estimator in ("exact", "stratified") or repeats >= 2,
        f"{prefix}repeats",
        repeats,
        "at least 2, so that the error can be estimated",
    )


def _own_block(system: SystemName, seq_len: int) -> int | None:
    """The only block size of a system; None where any will do."""
    return {"bd3lm": None, "mdlm": seq_len, "sedd": seq_len, "ar": 1}[system]


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


def _paper(system: SystemName, width: int, depth: int, heads: int, cond_width: int) -> TrainConfig:
    """The paper's shapes and recipe (3e-4, 2,500-step warm-up, EMA 0.9999); AR has no adaLN."""
    cond_width = 0 if system == "ar" else cond_width
    return TrainConfig(
        system=system,
        model=ModelConfig(
            width=width,
            depth=depth,
            heads=heads,
            cond_width=cond_width,
            time_conditioning=system == "sedd",
            dropout=0.1,
        ),
        noise=NoiseConfig() if system == "ar" else NoiseConfig(estimator="bernoulli"),
        optim=OptimConfig(),
    )


def tiny(system: SystemName = "bd3lm") -> TrainConfig:
    """The paper's tiny DiT (width 256, depth 8) with the paper's recipe."""
    return _paper(system, 256, 8, 8, 64)


def small(system: SystemName = "bd3lm") -> TrainConfig:
    """The paper's small DiT (width 768, depth 12) with the paper's recipe."""
    return _paper(system, 768, 12, 12, 128)


def medium(system: SystemName = "bd3lm") -> TrainConfig:
    """The paper's medium DiT (width 1024, depth 24) with the paper's recipe."""
    return _paper(system, 1024, 24, 16, 128)


def demo(system: SystemName = "bd3lm") -> TrainConfig:
    """Minutes on two cores: a small model, Muon, the low-variance `count` estimator."""
    return TrainConfig(
        system=system,
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
            cond_width=64 if system == "sedd" else 0,
            time_conditioning=system == "sedd",
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


PRESETS: dict[str, Callable[[SystemName], TrainConfig]] = {
    "demo": demo,
    "tiny": tiny,
    "small": small,
    "medium": medium,
}


def preset(name: str, system: str = "bd3lm") -> TrainConfig:
    """The preset of that name for a system.

    Raises:
        ConfigError: there is no such preset or system; the message lists those there are.
    """
    check(name in PRESETS, "preset", name, f"one of {', '.join(PRESETS)}")
    systems = typing.get_args(SystemName)
    check(system in systems, "system", system, f"one of {', '.join(systems)}")
    return PRESETS[name](typing.cast("SystemName", system))
