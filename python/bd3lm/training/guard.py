"""Steps whose loss or gradient is not finite: found on the device, counted, named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bd3lm.checkpoint.record import Record

_LOSS, _NORM = -1, -2
"""Causes that are no parameter's number: the loss, and a norm that overflows."""


class Window(NamedTuple):
    """The steps since the last look.

    Attributes:
        loss: mean loss of the finite steps; None where there was none.
        norm: gradient norm of the last step.
        skipped: steps that were not finite.
        in_a_row: most of them in a row, those right before the window included.
        step: the first of that row.
        cause: the part of it that was not finite.
    """

    loss: float | None
    norm: float
    skipped: int
    in_a_row: int
    step: int
    cause: str


class StepGuard:
    """Detects steps that are not finite, without a wait of the host for the device.

    Sums and counts stay on the device, and at their addresses, until :meth:`look` fetches them in
    one transfer.

    Args:
        device: of the loss and the gradients.

    Attributes:
        names: of the parameters that have gradients, in the order of their norms.
    """

    def __init__(self, device: torch.device) -> None:
        self.names: Sequence[str] = ()
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        # Steps; those that were skipped; in a row until now; most in a row. Step and cause that
        # began the present row and the longest one.
        self._counts = torch.tensor([0, 0, 0, 0], device=device)
        self._starts = torch.tensor([[-1, -1], [-1, -1]], device=device)

    def judge(self, step: int | Tensor, loss: Tensor, norms: Tensor, total: Tensor) -> Tensor:
        """Count one step; returns whether it is finite, a boolean on the device.

        Args:
            step: its number, from 1; on the host, or int64 [] on the device.
            loss: its loss.
            norms: the norm of each gradient.
            total: the norm of all.
        """
        loss = loss.to(total.device)  # gradients may be in the memory of the host
        of_loss, of_norm = loss.isfinite(), norms.isfinite()
        finite = of_loss & total.isfinite()
        steps, skipped, row, most = self._counts.unbind()
        bad = (~finite).long()
        row = (row + 1) * bad
        counts = torch.stack([steps + 1, skipped + bad, row, torch.maximum(most, row)])
        cause = torch.where(of_norm.all(), _NORM, of_norm.long().argmin())
        number = step if isinstance(step, Tensor) else torch.full_like(cause, step)
        now = torch.stack([number, torch.where(of_loss, cause, _LOSS)])
        start, longest = self._starts.unbind()
        start = torch.where(row == 1, now, start)
        longest = torch.where((row >= most) & ~finite, start, longest)
        self._starts.copy_(torch.stack([start, longest]))
        self._counts.copy_(counts)
        self._loss += torch.where(finite, loss, 0.0)
        return finite

    def look(self, norm: Tensor) -> Window:
        """Fetch the window and begin the next one: one wait for the device."""
        parts = [self._loss[None], norm.double()[None], self._counts, self._starts[1]]
        every = torch.cat([p.double() for p in parts]).tolist()
        loss, last, steps, skipped, _, most, step, cause = every
        good = int(steps - skipped)
        window = Window(
            loss=loss / good if good else None,
            norm=last,
            skipped=int(skipped),
            in_a_row=int(most),
            step=int(step),
            cause=self._cause(int(cause)),
        )
        row = self._counts[2]
        self._loss.zero_()
        self._counts.copy_(torch.stack([torch.zeros_like(row), torch.zeros_like(row), row, row]))
        return window

    def state(self) -> dict[str, Any]:
        """Everything of the window as plain JSON."""
        steps, *counts = self._counts.tolist()
        return {
            "loss": self._loss.item(),
            "steps": steps,
            "counts": counts,
            "starts": self._starts.flatten().tolist(),
        }

    def load_state(self, state: Record) -> None:
        """Restore :meth:`state`, bit for bit.

        Raises:
            CheckpointError: a field is missing or of another type.
        """
        loss, steps = state.floating("loss"), state.integer("steps")
        counts, starts = state.integers("counts", 3), state.integers("starts", 4)
        self._loss.fill_(loss)
        self._counts.copy_(torch.tensor([steps, *counts]))
        self._starts.copy_(torch.tensor(starts).view(2, 2))

    def _cause(self, number: int) -> str:
        if number == _NORM:
            return "the norm of the gradient"
        if 0 <= number < len(self.names):
            return f"the gradient of {self.names[number]}"
        return "the loss"
