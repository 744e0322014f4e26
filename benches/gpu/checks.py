"""Sections that check results: smoke, numerics, and the tests of the repository."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

from common import (
    DEVICE,
    OUT,
    REHEARSE,
    ROOT,
    attempt,
    compiled_stats,
    errors,
    milliseconds,
    record,
)


def smoke() -> None:
    """Versions, the part, its two ceilings, and each kernel once."""
    import torch
    import triton

    facts: dict[str, Any] = {
        "python": sys.version.split()[0], "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "cpus": os.cpu_count(),
    }  # fmt: skip
    if DEVICE == "cuda":
        part = torch.cuda.get_device_properties(0)
        facts |= {
            "device": part.name, "sms": part.multi_processor_count, "l2": part.L2_cache_size,
            "memory_gib": round(part.total_memory / 2**30, 1),
            "capability": torch.cuda.get_device_capability(),
        }  # fmt: skip
    record("smoke", what="versions", ok=True, **facts)

    def extension() -> dict[str, Any]:
        import bd3lm._core as core  # noqa: TID251
        from bd3lm.model import attention

        backend = {name: b.available() for name, b in attention.BACKENDS.items()}
        return {"core": str(core.__file__), "backends": backend}

    attempt("smoke", "extension", extension)
    attempt("smoke", "first kernels", lambda: one_case("training", 64, "bf16", 200, 16))
    attempt("smoke", "head", head_case)
    attempt("smoke", "draw", draw_case)
    attempt("smoke", "compiled", lambda: {"kernels": compiled_stats()})
    if DEVICE == "cuda":
        attempt("smoke", "ceilings", ceilings)


def ceilings() -> dict[str, float]:
    """Rates of a large product and a large copy."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product = milliseconds(lambda: a @ b, 10)
    x = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    copy = milliseconds(lambda: y.copy_(x), 10)
    return {"bf16_tflops": 2 * 8192**3 / product / 1e9, "copy_tbps": 2 * (1 << 30) / copy / 1e9}


LIMITS = {"fp32": 5e-6, "bf16": 1e-2, "fp16": 2e-3}


