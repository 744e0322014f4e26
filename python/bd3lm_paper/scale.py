"""Scales of the experiments: ``smoke`` for tests, ``cpu`` for two cores, ``full`` as published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from bd3lm.config import EvalConfig, ModelConfig, NoiseConfig, OptimConfig, TrainConfig, check
from bd3lm.config.presets import tiny
from bd3lm.errors import ConfigError

ScaleName = Literal["smoke", "cpu", "full"]

TRAINING_ROLES = ("lm1b", "owt")
"""Texts the paper trains on."""
ZERO_SHOT_ROLES = ("zero_lm1b", "lambada", "wikitext")
"""Texts it only scores."""


@dataclass(frozen=True)
class Corpora:
    """Text and tokenizer of each role.

    Attributes:
        paths: by role, values for ``--data``; a training role that is missing is played by the
            shipped text, a zero-shot role that is missing leaves its column empty.
        tokenizers: by training role, values for ``--tokenizer``; zero-shot texts have the one of
            ``owt``, on which the models that score them were trained.
    """

    paths: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = TRAINING_ROLES + ZERO_SHOT_ROLES
        for role in self.paths:
            check(role in roles, "corpus", role, f"one of {', '.join(roles)}")
        for role in self.tokenizers:
            check(role in TRAINING_ROLES, "tokenizer", role, f"one of {', '.join(TRAINING_ROLES)}")

    def tokenizer(self, role: str) -> str:
        """Name or path of the tokenizer of a role."""
        return self.tokenizers.get(role if role in TRAINING_ROLES else "owt", "default")

    def updated(self, other: Corpora) -> Corpora:
        """Merge with ``other``, whose entries win."""
        return Corpora({**self.paths, **other.paths}, {**self.tokenizers, **other.tokenizers})


@dataclass(frozen=True)
class Scale:
    """Sizes of models, batches and measurements.

    Attributes:
        name: of the scale.
        base: settings that every run shares.
        corpora: texts and tokenizers where the user names none.
        evaluator: causal language model that judges samples where the user names none; None: no
            Gen. PPL.
        owt_seq_len: L where the paper trains on OpenWebText…
        owt_batch_size: …and the rows of a step there.
        step_divisor: the paper's step counts are divided by this…
        step_range: …and kept in this range.
        close_seeds: seeds of tables whose rows compete closely.
        valid_rows: rows scored for a perplexity; None: all.
        variance_batches: batches of the Var. NELBO.
        samples: rows sampled where samples are judged.
        sample_length: tokens of each.
        long_samples: documents sampled where lengths are judged.
        long_length: largest number of tokens of those.
        budget_steps: of the BD3-LM that the others are compared with at equal cost.
        step_seconds: of a training step of every system and of a joint BD3-LM, relative to a
            BD3-LM's with S = 4; empty where they have not been measured.
    """

    name: ScaleName
    base: TrainConfig
    corpora: Corpora
    evaluator: str | None
    owt_seq_len: int
    owt_batch_size: int
    step_divisor: float
    step_range: tuple[int, int]
    close_seeds: tuple[int, ...]
    valid_rows: int | None
    variance_batches: int
    samples: int
    sample_length: int
    long_samples: int
    long_length: int
    budget_steps: int
    step_seconds: Mapping[str, float]

    def steps(self, paper: int) -> int:
        """Scale the number of steps of a phase of the paper."""
        low, high = self.step_range
        return min(max(round(paper / self.step_divisor), low), high)

    def seq_len(self, corpus: str) -> int:
        """L of a corpus."""
        return self.owt_seq_len if corpus == "owt" else self.base.seq_len

    def batch_size(self, corpus: str) -> int:
        """Rows of a step on a corpus."""
        return self.owt_batch_size if corpus == "owt" else self.base.batch_size


def _full() -> Scale:
    """The published protocol: the tiny DiT, 512 rows a step, 2,500 steps of warm-up."""
    base = tiny()
    return Scale(
        name="full",
        base=replace(base, row_eos=True, seq_len=128, batch_size=512, micro_batch=64),
        corpora=Corpora(
            {
                "lm1b": "hub:lm1b",
                "owt": "hub:openwebtext",
                "zero_lm1b": "hub:lm1b",
                "lambada": "hub:lambada",
                "wikitext": "hub:wikitext103",
            },
            {"lm1b": "bert-base-uncased", "owt": "gpt2"},
        ),
        evaluator="gpt2-large",
        owt_seq_len=1024,
        owt_batch_size=512,
        step_divisor=1,
        step_range=(1, 1 << 30),
        close_seeds=(1,),
        valid_rows=None,
        variance_batches=100,
        samples=300,
        sample_length=1024,
        long_samples=10,
        long_length=16_384,
        budget_steps=8000,
        step_seconds={},
    )


def _cpu() -> Scale:
    """About an hour for all tables on two cores: a small model with a recipe for few steps."""
    base = TrainConfig(
        seq_len=128,
        batch_size=8,
        row_eos=True,
        checkpoint_every=1 << 30,
        model=ModelConfig(width=128, depth=3, heads=4, mlp="relu2", tied_embeddings=True),
        noise=NoiseConfig(estimator="bernoulli"),
        optim=OptimConfig(
            optimizer="muon",
            lr=0.01,
            matrix_lr=0.02,
            betas=(0.9, 0.95),
            warmup_steps=10,
            decay_fraction=0.3,
            ema_decay=0.98,
        ),
        eval=EvalConfig(repeats=8),
    )
    return Scale(
        name="cpu",
        base=base,
        corpora=Corpora(),
        evaluator=None,
        owt_seq_len=256,
        owt_batch_size=4,
        step_divisor=4,
        step_range=(50, 150),
        close_seeds=(1, 2, 3),
        valid_rows=96,
        variance_batches=20,
        samples=16,
        sample_length=128,
        long_samples=4,
        long_length=16_384,
        budget_steps=500,
        # One thread of an EPYC with AVX512_BF16, 16,384 ids, medians of 30 steps taken in turn: 68,
        # 72, 50, 60 and 100 ms. AR and the next-token loss predict every position, the rest half
        # of them.
        step_seconds={"ar": 1.16, "sedd": 1.21, "mdlm": 0.85, "bd3lm": 1.0, "joint": 1.69},
    )


def _smoke() -> Scale:
    """Seconds a table; a smoke test."""
    cpu = _cpu()
    base = replace(
        cpu.base,
        seq_len=32,
        batch_size=4,
        model=ModelConfig(width=16, depth=1, heads=1, tied_embeddings=True),
        eval=EvalConfig(repeats=2),
    )
    return replace(
        cpu,
        name="smoke",
        base=base,
        owt_seq_len=32,
        owt_batch_size=4,
        step_divisor=1e9,
        step_range=(2, 2),
        close_seeds=(1, 2),
        valid_rows=4,
        variance_batches=2,
        samples=2,
        sample_length=32,
        long_samples=2,
        long_length=64,
        budget_steps=2,
    )


SCALES = {"smoke": _smoke, "cpu": _cpu, "full": _full}


def scale_named(name: str) -> Scale:
    """The scale of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCALES:
        raise ConfigError("scale", name, f"one of {', '.join(SCALES)}")
    return SCALES[name]()
