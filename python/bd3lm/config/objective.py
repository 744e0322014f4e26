"""Training objective: which losses are added up, and over which positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bd3lm.config.check import check, check_number, check_whole

MOST_VIEWS = 64


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objective of a run: next-token loss, block sizes and views.

    All need system = bd3lm; views go with mdlm too.
    """

    ar_weight: float = 0.0
    """Weight of the next-token loss on the clean stream, per token. More than 0 needs
    model.clean-stream = causal."""
    ar_tokens: Literal["all", "unmasked"] = "all"
    """Tokens of that loss: all, or those that the noised stream does not predict in this step,
    weighted to the same expectation. The head then works on each token once."""

    ar_steps: int = 0
    """First steps of the run that train on the next-token loss alone (AR warm start). They run one
    stream instead of two."""
    block_sizes: tuple[int, ...] = ()
    """Train on blocks of several sizes, block-size among them, in turn: the list is shuffled, used
    up step by step, and shuffled again. A size given twice has twice the steps. One checkpoint then
    scores and samples at each. Empty: block-size."""
    ramp_steps: int = 0
    """First steps of the run, over which S goes through block-sizes from the smallest to the
    largest; the later ones train on block-size. 0: no ramp."""
    views: int = 1
    """Noised streams of each row in a step, which share one clean stream. 2: a mask and its
    complement, so that every token is predicted in each step; 4: two masks and their complements,
    and so on. More views make the gradient of a step less noisy and the step longer. Steps at S = 1
    have one, since their masks hide every token."""

    def views_at(self, size: int) -> int:
        """Views of a row in a step at S = ``size``."""
        return self.views if size > 1 else 1

    def masks_at(self, size: int) -> int:
        """Masks to draw for each row in such a step; the other views are their complements."""
        return max(self.views_at(size) // 2, 1)

    def of_one_size(self, size: int) -> ObjectiveConfig:
        """The same losses on blocks of S = ``size`` alone."""
        return replace(self, block_sizes=(), ramp_steps=0, views=self.views_at(size))

    def __post_init__(self) -> None:
        check_number("objective.ar-weight", self.ar_weight, 0)
        check_whole("objective.ar-steps", self.ar_steps, 0)
        warm = self.ar_steps == 0 or self.ar_weight > 0
        check(warm, "objective.ar-steps", self.ar_steps, "0 where objective.ar-weight = 0")
        for size in self.block_sizes:
            check_whole("objective.block-sizes", size, 1)
        check_whole("objective.views", self.views, 1, MOST_VIEWS)
        even = self.views == 1 or self.views % 2 == 0
        check(even, "objective.views", self.views, "1 or even: masks and their complements")
        check_whole("objective.ramp-steps", self.ramp_steps, 0)
        several = self.ramp_steps == 0 or len(set(self.block_sizes)) > 1
        check(
            several,
            "objective.ramp-steps",
            self.ramp_steps,
            "0 without several objective.block-sizes",
        )
        check(
            not (self.views > 1 and self.ar_tokens == "unmasked"),
            "objective.ar-tokens",
            self.ar_tokens,
            "all with several objective.views, where no token is left unmasked",
        )
