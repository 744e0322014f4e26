"""Device and precision of a run."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bd3lm.config import TrainConfig, check
from bd3lm.data.prepare import available_threads
from bd3lm.model.attention import BlockMask, choose


def resolve_device(name: str) -> torch.device:
    """Resolve a device name; ``auto`` is CUDA if there is one.

    PyTorch's threads are limited to those that this process may run at once.

    Raises:
        ConfigError: a device that PyTorch does not know or that is not there.
    """
    limit_threads()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    check(device.type in ("cpu", "cuda"), "device", name, allowed)
    check(
        device.type != "cuda" or torch.cuda.is_available(),
        "device",
        name,
        "cpu or auto: this PyTorch sees no CUDA device",
    )
    if device.index is not None and device.type == "cuda":
        count = torch.cuda.device_count()
        check(device.index < count, "device", name, f"below cuda:{count}")
        torch.cuda.set_device(device)  # allocations that name no device go there, too
    return device


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait for earlier work of a GPU.

    Only a copy from page-locked memory is queued behind that work.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def limit_threads() -> None:
    """Give PyTorch no more threads than the process may run at once.

    PyTorch counts the cores of the affinity mask. It does not see the quota of a container, which
    stops all threads for the rest of a period once they have used it up. A number of threads in
    ``OMP_NUM_THREADS`` is kept.
    """
    limit = available_threads()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > limit:
        torch.set_num_threads(limit)


def check_attention(cfg: TrainConfig, device: torch.device) -> None:
    """Check that the attention backend of a run works on this device.

    Raises:
        ConfigError: it is not available here, or does not take such heads or this precision.
    """
    with autocast(cfg, device):
        cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if cast else torch.float32
    q = torch.empty(1, 1, 2, cfg.model.head_width, device=device, dtype=dtype)
    choose(q, q, q, BlockMask.clean(2, 1), cfg.attention)


def keep_freed_memory() -> None:
    """Keep freed memory in the process (glibc's ``mallopt``).

    By default glibc returns large blocks to the system, which costs the tiny model 38,000 page
    faults and 7% of the time of a step. Blocks that it maps on their own are returned at any size,
    so mapping is turned off.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def peak_memory(device: torch.device) -> int:
    """Peak of the memory in use, in bytes: tensors on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def has_bf16(device: torch.device) -> bool:
    """Return whether matrix products in bf16 are faster than in fp32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than our oldest torch
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def compute_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype:
    """Dtype of the matrix products of a run."""
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and has_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


def autocast(cfg: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Autocast context of a run; off for fp32."""
    bf16 = compute_dtype(cfg, device) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def inference(
    cfg: TrainConfig, device: torch.device
) -> tuple[torch.dtype, AbstractContextManager[object]]:
    """Precision of a trained model, as ``cfg`` names it.

    Returns:
        The dtype of the matrices (see :func:`bd3lm.model.for_inference`), and the autocast context
        for devices other than the CPU.
    """
    if device.type == "cpu":
        # A run may train in emulated bf16; inference is then float32.
        bf16 = has_bf16(device) and compute_dtype(cfg, device) == torch.bfloat16
        return torch.bfloat16 if bf16 else torch.float32, nullcontext()
    return compute_dtype(cfg, device), autocast(cfg, device)
