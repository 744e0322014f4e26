"""Decoding rules against a source whose true distribution is known.

The exact posterior of a Markov chain takes the place of the network, so the only error left is that
of the decoding rule: the total variation between its samples and the chain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bd3lm.config import ModelConfig, SampleConfig, check
from bd3lm.model import KVCache, Transformer
from bd3lm.sample import Sampler
from bd3lm.sample.strategies import Strategy
from bd3lm.systems import BlockDiffusion

MAX_ROWS = 1 << 20
"""Most rows of a source whose probabilities are listed."""


class MarkovSource:
    """A Markov chain of ``length`` tokens over V states, and its exact posteriors.

    Args:
        initial: probabilities of the first token [V].
        transition: probabilities of the next token, by rows [V, V].
        length: tokens of a row.

    Raises:
        ConfigError: probabilities that do not sum to one, or more than 2^20 rows.
    """

    def __init__(
        self, initial: NDArray[np.float64], transition: NDArray[np.float64], length: int
    ) -> None:
        self.initial, self.transition = np.asarray(initial), np.asarray(transition)
        self.states, self.length = len(self.initial), length
        whole = np.append(self.transition.sum(1), self.initial.sum())
        sums = "rows of probabilities that sum to one"
        check(bool(np.allclose(whole, 1.0)), "transition", whole.tolist(), sums)
        few = f"a length of at most {MAX_ROWS} rows in all"
        check(self.states**length <= MAX_ROWS, "length", length, few)

    @classmethod
    def sticky(cls, states: int, stay: float, length: int) -> MarkovSource:
        """A chain that keeps its state with probability ``stay``, else takes any other."""
        other = (1.0 - stay) / (states - 1)
        transition = np.full((states, states), other)
        np.fill_diagonal(transition, stay)
        return cls(np.full(states, 1.0 / states), transition, length)

    def probabilities(self) -> NDArray[np.float64]:
        """Probability of every row [V^length], the first token the most significant digit."""
        p = self.initial
        for _ in range(self.length - 1):
            p = (p.reshape(-1, self.states)[:, :, None] * self.transition).reshape(-1)
        return p

    def posterior(self, ids: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.float64]:
        """p(x_i | the known tokens) of a stretch of the chain, by forward and backward sums.

        Args:
            ids: known tokens, -1 where one is hidden, [B, T].
            before: the token before the stretch, -1 where it begins the row, [B].

        Returns:
            float64 [B, T, V]; of a hidden position, given all others.
        """
        rows, length = ids.shape
        open_ = ids < 0
        known = np.where(open_[..., None], 1.0, np.eye(self.states)[np.maximum(ids, 0)])
        first = np.where(
            (before < 0)[:, None], self.initial, self.transition[np.maximum(before, 0)]
        )
        forward, backward = np.empty((2, rows, length, self.states))
        for i in range(length):
            forward[:, i] = (
                first if i == 0 else (forward[:, i - 1] * known[:, i - 1]) @ (self.transition)
            )
            forward[:, i] /= forward[:, i].sum(1, keepdims=True)
        backward[:, -1] = 1.0
        for i in reversed(range(length - 1)):
            backward[:, i] = (backward[:, i + 1] * known[:, i + 1]) @ self.transition.T
        p = forward * backward
        return p / p.sum(2, keepdims=True)


class OracleDenoiser(nn.Module):
    """The exact posterior of a source, with the interface that the sampler calls.

    Token 0 is BOS and the mask is V + 1; the source's states are 1 to V. The "keys" of a cached
    position hold its token.

    Args:
        source: the chain.
    """

    def __init__(self, source: MarkovSource) -> None:
        super().__init__()
        self.source = source
        self.cfg = ModelConfig(width=2, depth=1, heads=1)
        self.vocab_size = source.states + 2
        self.unused = nn.Parameter(torch.zeros(1))  # names the device

    def encode(
        self,
        ids: Tensor,
        block_size: int,
        *,
        select: Tensor,
        cache: KVCache,
        commit: int = 0,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Log posteriors [M, V + 2] of the selected positions; arguments as of the Transformer."""
        begin = cache.length
        before = torch.zeros(len(ids)) if begin == 0 else cache.k[0][:, 0, begin - 1, 0]
        cache.write(0, *(ids[:, :, None, None].float().expand(-1, -1, -1, 2),) * 2)
        cache.length += commit
        if select.numel() == 0:
            return torch.empty(0, self.vocab_size)
        hidden = ids == self.vocab_size - 1
        known = torch.where(hidden, -1, ids - 1).numpy()
        bos = int(begin == 0)  # BOS is no token of the chain
        p = self.source.posterior(known[:, bos:], before.long().numpy() - 1)
        out = np.zeros((*ids.shape, self.vocab_size), dtype=np.float32)
        out[:, bos:, 1:-1] = p
        return torch.from_numpy(out).log().flatten(0, 1)[select]

    def logits(self, features: Tensor, without: int | None = None) -> Tensor:
        """The log posteriors themselves, in which the mask token has no share."""
        return features.clone()


@dataclass(frozen=True)
class OraclePoint:
    """One decoding rule on one source.

    Attributes:
        forwards: a token, cache fills included.
        total_variation: between the drawn rows and the source, in [0, 1].
        floor: expected total variation of as many draws from the source itself.
    """

    forwards: float
    total_variation: float
    floor: float


def compare_decoding(
    source: MarkovSource,
    rules: Mapping[str, tuple[SampleConfig, Strategy | None]],
    *,
    block_size: int,
    num: int = 10_000,
) -> dict[str, OraclePoint]:
    """Draw rows by each rule and measure how far they are from the source.

    Args:
        source: the chain; its length + 1 (BOS) is a multiple of ``block_size``.
        rules: settings and, where they do not select it, the strategy; ``num`` and ``length`` of
            the settings are not read.
        block_size: S.
        num: rows a rule.
    """
    system = BlockDiffusion(block_size, source.states + 1)
    sampler = Sampler(
        cast("Transformer", OracleDenoiser(source)),
        system,
        window=source.length + 1,
        bos_id=0,
        eos_id=-1,
    )
    truth = source.probabilities()
    # Of a binomial share, E|p̂ - p| is about √(2p(1-p)/πN).
    floor = float(np.sqrt(2 * truth * (1 - truth) / (math.pi * num)).sum() / 2)
    digits = source.states ** np.arange(source.length)[::-1]
    points = {}
    for name, (settings, strategy) in rules.items():
        cfg = replace(settings, num=num, length=source.length + 1)
        samples = sampler.generate(cfg, strategy=strategy)
        ids = np.array([sample.ids for sample in samples]) - 1
        drawn = np.bincount(ids @ digits, minlength=len(truth)) / num
        points[name] = OraclePoint(
            forwards=sum(sample.nfe for sample in samples) / ids.size,
            total_variation=float(np.abs(drawn - truth).sum() / 2),
            floor=floor,
        )
    return points
