"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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


class Optimizers:
    """One or two torch optimizers driven as one, with a common schedule.

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
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        self._peaks: list[tuple[torch.optim.Optimizer, float]] = [(adamw, cfg.lr)]
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
            optimizer.zero_grad(set_to_none=True)

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

    def _entries(self) -> Iterable[tuple[Tensor, dict[str, object]]]:
        for optimizer, _ in self._peaks:
            yield from optimizer.state.items()
