"""What a sampler yields: blocks as they are filled, and rows as they end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """One finished row.

    Attributes:
        ids: tokens after BOS, prompt included, closing EOS left out.
        stop: ``eos``, ``length`` or ``degenerate`` (the entropy of the last 256 tokens fell below
            4 nats; they are cut, as the original implementation does).
        nfe: forwards of the denoiser for this row, those that fill its cache included. It does not
            depend on the batch.
        nfe_paper: the same without forwards that only fill the cache.
        log_prob: Σ log p of every drawn token, in nats, cut ones included. It is the model's own
            probability, before temperature, nucleus and penalties.
        seconds: wall-clock time until the row ended, shared with the rest of its batch.
        text: the tokens decoded; None if the sampler has no tokenizer.
    """

    ids: list[int]
    stop: str
    nfe: int
    nfe_paper: int
    log_prob: float
    seconds: float
    text: str | None = None


@dataclass(frozen=True)
class BlockEvent:
    """Event of :meth:`Sampler.stream`: a forward or a finished block.

    Attributes:
        start: first position of the block.
        blocks: its tokens by row number, the mask id where one is still hidden.
        complete: whether the block is finished.
        ended: samples that ended with it, by row number.
        log_prob: Σ log p of the tokens drawn so far by row number, nats; empty unless each
            forward is reported.
    """

    start: int
    blocks: dict[int, list[int]]
    complete: bool
    ended: dict[int, Sample]
    log_prob: dict[int, float] = field(default_factory=dict)
