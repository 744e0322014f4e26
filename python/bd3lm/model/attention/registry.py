"""One entry point for attention, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from bd3lm.errors import ConfigError
from bd3lm.model.attention import flash, flex, rust, triton
from bd3lm.model.attention.dense import dense_attention, dense_cached
from bd3lm.model.attention.mask import BlockMask, CachedMask, Intervals

__all__ = [
    "AUTO",
    "BACKENDS",
    "Backend",
    "BlockMask",
    "CachedMask",
    "Intervals",
    "attend",
    "choose",
]


class Backend(NamedTuple):
    """A way to compute attention; nothing of it is probed or loaded before it is asked."""

    available: Callable[[], bool]
    """Whether this machine has what it needs."""
    supports: Callable[[Tensor, Tensor, Tensor, Any], bool]
    """Whether it takes these inputs."""
    run: Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]
    needs: str
    """What to say where it is not available."""
    limits: str
    """What to say where it does not take the inputs."""
    run_cached: Callable[[Tensor, Tensor, Tensor, CachedMask], Tensor] | None = None
    """The same over a cache whose length is on the device; None: it cannot."""

    def takes(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | CachedMask) -> bool:
        """Whether it computes this."""
        if isinstance(mask, CachedMask) and self.run_cached is None:
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
    "flash": Backend(flash.available, flash.supports, flash.attention, flash.NEEDS, flash.LIMITS),
    "flex": Backend(flex.available, flex.supports, flex.attention, flex.NEEDS, flex.LIMITS),
    "rust": Backend(lambda: True, rust.supports, rust.rust_attention, "", rust.LIMITS),
    "dense": Backend(
        lambda: True, lambda q, k, v, mask: True, dense_attention, "", "", dense_cached
    ),
}
# By kind of device, what "auto" tries, best first; dense takes everything.
AUTO: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "flex", "dense"),
    "cpu": ("rust", "dense"),
}


def choose(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | CachedMask, backend: str = "auto"
) -> Backend:
    """The backend of that name, or with ``auto`` the best one for these inputs.

    Raises:
        ConfigError: there is no such backend, or it cannot run here or on these inputs.
    """
    if backend == "auto":
        for name in AUTO.get(q.device.type, ()):
            if BACKENDS[name].available() and BACKENDS[name].takes(q, k, v, mask):
                return BACKENDS[name]
        return BACKENDS["dense"]
    if backend not in BACKENDS:
        raise ConfigError("attention", backend, f"one of auto, {', '.join(BACKENDS)}")
    found = BACKENDS[backend]
    if not found.available():
        raise ConfigError("attention", backend, f"one that runs here: {backend} {found.needs}")
    if not found.takes(q, k, v, mask):
        raise ConfigError("attention", backend, f"one that fits: {backend} {found.limits}")
    return found


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | CachedMask, backend: str = "auto"
) -> Tensor:
    """Attention of ``q`` over ``k, v`` under a block-diffusion mask.

    Args:
        q: queries [B, H, Tq, Dh]; with a :class:`BlockMask`, ``Tq = mask.num_queries``.
        k: keys [B, Hkv, Tk, Dh], ``Tk = mask.num_keys``; H is a multiple of Hkv.
        v: values, shaped as the keys.
        mask: the description of MATH §7 that every backend reads, or how far each query sees in
            a cache (``triton`` and ``dense`` alone).
        backend: a name in :data:`BACKENDS`, or ``auto``: what :data:`AUTO` lists for the device.

    Returns:
        [B, H, Tq, Dh], in the dtype of ``q``.

    Raises:
        ConfigError: ``backend`` names none, or one that cannot run here or on these inputs.
    """
    found = choose(q, k, v, mask, backend)
    if isinstance(mask, CachedMask):
        assert found.run_cached is not None
        return found.run_cached(q, k, v, mask)
    return found.run(q, k, v, mask)
