"""Optimizers, gradient clipping and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.profiler import record_function

from bd3lm.config import OptimConfig
from bd3lm.training.adapters import trained_parameters
from bd3lm.training.orthogonal import orthogonalized
from bd3lm.training.shards import gradient_norms, is_sharded, local


def lr_factor(step: int, steps: int, cfg: OptimConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay to 0.

    Examples:
        >>> cfg = OptimConfig(warmup_steps=10, decay_fraction=0.5)
        >>> [round(lr_factor(s, 100, cfg), 2) for s in (0, 9, 50, 75, 99)]
        [0.1, 1.0, 1.0, 0.5, 0.02]
    """
    warm = min(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    decay_steps = cfg.decay_fraction * steps
    if decay_steps > 0:
        warm = min(warm, (steps - step) / decay_steps)
    return warm


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> tuple[Tensor, Tensor]:
    """Scale gradients to a global norm of at most ``limit``; all ranks that share them call this.

    Args:
        parameters: all with a gradient.
        limit: the largest norm.

    Returns:
        The norm of each gradient [P] and of all of them, before clipping.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = gradient_norms(grads)
    total = torch.linalg.vector_norm(norms)
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    parts = [local(grad) for grad in grads]
    torch._foreach_mul_(parts, factor)  # pyright: ignore[reportPrivateImportUsage]
    return norms, total


class Driver(Protocol):
    """One of PyTorch's optimizers, driven through its functional form."""

    param_groups: list[dict[str, Any]]
    """Each with ``params`` and ``weight_decay``; ``lr`` is set before every step, to a number or
    float32 [] on the device."""
    state: dict[Tensor, dict[str, Tensor]]
    """State of every parameter, complete from the start."""

    def step(self, finite: Tensor | None = None) -> None:
        """Update every parameter that has a gradient.

        Args:
            finite: a boolean on an accelerator; where it is false, nothing changes.
        """


class AdamW:
    """PyTorch's fused AdamW in its functional form.

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
        self._betas, self._eps = betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
            }
            for group in groups
            for p in group["params"]
        }

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> None:
        """Update every parameter that has a gradient; see :class:`Driver`."""
        found_inf = None if finite is None else (~finite).float()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            entries = [self.state[p] for p in params]
            adamw(
                [local(p) for p in params],
                [local(p.grad) for p in params],
                [local(entry["exp_avg"]) for entry in entries],
                [local(entry["exp_avg_sq"]) for entry in entries],
                [],
                [entry["step"] for entry in entries],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self._eps,
                maximize=False,
            )


class Muon:
    """Muon on whole matrices: momentum (Nesterov), orthogonalized by Newton-Schulz iterations.

    It computes what :class:`torch.optim.Muon` does. Besides, a step can be skipped on the device,
    matrices may be cut into shards, and the iterations run in the dtype of the run.

    Args:
        group: ``params``, all matrices, and ``weight_decay``; ``lr`` is set before every step.
        momentum: decay rate of the moment.
        dtype: of the iterations.
    """

    def __init__(
        self, group: dict[str, Any], momentum: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.param_groups = [group]
        self._momentum, self._dtype = momentum, dtype
        self.state: dict[Tensor, dict[str, Tensor]] = {
            p: {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}
            for p in group["params"]
        }

    @torch.no_grad()
    def step(self, finite: Tensor | None = None) -> None:
        """Update every parameter that has a gradient; see :class:`Driver`."""
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        with record_function("Optimizer.step#Muon.step"):
            if params and is_sharded(params[0]):
                self._update(group, params, finite)
                return
            for p in params:  # copies of one matrix at a time
                self._update(group, [p], finite)

    def _update(
        self, group: dict[str, Any], params: list[nn.Parameter], finite: Tensor | None
    ) -> None:
        directions = []
        for p in params:
            assert p.grad is not None
            grad, moment = local(p.grad), local(self.state[p]["momentum_buffer"])
            new = moment.lerp(grad, 1 - self._momentum)
            directions.append(grad.lerp(new, self._momentum))
            _keep(moment, new, finite)
        for p, step in zip(params, orthogonalized(directions, params, self._dtype), strict=True):
            rate = group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            weight = local(p)
            new = weight * (1 - group["lr"] * group["weight_decay"])
            if isinstance(rate, Tensor):
                new.addcmul_(step, rate, value=-1)
            else:
                new.add_(step, alpha=-rate)
            _keep(weight, new, finite)


def _keep(old: Tensor, new: Tensor, finite: Tensor | None) -> None:
    """Replace values in place, unless a flag on the device is false."""
    old.copy_(new if finite is None else torch.where(finite, new, old))


class Optimizers:
    """One or two optimizers driven as one, with a common schedule.

    ``adamw`` takes every parameter; ``muon`` takes the matrices of the Transformer's blocks and
    leaves embeddings, head, norms and biases to AdamW.

    Args:
        model: its parameters are updated, but for those that are frozen.
        cfg: the settings.
        dtype: of Muon's iterations.

    Attributes:
        host_decides: whether the host reads the flag that skips a step, or the device selects.
    """

    def __init__(
        self, model: nn.Module, cfg: OptimConfig, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.cfg = cfg
        self._named = trained_parameters(model)
        # On the CPU reading a flag is free, and copies are not; an accelerator is not waited for.
        self.host_decides = all(p.device.type == "cpu" for p in self._named.values())
        matrices = {
            name: p
            for name, p in self._named.items()
            if cfg.optimizer == "muon" and p.ndim == 2 and name.startswith("blocks.")
        }
        rest = {name: p for name, p in self._named.items() if name not in matrices}
        decayed = [p for p in rest.values() if p.ndim >= 2]
        plain = [p for p in rest.values() if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": cfg.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self._peaks: list[tuple[Driver, float]] = [(AdamW(groups, cfg.betas, cfg.eps), cfg.lr)]
        if matrices:
            group = {"params": list(matrices.values()), "weight_decay": cfg.weight_decay}
            self._peaks.append((Muon(group, cfg.momentum, dtype), cfg.matrix_lr))

    def step(self, factor: float, finite: Tensor | None = None) -> None:
        """Update once at ``factor`` times the peak learning rates, and clear the gradients.

        Args:
            factor: share of the peak learning rates.
            finite: see :meth:`apply`.
        """
        self.set_rates(factor)
        self.apply(finite)

    def set_rates(self, factor: float) -> None:
        """Set the learning rates to ``factor`` times their peaks."""
        for optimizer, peak in self._peaks:
            for group in optimizer.param_groups:
                rate = group.get("lr")
                if isinstance(rate, Tensor):
                    rate.fill_(peak * factor)
                else:
                    group["lr"] = peak * factor

    def hold_rates_on(self, device: torch.device) -> None:
        """Keep the learning rates on the device from now on, for steps that are replayed there."""
        for optimizer, _ in self._peaks:
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), dtype=torch.float32, device=device)

    def apply(self, finite: Tensor | None = None) -> None:
        """Update once, and clear the gradients.

        Args:
            finite: a boolean on the device of the gradients; where it is false, nothing but the
                gradients changes.
        """
        applied = True
        if finite is not None and self.host_decides:
            applied, finite = bool(finite), None
        for optimizer, _ in self._peaks:
            if applied:
                optimizer.step(finite)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for p in self._named.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All state tensors, named ``parameter/key``; a run that is resumed fills them."""
        entries = {p: e for optimizer, _ in self._peaks for p, e in optimizer.state.items()}
        return {
            f"{name}/{key}": value
            for name, p in self._named.items()
            for key, value in entries[p].items()
        }
