"""Which threads the Rust kernels run on: PyTorch's own.

PyTorch's OpenMP runtime keeps its threads awake for milliseconds after a parallel operation.
Threads of ours beside them would get half a core, so the kernels call that runtime wherever it can
be found.
"""

from __future__ import annotations

import ctypes

import torch

from bd3lm import _core


def kernel_threads() -> int:
    """How many threads a kernel uses: as many as PyTorch's operations."""
    return torch.get_num_threads()


def _share_threads() -> None:
    # PyTorch has loaded its runtime for everyone to see.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    if address is not None:
        _core.use_openmp(address)


_share_threads()
