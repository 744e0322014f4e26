"""How many threads the Rust kernels use, where that is not what PyTorch uses.

A parallel operation of PyTorch leaves OpenMP's threads spinning for milliseconds. In training that
does not matter; between the small products of decoding they take the core from the kernels'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_threads: ContextVar[int | None] = ContextVar("threads", default=None)


def kernel_threads() -> int:
    """Threads of a kernel that is called now."""
    return _threads.get() or torch.get_num_threads()


@contextmanager
def only_kernels_in_parallel() -> Iterator[None]:
    """PyTorch's own operations run on the calling thread, kernels on as many as before."""
    before, outer = torch.get_num_threads(), _threads.set(kernel_threads())
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _threads.reset(outer)