def masks(small: bool) -> dict[str, tuple[Any, int, int, int]]:
    """Name -> (mask, batch, heads, key heads)."""
    import torch

    from bd3lm.model.attention import BlockMask

    n = 37 if small else 637
    documents = torch.full((2, n), -1, dtype=torch.int32)
    documents[0, : n // 3], documents[0, n // 3 : 5 * n // 6], documents[1] = 0, 1, 5
    big = (40 if small else 1024), (48 if small else 2000)
    return {
        "training": (BlockMask.training(n, 5), 1, 4, 2),
        "training S=16": (BlockMask.training(big[0], 16), 2, 3, 3),
        "training S=4": (BlockMask.training(big[0], 4), 1, 4, 4),
        "training S=64": (BlockMask.training(big[1], 64), 1, 2, 2),
        "training S=L": (BlockMask.training(n, n), 1, 2, 1),
        "training S=1": (BlockMask.training(n, 1), 1, 2, 1),
        "training documents": (BlockMask.training(n, 4, documents), 2, 4, 2),
        "denoise": (BlockMask.denoise(n, 64), 1, 4, 4),
        "denoise documents": (BlockMask.denoise(n, 8, documents), 2, 2, 1),
        "clean S=1": (BlockMask.clean(n, 1), 1, 4, 2),
        "clean S=L": (BlockMask.clean(n, n), 1, 2, 2),
        "clean documents": (BlockMask.clean(n, 6, documents), 2, 2, 2),
        "clean prefix": (BlockMask.clean(n, 4, first=n - n % 4 - 28), 1, 4, 2),
        "L=1": (BlockMask.training(1, 1), 1, 1, 1),
    }


def one_case(
    name: str | Any, width: int, dtype: str, length: int = 0, block: int = 0, batch: int = 1,
    heads: int = 2, kv_heads: int = 2, backend: str = "triton",
) -> dict[str, Any]:  # fmt: skip
    """Errors of one shape; outputs are poisoned first, so unwritten elements show."""
    from unittest import mock

    import torch

    from bd3lm.model.attention import BACKENDS, BlockMask, attend
    from bd3lm.model.attention.triton import launch

    mask = getattr(BlockMask, name)(length // (5 if REHEARSE else 1), block) \
        if isinstance(name, str) else name  # fmt: skip
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    torch.manual_seed(mask.seq_len * 1009 + mask.block_size + width)
    shapes = [(heads, mask.num_queries), *[(kv_heads, mask.num_keys)] * 2]
    mine = [
        torch.randn(batch, h, t, width, device=DEVICE).to(kind).requires_grad_() for h, t in shapes
    ]
    theirs = [x.detach().double().requires_grad_() for x in mine]
    wanted = attend(*theirs, mask, backend="dense")
    plain = launch.empty_rows

    def poisoned(x: Any) -> Any:
        return plain(x).fill_(float("nan"))

    with ExitStack() as patches:
        for owner in {"triton", backend}:
            module = importlib.import_module(f"bd3lm.model.attention.{owner}.launch")
            patches.enter_context(mock.patch.object(module, "empty_rows", poisoned))
        out = BACKENDS[backend].run(*mine, mask)
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, mine, dout)
    expected = torch.autograd.grad(wanted, theirs, dout.double())
    found = {"out": errors(out.detach(), wanted.detach())}
    for key, a, b in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        found[key] = errors(a, b)
    worst = max(e["max"] for e in found.values())
    return {"ok": worst <= 2 * LIMITS[dtype], "worst": worst, "errors": found}


def decode_case(width: int, dtype: str) -> dict[str, Any]:
    """Split decoding over a plain and over a paged cache."""
    import torch

    from bd3lm.model.attention import BlockMask, attend
    from bd3lm.model.attention.mask import CachedMask
    from bd3lm.model.attention.triton import cached_attention, paged_attention, triton_attention

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    torch.manual_seed(0)
    found = {}
    length, block, page = (540 if REHEARSE else 1104), 8, 16
    rows = 2 * block
    mask = BlockMask.clean(length, block, first=length - length % block - rows)
    length = mask.seq_len
    queries = mask.num_queries
    q = torch.randn(2, 4, queries, width, device=DEVICE).to(kind)
    k, v = (torch.randn(2, 2, length, width, device=DEVICE).to(kind) for _ in range(2))
    wanted = attend(q.double(), k.double(), v.double(), mask, backend="dense")
    found["plain"] = errors(triton_attention(q, k, v, mask), wanted)
    room = torch.full((2, 2, length + 200, width), float("nan"), device=DEVICE).to(kind)
    keys, values = room.clone(), room.clone()
    keys[:, :, :length], values[:, :, :length] = k, v
    end = mask.intervals(DEVICE).clean_hi
    found["cached"] = errors(cached_attention(q, keys, values, CachedMask(end)), wanted)
    if width % 16 == 0:
        count = -(-length // page)
        pages = torch.randperm(2 * count, device=DEVICE).int().view(2, count)
        pools = []
        for x in (k, v):
            padded = torch.nn.functional.pad(x, (0, 0, 0, count * page - length))
            pool = torch.empty(2 * count, 2, page, width, dtype=kind, device=DEVICE)
            pool[pages.flatten().long()] = (
                padded.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
            )
            pools.append(pool)
        lengths = torch.full((2,), length, dtype=torch.int32, device=DEVICE)
        found["paged"] = errors(paged_attention(q, *pools, pages, lengths, block), wanted)
    worst = max(e["max"] for e in found.values())
    return {"ok": worst <= LIMITS[dtype], "worst": worst, "errors": found}


def far_case() -> dict[str, Any]:
    """Rows so far apart that their offsets need 64 bits: 5 GB a tensor."""
    import torch

    from bd3lm.model.attention import BlockMask, attend
    from bd3lm.model.attention.triton import triton_attention

    mask = BlockMask.clean(1100, 4)
    step = 1 << 21
    room = torch.empty(1100 * step, dtype=torch.bfloat16, device="cuda")
    view = room.as_strided((1, 1, 1100, 64), (0, 0, step, 1))
    q = torch.randn(1, 1, 1100, 64, device="cuda").bfloat16()
    view.copy_(q)
    found = triton_attention(q, view, view, mask)
    wanted = attend(q.double(), q.double(), q.double(), mask, backend="dense")
    error = errors(found, wanted)
    return {"ok": error["max"] <= 1e-2, "worst": error["max"]}


def numerics(shard: int, shards: int) -> None:
    """Every shape against float64, by dtype and head width."""
    small = REHEARSE
    kinds = [
        ("bf16", 64), ("bf16", 128), ("bf16", 32), ("fp16", 64), ("bf16", 256), ("fp32", 64),
        ("bf16", 80), ("bf16", 192), ("bf16", 96), ("fp16", 128), ("fp32", 32), ("bf16", 40),
    ]  # fmt: skip
    if small:
        kinds = [("bf16", 16), ("fp32", 24)]
    for dtype, width in kinds[shard::shards]:
        for name, (mask, batch, heads, kv_heads) in masks(small).items():
            attempt(
                "numerics", name,
                lambda m=mask, b=batch, h=heads, kv=kv_heads, w=width, d=dtype: one_case(
                    m, w, d, batch=b, heads=h, kv_heads=kv
                ),
                dtype=dtype, width=width,
            )  # fmt: skip
        attempt("numerics", "decode", lambda w=width, d=dtype: decode_case(w, d),
                dtype=dtype, width=width)  # fmt: skip
    if shard == 0 and DEVICE == "cuda":
        attempt("numerics", "rows 2^31 apart", far_case)
        attempt("numerics", "same bits", same_bits)
    if DEVICE == "cuda":
        spilled = [k for k in compiled_stats() if k["spills"]]
        record("numerics", what="spills", ok=not spilled, spilled=spilled, shard=shard)


def same_bits(backend: str = "triton") -> dict[str, Any]:
    """Return whether three runs give the same bits."""
    import torch

    from bd3lm.model.attention import BACKENDS, BlockMask

    mask = BlockMask.training(1024, 16)
    torch.manual_seed(0)
    qkv = [torch.randn(4, 6, 2048, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    runs = []
    for _ in range(3):
        out = BACKENDS[backend].run(*qkv, mask)
        runs.append([out, *torch.autograd.grad(out, qkv, torch.ones_like(out))])
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    return {"ok": same}


def pytests() -> None:
    """The tests of tests/gpu except its oracle over all shapes, which runs above."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=9", "-p", "no:cacheprovider",
               "-m", "not slow", "tests/gpu", "-k", "not equals_float64"]  # fmt: skip
    with (OUT / "pytest.txt").open("w") as file:
        code = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    tail = (OUT / "pytest.txt").read_text()[-600:]
    record("pytest", what="tests/gpu", ok=code == 0, code=code, tail=tail)


def head_case() -> dict[str, Any]:
    """The head's loss and gradients, by chunks and our kernel, against float64."""
    import torch

    from bd3lm.model.head import HeadInputs, head_cross_entropy

    positions, width, vocab = (70, 16, 40) if REHEARSE else (9000, 256, 50258)
    torch.manual_seed(0)
    features = torch.randn(positions, width, device=DEVICE, requires_grad=True)
    weights = (torch.randn(vocab, width, device=DEVICE) * 0.1).requires_grad_()
    target = torch.randint(vocab - 1, (positions,), device=DEVICE)
    weight = torch.rand(positions, device=DEVICE)
    found = {}
    with torch.autocast(DEVICE, torch.bfloat16):
        inputs = HeadInputs(features, weights, None, target, weight, vocab - 1)
        loss, _ = head_cross_entropy(inputs)
    gradients = torch.autograd.grad(loss, (features, weights))
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (features, weights)]
    log_p = (rounded[0] @ rounded[1][:-1].T).log_softmax(-1)  # without the mask token
    wanted = -(log_p.gather(1, target[:, None]).squeeze(1) * weight.double()).sum()
    expected = torch.autograd.grad(wanted, rounded)
    found["loss"] = abs(loss.item() / wanted.item() - 1)
    found["features"], found["head"] = (
        errors(a, b)["norm"] for a, b in zip(gradients, expected, strict=True)
    )
    return {"ok": max(found.values()) <= 1e-2, "errors": found}


def draw_case() -> dict[str, Any]:
    """Tokens of our kernel against those of PyTorch's operations, way by way."""
    import torch

    from bd3lm.config import SampleConfig
    from bd3lm.sample.draw import composed_draw
    from bd3lm.sample.draw_triton import run_draw

    rows, vocab = (16, 70) if REHEARSE else (256, 50258)
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, device=DEVICE) * 3
    uniform = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    same = {}
    for way in ({"top_p": 1.0}, {"top_p": 0.9}, {"top_p": 1.0, "top_k": 40}, {"temperature": 0.0}):
        cfg = SampleConfig(**way)
        token, _ = run_draw(logits, uniform, cfg, None)
        wanted, _ = composed_draw(logits, uniform, cfg)
        same[str(way)] = (token == wanted).double().mean().item()
    return {"ok": min(same.values()) >= 0.99, "same": same}
