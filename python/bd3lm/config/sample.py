"""Sampling."""

from __future__ import annotations

from dataclasses import dataclass

from bd3lm.config.check import check


@dataclass(frozen=True)
class SampleConfig:
    """Sampling (MATH §8)."""

    num: int = 1
    """Samples of each prompt."""
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
            "one at a time",
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
