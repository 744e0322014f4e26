"""Attention backends and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from bd3lm.errors import ConfigError
from bd3lm.model.attention import flash, flex, hopper, rust, triton
from bd3lm.model.attention.dense import dense_attention, dense_cached, dense_ranges
from bd3lm.model.attention.mask import BlockMask, CachedMask, Intervals, RangeMask

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "BlockMask",
    "CachedMask",
    "Intervals",
    "RangeMask",
    "attend",
    "choose",
]


Mask = BlockMask | CachedMask | RangeMask


class Backend(NamedTuple):
    """A way to compute attention; probed and loaded only when it is used."""

    available: Callable[[], bool]
    """True if this machine can run it."""
    supports: Callable[[Tensor, Tensor, Tensor, Any], bool]
    """True if it takes these inputs."""
    run: Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]
    """Attention under a :class:`BlockMask`, with gradients."""
    needs: str
    """Error text for a machine that cannot run it."""
    limits: str
    """Error text for inputs that it does not take."""
    run_cached: Callable[[Tensor, Tensor, Tensor, CachedMask], Tensor] | None = None
    """Attention over a cache whose length is held on the device; None: not supported."""
    run_ranges: Callable[[Tensor, Tensor, Tensor, RangeMask], Tensor] | None = None
    """Attention over any ranges of keys, without gradients; None: not supported."""
    suits: Callable[[Tensor, Tensor, Tensor, Any], bool] = lambda q, k, v, mask: True
    """True if ``auto`` may take it for inputs that it supports."""

    def takes(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> bool:
        """Return whether it computes this."""
        if isinstance(mask, CachedMask) and self.run_cached is None:
            return False
        if isinstance(mask, RangeMask) and self.run_ranges is None:
            return False
        return self.supports(q, k, v, mask)


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        triton.available,
        triton.supports,
        triton.triton_attention,
        triton.NEEDS,
        triton.LIMITS,
        triton.cached_attention,
    ),
    "hopper": Backend(
        hopper.available,
        triton.supports,
        hopper.hopper_attention,
        hopper.NEEDS,
        triton.LIMITS,
        triton.cached_attention,
    ),
    "flash": Backend(flash.available, flash.supports, flash.attention, flash.NEEDS, flash.LIMITS),
    "flex": Backend(
        flex.available,
        flex.supports,
        flex.attention,
        flex.NEEDS,
        flex.LIMITS,
        suits=flex.suits,
    ),
    "flex-fa4": Backend(
        flex.fa4_available,
        flex.fa4_supports,
        flex.fa4_attention,
        flex.FA4_NEEDS,
        flex.FA4_LIMITS,
    ),
    "rust": Backend(
        lambda: True,
        rust.supports,
        rust.rust_attention,
        "",
        rust.LIMITS,
        run_ranges=rust.range_attention,
    ),
    "dense": Backend(
        lambda: True,
        lambda q, k, v, mask: True,
        dense_attention,
        "",
        "",
        dense_cached,
        dense_ranges,
    ),
}
# Backends that "auto" tries on each kind of device, in order; dense takes every input. On CUDA
# FlexAttention comes first, because our kernels have not run on a GPU yet (docs/gpu.md).
AUTO: dict[str, tuple[str, ...]] = {
    "cuda": ("flex", "triton", "dense"),
    "cpu": ("rust", "dense"),
}


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str = "auto") -> Backend:
    """Return the backend of that name, or with ``auto`` the first of :data:`AUTO` that fits.

    Raises:
        ConfigError: there is no such backend, or it cannot run here or on these inputs.
    """
    if backend == "auto":
        for name in AUTO.get(q.device.type, ()):
            found = BACKENDS[name]
            inputs = q, k, v, mask
            if found.available() and found.takes(*inputs) and found.suits(*inputs):
                return found
        return BACKENDS["dense"]
    if backend not in BACKENDS:
        raise ConfigError("attention", backend, f"one of auto, {', '.join(BACKENDS)}")
    found = BACKENDS[backend]
    if not found.available():
        raise ConfigError("attention", backend, f"one that runs here: {backend} {found.needs}")
    if not found.takes(q, k, v, mask):
        raise ConfigError("attention", backend, f"one that fits: {backend} {found.limits}")
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str = "auto") -> Tensor:
    """Attention of ``q`` over ``k, v`` under a block-diffusion mask.

    Args:
        q: queries [B, H, Tq, Dh]; with a :class:`BlockMask`, ``Tq = mask.num_queries``.
        k: keys [B, Hkv, Tk, Dh], ``Tk = mask.num_keys``; H is a multiple of Hkv.
        v: values, shaped as the keys.
        mask: the mask (docs/math.md §7); or the end of each query's keys in a cache (``triton``,
            ``hopper`` and ``dense`` only); or any ranges (``rust`` and ``dense`` only).
        backend: a name in :data:`BACKENDS`, or ``auto`` (see :data:`AUTO`).

    Returns:
        [B, H, Tq, Dh], in the dtype of ``q``.

    Raises:
        ConfigError: ``backend`` names none, or one that cannot run here or on these inputs.
    """
    found = choose(q, k, v, mask, backend)
    if isinstance(mask, CachedMask):
        assert found.run_cached is not None
        return found.run_cached(q, k, v, mask)
    if isinstance(mask, RangeMask):
        assert found.run_ranges is not None
        return found.run_ranges(q, k, v, mask)
    return found.run(q, k, v, mask)
