"""Which threads the Rust kernels use, and how many where that is not what PyTorch uses.

PyTorch's OpenMP runtime keeps its threads awake for milliseconds after a parallel operation, so the
kernels run on those same threads where the runtime can be found.

A parallel operation of PyTorch leaves OpenMP's threads spinning for milliseconds. In training that
does not matter; between the small products of decoding they take the core from the kernels'.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from bd3lm import _core

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


def _share_threads() -> None:
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    if address is not None:
        _core.use_openmp(address)


_share_threads()
