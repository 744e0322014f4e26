"""Predictions of a model at masked positions of clean rows, one forward at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3lm.data.rows import CleanBatch
from bd3lm.device import uploaded
from bd3lm.model import Transformer
from bd3lm.systems import System

CHUNK_ROWS = 512
"""Positions whose logits exist at once where the whole distribution is read."""


@dataclass(frozen=True)
class Predictions:
    """One forward, on the device of the model.

    Attributes:
        nats: -log p of the true token, or the system's bound on it, float64 [B, L]; 0 where
            nothing was scored.
        confidence: log-probability of the most probable token, float32 [B, L]; None without
            ``whole_distribution``.
        correct: whether the true token is the most probable one, or nothing was scored, bool
            [B, L]; likewise.
    """

    nats: Tensor
    confidence: Tensor | None = None
    correct: Tensor | None = None


class RowScorer:
    """Scores noised versions of some clean rows; the clean stream runs once, when it is made.

    Args:
        system: its block size S divides the rows.
        model: in evaluation mode.
        batch: the rows. A mask token among their ids stays masked in every version.
        whole_distribution: also read which token is the most probable and how probable it is,
            which needs the logits of the whole vocabulary.
    """

    def __init__(
        self,
        system: System,
        model: Transformer,
        batch: CleanBatch,
        *,
        whole_distribution: bool = False,
    ) -> None:
        device = next(model.parameters()).device
        self.system, self.model, self.block_size = system, model, system.block_size
        self.noisable, self.whole_distribution = batch.noisable, whole_distribution
        self.x0 = batch.x0.to(device)
        doc_ids = None if batch.doc_ids is None else batch.doc_ids.to(device)
        self._denoise = system.denoiser(model, self.x0, doc_ids)
        self.forwards = system.preparing_forwards(self.x0.shape[1])

    def __call__(
        self,
        mask: Tensor,
        level: Tensor | None = None,
        at: Tensor | None = None,
        *,
        count: int | None = None,
    ) -> Predictions:
        """Run the rows with ``mask`` hidden; nothing is read back from the device.

        Args:
            mask: bool [B, L], on the host; or on the device with ``count``.
            level: mask probability of each block [B, K], read by time-conditioned models only;
                None: 0.
            at: positions to predict, some of the masked ones, bool [B, L]; None: all of them.
            count: number of positions to predict, where the host cannot count them.
        """
        self.forwards += 1
        device, at = self.x0.device, mask if at is None else at
        if count is None:
            select = uploaded(at.flatten().nonzero().squeeze(1), device)
        else:
            select = torch.nonzero_static(at.flatten(), size=count).squeeze(1)
        xt = torch.where(uploaded(mask, device), self.system.mask_id, self.x0)
        if level is None:
            level = torch.zeros(len(mask), mask.shape[1] // self.block_size, device=device)
        features = self._denoise(xt, select, uploaded(level, device))
        if not self.whole_distribution:
            nats = self.system.nats(self.model, features, self.x0, select)
            return Predictions(self._spread(nats.double(), select))
        nats, confidence, correct = self._read_logits(features, torch.take(self.x0, select))
        return Predictions(
            self._spread(nats.double(), select),
            self._spread(confidence, select),
            self._spread(correct, select, elsewhere=True),
        )

    def _read_logits(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for start in range(0, len(features), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = self.system.logits(self.model, features[part]).float()
            total = logits.logsumexp(-1)
            top, token = logits.max(-1)
            own = logits.gather(1, target[part, None]).squeeze(1)
            parts.append((total - own, top - total, token == target[part]))
        if not parts:
            empty = features.new_empty(0, dtype=torch.float32)
            return empty, empty, empty.bool()
        nats, confidence, correct = (torch.cat(x) for x in zip(*parts, strict=True))
        return nats, confidence, correct

    def _spread(self, values: Tensor, select: Tensor, elsewhere: float = 0) -> Tensor:
        """Values of selected positions in their places [B, L]."""
        out = values.new_full((self.x0.numel(),), elsewhere)
        return out.index_copy_(0, select, values).view(self.x0.shape)
