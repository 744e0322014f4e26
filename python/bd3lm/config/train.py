"""One training run: data, system, and the settings of every part."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from bd3lm.config.check import check, check_number, check_whole
from bd3lm.config.evaluate import MAX_EXACT_BLOCK, EvalConfig, check_estimator
from bd3lm.config.lora import LoraConfig
from bd3lm.config.model import ModelConfig
from bd3lm.config.names import AttentionName, EstimatorName, PackingName, SystemName
from bd3lm.config.noise import NoiseConfig
from bd3lm.config.objective import ObjectiveConfig
from bd3lm.config.optim import OptimConfig
from bd3lm.config.parallel import ParallelConfig
from bd3lm.config.sample import SampleConfig
from bd3lm.storage import is_url, parse_bytes

DEFAULT_BLOCK = 4
"""S of a bd3lm run where none is given."""
LARGEST_BATCH = 2**24
"""Rows that the loader makes at once at most."""
LARGEST_ROW = 2**24
"""Largest L: beyond the memory of any machine, so that a damaged number allocates nothing."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: str | None = None
    """Training data: a prepared directory, here or at a URL such as s3://bucket/text; a text file
    (txt, jsonl, parquet; gz, xz, zst); or a data set of the Hugging Face hub: hub:openwebtext,
    hub:lm1b, hub:PATH[:CONFIG]@SPLIT. None: the English text shipped with the package."""
    valid: str | None = None
    """Validation data, likewise. None: `valid/` inside `data`, or a share of its documents."""
    cache_size: str = "10GB"
    """Largest local cache of the rows of a data set at a URL, for each process."""
    tokenizer: str = "default"
    """Tokenizer of text: default, a file, a folder or a hub name. Prepared data has its own."""
    text_field: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    packing: PackingName = "wrap"
    """wrap: concatenate and cut; aligned: documents start on block boundaries; best_fit:
    documents whole where they fit."""
    row_eos: bool = False
    """wrap: close every row with EOS, as the original implementation does."""
    shuffle: bool = True
    """Visit the rows of each epoch in a random order. False: in the order of the data."""
    system: SystemName = "bd3lm"
    """bd3lm: block diffusion; mdlm: masked diffusion over the whole row; sedd: score entropy over
    the whole row; ar: one token after the other."""
    seq_len: int = 128
    """L, tokens of a row."""
    block_size: int | None = None
    """S, tokens of a block; divides seq_len. 1 is token by token, seq_len is plain diffusion.
    None: 4 for bd3lm; mdlm and sedd have seq_len, ar has 1."""
    init_from: str | None = None
    """Start from the averaged weights of this checkpoint, of any block size and, but for sedd, any
    system: one of ours, the original implementation's, or a Llama, SmolLM, Qwen or SDAR, in a
    directory, at a URL, in a .gguf file or by its name on the hub. The last kinds bring their own
    shape and tokenizer."""
    mask_token: str | None = None
    """Added token that becomes the mask, with init_from of an autoregressive model. None: the
    tokenizer's own mask, else a new id after its last."""
    init_optimizer: bool = False
    """Also take over the optimizer's state of init_from."""
    init_unigram: bool = False
    """Start a new model from the frequencies of the tokens in the training text: the head's bias is
    their logarithm, so that no step is spent on them. Without effect with init_from."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 512
    """Rows of an optimizer step."""
    micro_batch: int | None = None
    """Rows of one forward (gradient accumulation), on each rank. None: the whole batch, or a
    rank's share of it, at once."""
    seed: int = 1
    """Seed of weights, order and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the device has it."""
    attention: AttentionName = "auto"
    """Attention backend. auto: on a CPU the Rust kernel; on CUDA FlexAttention for training and the
    Triton kernels for decoding; dense otherwise. hopper (kernels for sm_90, not run on a GPU yet)
    and flash are taken by name alone."""
    recompute: bool = False
    """Keep only the residual stream of each block and compute the rest again in the backward pass
    (activation checkpointing): less memory, more time, the same gradients."""
    compile: bool | None = None
    """Fuse the operations between a block's matrix products with torch.compile, which takes a
    minute at the start. None: on CUDA, but not under FSDP. If the compiler fails, a run of one
    process continues without it."""
    cuda_graph: bool = False
    """Record the optimizer step on CUDA once and replay it, for models so small that a GPU waits
    for the host. Where a step cannot be recorded, the run says so and continues without it. Not
    run on a GPU yet (docs/gpu.md)."""
    checkpoint_every: int = 500
    """Steps between checkpoints. One is also written at the end and when a signal stops the run."""
    checkpoint_minutes: float | None = 30.0
    """Minutes after which a checkpoint is written although checkpoint_every is not reached.
    None: count steps alone."""
    keep: int = 2
    """Last checkpoints that stay on the disk; the one of the best validation stays too."""
    mirror: str | None = None
    """URL, such as s3://bucket/runs/book, to which checkpoints and metrics are uploaded while the
    run trains. With --resume and an empty --out, the run continues from there."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    model: ModelConfig = field(default_factory=ModelConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(num=4))

    def __post_init__(self) -> None:
        check_whole("seq-len", self.seq_len, 2, LARGEST_ROW)
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
            check_whole(name.replace("_", "-"), getattr(self, name), 1)
        check_whole("batch-size", self.batch_size, 1, LARGEST_BATCH)
        check_whole("seed", self.seed, 0, 2**63 - 1)
        if self.checkpoint_minutes is not None:
            check_number("checkpoint-minutes", self.checkpoint_minutes, 0, interval="()")
        parse_bytes(self.cache_size)
        url = "a URL, such as s3://bucket/runs/book"
        check(self.mirror is None or is_url(self.mirror), "mirror", self.mirror, url)
        self._check_block()
        self._check_objective()
        self._check_lora()
        check(
            self.init_from is not None or not self.init_optimizer,
            "init-optimizer",
            self.init_optimizer,
            "False without init-from",
        )
        check(
            self.model.head_bias or not self.init_unigram,
            "init-unigram",
            self.init_unigram,
            "False without model.head-bias",
        )
        if self.micro_batch is not None:
            check_whole("micro-batch", self.micro_batch, 1)
            check(
                self.batch_size % self.micro_batch == 0,
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
                "None unless packing = wrap and row-eos = False: other rows do not overlap",
            )
        check(
            self.packing == "wrap" or not self.row_eos,
            "row-eos",
            self.row_eos,
            f"False with packing = {self.packing}; it goes with wrap",
        )
        for size in sorted({*self.objective.block_sizes} - {self.block}):
            self.with_block(size)  # validation scores at each: what it needs is refused here

    def _check_lora(self) -> None:
        if not self.lora.rank:
            return
        base, optim, parallel = self.init_from, self.optim.optimizer, self.parallel.strategy
        whole = "with lora.rank, whose adapters are trained on frozen weights"
        check(base is not None, "init-from", base, f"a checkpoint {whole}")
        check(not self.init_optimizer, "init-optimizer", self.init_optimizer, f"False {whole}")
        check(optim == "adamw", "optim.optimizer", optim, f"adamw {whole}")
        check(parallel == "ddp", "parallel.strategy", parallel, f"ddp {whole}")

    def _check_objective(self) -> None:
        weight = self.objective.ar_weight
        check(
            not weight or (self.model.causal_clean and self.system == "bd3lm"),
            "objective.ar-weight",
            weight,
            "0 unless system = bd3lm and model.clean-stream = causal",
        )
        sizes, field_name = self.objective.block_sizes, "objective.block-sizes"
        check(not sizes or self.system == "bd3lm", field_name, sizes, "empty unless system = bd3lm")
        own = f"empty, or sizes of which block-size = {self.block} is one"
        check(not sizes or self.block in sizes, field_name, sizes, own)
        views, noise = self.objective.views, self.noise
        all_masked = noise.clip == (1.0, 1.0) or (noise.clip_search and 1 in (self.block, *sizes))
        for fits, needed in (
            (
                self.system in ("bd3lm", "mdlm") and noise.estimator == "count",
                "1 unless system = bd3lm or mdlm and noise.estimator = count",
            ),
            (
                not (noise.fit_counts or self.model.time_conditioning),
                "1 with noise.fit-counts or model.time-conditioning",
            ),
            (not all_masked, "1 where noise.clip may become 1 1, which masks every token"),
            (
                self.block > 1 or len(sizes) > 0,
                "1 with block-size = 1, where a complement masks nothing",
            ),
        ):
            check(views == 1 or fits, "objective.views", views, needed)
        cutoffs = self.model.softmax_cutoffs
        check(
            not cutoffs or self.system != "sedd",
            "model.softmax-cutoffs",
            cutoffs,
            "empty for system = sedd, whose scores are not normalised",
        )
        shift = self.model.token_shift
        check(
            not shift or self.system in ("bd3lm", "mdlm"),
            "model.token-shift",
            shift,
            f"False for system = {self.system}",
        )
        for size in sizes:
            fits = self.seq_len % size == 0
            check(fits, field_name, size, f"a divisor of seq-len = {self.seq_len}")

    def _check_block(self) -> None:
        own = _own_block(self.system, self.seq_len)
        check(
            self.block_size is None or own is None or self.block_size == own,
            "block-size",
            self.block_size,
            f"{own} for system = {self.system}",
        )
        check_whole("block-size", self.block, 1)
        check(
            self.seq_len % self.block == 0,
            "block-size",
            self.block,
            f"a divisor of seq-len = {self.seq_len}",
        )

    def autoregressive(self) -> TrainConfig:
        """Settings of the autoregressive model that a causal clean stream also is.

        Raises:
            ConfigError: the clean stream is not causal.
        """
        if self.system == "ar":
            return self
        stream, told = self.model.clean_stream, self.model.time_conditioning
        causal = "causal, for scoring and sampling as an autoregressive model"
        check(self.system == "bd3lm" and stream == "causal", "model.clean-stream", stream, causal)
        check(not told, "model.time-conditioning", told, "False, which is " + causal)
        return replace(
            self,
            system="ar",
            block_size=None,
            model=replace(self.model, token_shift=False),
            noise=NoiseConfig(),
            objective=ObjectiveConfig(),
            eval=replace(self.eval, estimator="auto"),
        )

    @property
    def block(self) -> int:
        """S: ``block_size``, or the system's own where it is None."""
        if self.block_size is not None:
            return self.block_size
        return _own_block(self.system, self.seq_len) or DEFAULT_BLOCK

    def with_block(self, size: int) -> TrainConfig:
        """The same settings with this block size alone.

        Raises:
            ConfigError: it does not divide the row, or the system has another.
        """
        return replace(self, block_size=size, objective=self.objective.of_one_size(size))

    @property
    def largest_block(self) -> int:
        """The largest S of the run, to which rows are aligned."""
        return max((self.block, *self.objective.block_sizes))

    @property
    def estimator(self) -> EstimatorName:
        """The likelihood's estimator, ``auto`` resolved for this block size and model."""
        if self.eval.estimator != "auto":
            return self.eval.estimator
        exact = self.block <= MAX_EXACT_BLOCK and not self.model.time_conditioning
        return "exact" if exact else "stratified"


def _own_block(system: SystemName, seq_len: int) -> int | None:
    """The only block size of a system; None where any will do."""
    return {"bd3lm": None, "mdlm": seq_len, "sedd": seq_len, "ar": 1}[system]
