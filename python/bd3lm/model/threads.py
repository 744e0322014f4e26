"""Threads of the Rust kernels: those of PyTorch's OpenMP runtime.

That runtime's threads spin for milliseconds after a parallel operation, so a second thread pool
would get half a core. The kernels therefore run on the OpenMP team if the process has one.
"""

from __future__ import annotations

import ctypes

import torch

from bd3lm import _core


def kernel_threads() -> int:
    """Number of threads of a kernel: as many as PyTorch's operations use."""
    return torch.get_num_threads()


def _share_threads() -> None:
    # PyTorch loads its OpenMP runtime with global visibility.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    if address is not None:
        _core.use_openmp(address)


_share_threads()
