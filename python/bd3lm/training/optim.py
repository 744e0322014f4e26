"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from bd3lm.config import OptimConfig
from bd3lm.errors import CheckpointError


def lr_factor(step: int, steps: int, cfg: OptimConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay to 0.

    >>> cfg = OptimConfig(warmup_steps=10, decay_fraction=0.5)
    >>> [round(lr_factor(s, 100, cfg), 2) for s in (0, 9, 50, 75, 99)]
    [0.1, 1.0, 1.0, 0.5, 0.02]
    """
    warm = min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    decay_steps = cfg.decay_fraction * steps
    if decay_steps > 0:
        warm = min(warm, (steps - step) / decay_steps)
    return warm


class AdamW:
    """PyTorch's fused AdamW, driven by hand.

    Its :class:`torch.optim.AdamW` imports the compiler and Triton: a second and 140 MB for those
    who never compile.

    Args:
        groups: each with ``params`` and ``weight_decay``; ``lr`` is set before every step.
        betas: decay rates of the two moments.
        eps: added to the root of the second.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        self.param_groups = groups
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._betas, self._eps = betas, eps

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            entries = [self._entry(p) for p in params]
            with torch.no_grad():
                adamw(
                    params,
                    [p.grad for p in params],
                    [entry["exp_avg"] for entry in entries],
                    [entry["exp_avg_sq"] for entry in entries],
                    [],
                    [entry["step"] for entry in entries],
                    fused=True,
                    amsgrad=False,
                    beta1=self._betas[0],
                    beta2=self._betas[1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=self._eps,
                    maximize=False,
                )

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _entry(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self.state:
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }
        return self.state[p]


class Optimizers:
    """One or two optimizers driven as one, with a common schedule.

    ``adamw`` takes every parameter; ``muon`` takes the matrices of the Transformer's blocks and
    leaves embeddings, head, norms and biases to AdamW.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig) -> None:
        self.cfg = cfg
        named = dict(model.named_parameters())
        matrices = {
            name: p
            for name, p in named.items()
            if cfg.optimizer == "muon" and p.ndim == 2 and name.startswith("blocks.")
        }
        rest = {name: p for name, p in named.items() if name not in matrices}
        decayed = [p for p in rest.values() if p.ndim >= 2]
        plain = [p for p in rest.values() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": cfg.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        adam = AdamW(groups, cfg.betas, cfg.eps)
        self._peaks: list[tuple[AdamW | torch.optim.Optimizer, float]] = [(adam, cfg.lr)]
        if matrices:
            muon = torch.optim.Muon(
                matrices.values(),
                lr=cfg.matrix_lr,
                weight_decay=cfg.weight_decay,
                momentum=cfg.momentum,
                nesterov=True,
            )
            self._peaks.append((muon, cfg.matrix_lr))
        self._names = {id(p): name for name, p in named.items()}

    def step(self, factor: float) -> None:
        """One update at ``factor`` times the peak learning rates; gradients are then cleared."""
        for optimizer, peak in self._peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for optimizer, _ in self._peaks:
            optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """All state tensors, named ``parameter/key``."""
        return {
            f"{self._names[id(p)]}/{key}": value
            for p, entry in self._entries()
            for key, value in entry.items()
            if isinstance(value, Tensor)
        }

    def load(self, state: dict[str, Tensor], source: object) -> None:
        """Restore :meth:`state`, bit for bit.

        Raises:
            CheckpointError: it is another optimizer's.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            parameter, key = name.rsplit("/", 1)
            by_name.setdefault(parameter, {})[key] = value
        for optimizer, _ in self._peaks:
            wanted = "momentum_buffer" if isinstance(optimizer, torch.optim.Muon) else "exp_avg"
            for group in optimizer.param_groups:
                for p in group["params"]:
                    name = self._names[id(p)]
                    entry = by_name.get(name)
                    if entry is not None:
                        if wanted not in entry:
                            raise CheckpointError(
                                f"{source} holds another optimizer's state of {name}; keep "
                                f"optim.optimizer as it was, or leave init-optimizer out"
                            )
                        optimizer.state[p] = {key: v.to(p.device) for key, v in entry.items()}

    def _entries(self) -> Iterable[tuple[Tensor, Any]]:
        for optimizer, _ in self._peaks:
            yield from optimizer.state.items()
