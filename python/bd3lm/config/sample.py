"""Sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bd3lm.config.check import check, check_number, check_whole

LARGEST_LENGTH = 2**24
"""Largest number of tokens of a row: positions are int32 in the kernels."""


@dataclass(frozen=True)
class SampleConfig:
    """Settings of the sampler."""

    num: int = 1
    """Samples of each prompt."""
    length: int | None = None
    """Largest number of tokens, prompt and BOS included. None: the trained length."""
    steps: int | None = None
    """Levels of the grid of ancestral sampling, a block. None: first hitting, one forward a token;
    sedd always samples on a grid, by default of seq_len levels."""
    tokens_per_forward: int = 1
    """First hitting: tokens that one forward reveals. More than 1 is faster and not exact, because
    tokens of one forward do not see each other."""
    order: Literal["random", "confidence"] = "random"
    """Positions that a forward reveals: in the random order of first hitting, or those of the most
    probable tokens, as serving engines decode."""
    threshold: float | None = None
    """Parallel decoding: each forward also reveals every position whose most probable token has at
    least this probability. With order = random, 1 is plain first hitting."""
    entropy_bound: float | None = None
    """Parallel decoding: each forward also reveals the positions of lowest entropy, as long as
    their entropies without the largest sum to at most this many nats."""
    speculate: bool = False
    """Draw from the autoregressive model of a causal clean stream, several tokens a forward: the
    noised stream drafts block-size - 1 tokens, the clean stream accepts or replaces them. The law
    is that of drawing token by token."""
    top_p: float = 0.9
    """Nucleus sampling; 1 samples from the whole distribution."""
    top_k: int | None = None
    """Draw from the k most probable tokens only. None: from all."""
    temperature: float = 1.0
    """Temperature of the softmax; 0 is greedy."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already in the row, multiplies negative ones; 1: off."""
    forbidden: tuple[int | str, ...] = ()
    """Tokens that are never drawn: ids, or words of one token."""
    seed: int = 1
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check_whole("num", self.num, 1)
        if self.length is not None:
            check_whole("length", self.length, 2, LARGEST_LENGTH)
        if self.steps is not None:
            check_whole("steps", self.steps, 1)
        per = self.tokens_per_forward
        check_whole("tokens-per-forward", per, 1)
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0, 1, interval="(]")
        if self.entropy_bound is not None:
            check_number("entropy-bound", self.entropy_bound, 0)
        ways = {
            "steps": self.steps is not None,
            "tokens-per-forward": per > 1,
            "threshold": self.threshold is not None,
            "entropy-bound": self.entropy_bound is not None,
            "speculate": self.speculate,
        }
        given = [name for name, is_set in ways.items() if is_set]
        check(
            len(given) <= 1,
            ", ".join(given),
            "set",
            "one at a time: each is a way to reveal tokens",
        )
        check(
            self.steps is None or self.order == "random",
            "steps",
            self.steps,
            "None with order = confidence, which has no levels",
        )
        check(
            not self.speculate or self.order == "random",
            "speculate",
            True,
            "False with order = confidence",
        )
        check(
            not self.speculate or self.repetition_penalty == 1,
            "repetition-penalty",
            self.repetition_penalty,
            "1 with speculate",
        )
        check_number("top-p", self.top_p, 0, 1, interval="(]")
        if self.top_k is not None:
            check_whole("top-k", self.top_k, 1)
        check_number("temperature", self.temperature, 0)
        check_number("repetition-penalty", self.repetition_penalty, 0, interval="()")
        check_whole("seed", self.seed, -(2**63), 2**64 - 1)

    @property
    def adaptive(self) -> bool:
        """Return whether the model decides which positions, and how many, a forward reveals."""
        sure = self.threshold is not None or self.entropy_bound is not None
        return sure or self.order == "confidence"
