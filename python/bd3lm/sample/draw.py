"""Exact categorical draws over the vocabulary, one uniform number each (docs/math.md §8)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bd3lm import _core
from bd3lm.config import SampleConfig
from bd3lm.model.attention import triton
from bd3lm.model.threads import kernel_threads


def draw(
    logits: Tensor, uniform: Tensor, cfg: SampleConfig, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    The repetition penalty of seen tokens comes first, then temperature, then the ``top_k`` most
    probable tokens, then the nucleus: the smallest set of most probable tokens whose mass reaches
    ``top_p``, including the token that crosses it. Sums are float64 on every device. A Rust kernel
    takes float32 logits on the CPU, a Triton kernel takes all dtypes on an NVIDIA GPU; the relative
    error of their exponentials is about 1e-7, also in the tail.

    Args:
        logits: the model's own [R, V]; -inf is never drawn.
        uniform: float64 [R], in [0, 1).
        cfg: temperature (0 takes the most probable token), top_p, top_k, forbidden and
            repetition_penalty.
        seen: bool [R, V], tokens that the penalty discourages; None: none.

    Returns:
        Tokens, int64 [R], and their log-probabilities under ``logits``, float64 [R], in nats.

    Raises:
        ConfigError: on the CPU, a row with a NaN or without a possible token.
    """
    if logits.is_cuda and triton.available() and logits.dtype in triton.DTYPES:
        from bd3lm.sample.draw_triton import run_draw

        return run_draw(logits, uniform, cfg, seen)
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return _draw_on_cpu(logits, uniform, cfg, seen)
    return composed_draw(logits, uniform, cfg, seen)


def _draw_on_cpu(
    logits: Tensor, uniform: Tensor, cfg: SampleConfig, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    token = torch.empty(len(uniform), dtype=torch.int64)
    log_p = torch.empty(len(uniform), dtype=torch.float64)
    shaped = None if seen is None else discourage(logits, seen, cfg.repetition_penalty)
    _core.draw(
        logits.reshape(-1).numpy(),
        None if shaped is None else shaped.reshape(-1).numpy(),
        uniform.numpy(),
        token.numpy(),
        log_p.numpy(),
        **_shaping(cfg),
        threads=kernel_threads(),
    )
    return token, log_p


def _shaping(cfg: SampleConfig) -> dict[str, Any]:
    """The settings that shape a distribution, as the Rust kernels take them."""
    return {
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "top_p": cfg.top_p,
        "forbidden": tuple(map(int, cfg.forbidden)),
    }


class Distribution(NamedTuple):
    """Distributions over the vocabulary, not normalised.

    Attributes:
        mass: multiples of the probabilities [R, V].
        total: sum of each row, float64 [R].
    """

    mass: Tensor
    total: Tensor

    @property
    def probs(self) -> Tensor:
        """Probabilities, float64 [R, V]."""
        return self.mass.double() / self.total[:, None]

    def row(self, index: int) -> Tensor:
        """Probabilities of one row, float64 [V]."""
        return self.mass[index].double() / self.total[index]


def distribution(logits: Tensor, cfg: SampleConfig) -> Distribution:
    """The distributions from which :func:`draw` draws, without a repetition penalty.

    Args:
        logits: the model's own [R, V].
        cfg: as of :func:`draw`.

    Raises:
        ConfigError: on the CPU, a row with a NaN or without a possible token.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        mass = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total = torch.empty(len(logits), dtype=torch.float64)
        _core.distribution(
            logits.reshape(-1).numpy(),
            mass.view(-1).numpy(),
            total.numpy(),
            **_shaping(cfg),
            threads=kernel_threads(),
        )
        return Distribution(mass, total)
    mass = _mass(_allowed(logits, cfg), cfg)
    return Distribution(mass, mass.sum(-1))


def composed_draw(
    logits: Tensor, uniform: Tensor, cfg: SampleConfig, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compose :func:`draw` of PyTorch operations, on any device and in any dtype."""
    source = logits if seen is None else discourage(logits, seen, cfg.repetition_penalty)
    source = _allowed(source, cfg)
    greedy = cfg.temperature == 0
    token = source.argmax(dim=-1) if greedy else invert(_mass(source, cfg), uniform)
    log_p = logits.gather(1, token[:, None]).squeeze(1).double()
    return token, log_p - torch.logsumexp(logits.double(), dim=-1)


def _allowed(logits: Tensor, cfg: SampleConfig) -> Tensor:
    if not cfg.forbidden:
        return logits
    logits = logits.clone()
    logits[:, list(map(int, cfg.forbidden))] = -torch.inf
    return logits


def _mass(logits: Tensor, cfg: SampleConfig) -> Tensor:
    """Probabilities after temperature, top-k and nucleus, not normalised again."""
    if cfg.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, best, 1.0)
    prob = torch.softmax(logits.double() / cfg.temperature, dim=-1)
    if cfg.top_p >= 1 and cfg.top_k is None:
        return prob
    vocab = prob.shape[-1]
    # Sort the whole vocabulary: finding the nucleus' size first would need a host wait.
    top, order = prob.topk(min(cfg.top_k or vocab, vocab), dim=-1)
    goal = cfg.top_p * top.sum(-1, keepdim=True)
    before = top.cumsum(dim=-1) - top
    kept = top.masked_fill(before >= goal, 0.0) if cfg.top_p < 1 else top
    # Back in the order of ids, as in the Rust kernel.
    return torch.zeros_like(prob).scatter_(1, order, kept)


def invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds ``uniform`` times the total."""
    cumulative = mass.cumsum(dim=-1)
    goal = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, goal, right=True).squeeze(1)
    # Rounding can make the goal equal the total: take the last token with mass then.
    last = mass.shape[-1] - 1 - (mass > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(index, last)


def discourage(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty: divide positive logits of seen tokens, multiply negative ones.

    Args:
        logits: [R, V].
        seen: bool [R, V].
        penalty: 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
