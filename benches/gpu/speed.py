"""Sections that time a training step and sampling."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from common import DEVICE, REHEARSE, WORK, attempt, milliseconds, record, sync
from kernels import PEAK
from learning import Quiet, random_model, sampler_of, splits


def step_config(attention: str, compiled: bool) -> Any:
    """The small preset at L = 1024."""
    from bd3lm.config import preset

    cfg = preset("demo" if REHEARSE else "small")
    if REHEARSE:
        cfg = dataclasses.replace(
            cfg, model=dataclasses.replace(cfg.model, width=32, heads=1, depth=2)
        )
    length, batch = (32, 1) if REHEARSE else (1024, 32)
    return dataclasses.replace(
        cfg, seq_len=length, block_size=16, batch_size=batch, micro_batch=None, steps=1000,
        device=DEVICE, precision="bf16", compile=compiled,
        attention="auto" if REHEARSE else attention,
    )  # fmt: skip


def trainer_of(data: Any, cfg: Any) -> Any:
    """A trainer whose notes, such as that of a failing compiler, are findings."""
    from bd3lm.model import transformer
    from bd3lm.training import Trainer

    class Recording(Quiet):
        def note(self, message: str) -> None:
            record("step", what="note", ok=not message.startswith(("compile", "cuda-graph")),
                   note=message)  # fmt: skip

    if REHEARSE:
        transformer.COMPILER = "aot_eager"
    out = Path(tempfile.mkdtemp(dir=WORK))
    return Trainer(cfg, data.train, data.valid, out, Recording())


def step_time(trainer: Any, warm: int, steps: int) -> dict[str, Any]:
    """Mean time of a step, the host running ahead as in training, and the host's own."""
    import torch

    from bd3lm.model.flops import step_flops

    cfg = trainer.cfg
    for _ in range(warm):
        trainer.step()
    sync()
    begun = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    host = (time.perf_counter() - begun) / steps
    sync()
    spent = (time.perf_counter() - begun) / steps
    trainer.batches.close()
    rate = step_flops(cfg, trainer.tokenizer.vocab_size) / spent
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    return {
        "ms": spent * 1e3, "host_ms": host * 1e3, "tflops": rate / 1e12, "mfu": rate / PEAK,
        "tokens_per_second": cfg.batch_size * cfg.seq_len / spent, "peak_gib": memory,
    }  # fmt: skip


def step() -> None:
    """Tokens a second and MFU of the whole step, and which kernels its time goes into."""
    data = splits()
    warm, steps = (1, 1) if REHEARSE else (5, 15)

    def run(attention: str, compiled: bool, profiled: bool) -> dict[str, Any]:
        import torch

        trainer = trainer_of(data, step_config(attention, compiled))
        try:
            found = step_time(trainer, warm, steps)
            if profiled:
                attempt("step", f"profile {attention} {compiled}", lambda t=trainer: profile(t))
            return found
        finally:
            trainer.batches.close()
            trainer = None
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    attempt("step", "triton", lambda: run("triton", False, False))
    attempt("step", "triton, compiled", lambda: run("triton", True, True))
    attempt("step", "flex, compiled", lambda: run("flex", True, True))
    warm, steps = (1, 1) if REHEARSE else (12, 30)  # a graph is recorded when its size comes again
    for name, recorded in (("tiny", False), ("tiny, recorded", True)):
        attempt("step", name, lambda g=recorded, w=warm, n=steps: step_time(
            tiny_trainer(data, g), w, n), B=32, L=128)  # fmt: skip
    warm, steps = (1, 1) if REHEARSE else (3, 8)
    for views in (1, 2):
        attempt("step", "joint", lambda v=views, w=warm, n=steps: step_time(
            joint_trainer(data, v), w, n), views=views)  # fmt: skip


def joint_trainer(data: Any, views: int) -> Any:
    """A trainer of small with the objective of joint, not compiled."""
    from bd3lm.config import NoiseConfig, ObjectiveConfig

    cfg = step_config("triton", compiled=False)
    cfg = dataclasses.replace(
        cfg, batch_size=1 if REHEARSE else 16, noise=NoiseConfig(),
        objective=ObjectiveConfig(ar_weight=1.0, views=views),
        model=dataclasses.replace(cfg.model, clean_stream="causal", previous_tokens=2),
    )  # fmt: skip
    return trainer_of(data, cfg)


def tiny_trainer(data: Any, recorded: bool) -> Any:
    """A step of 4096 tokens, which a host launches more slowly than a GPU runs it."""
    from bd3lm.config import preset

    cfg = step_config("triton", not REHEARSE)
    model = cfg.model if REHEARSE else preset("tiny").model
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(model, softmax_cutoffs=()), cuda_graph=recorded,
        seq_len=cfg.seq_len if REHEARSE else 128, batch_size=2 if REHEARSE else 32,
    )  # fmt: skip
    return trainer_of(data, cfg)


def profile(trainer: Any) -> dict[str, Any]:
    """The kernels of two steps, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with watch(activities=kinds) as watched:
        for _ in range(2):
            trainer.step()
        sync()
    rows = [
        (e.key[:90], e.self_device_time_total / 2e3, e.count // 2)
        for e in watched.key_averages()
        if e.self_device_time_total > 0
    ]
    rows.sort(key=lambda row: -row[1])
    total = sum(row[1] for row in rows)
    return {"device_ms_a_step": total, "kernels": [[n, round(t, 3), c] for n, t, c in rows[:35]]}


def warm_step() -> None:
    """Compile the blocks of both training steps into the caches."""
    if REHEARSE:
        return
    data = splits()

    def run(trainer: Any) -> None:
        trainer.step()
        sync()
        trainer.batches.close()

    attempt("warm_step", "small", lambda: run(trainer_of(data, step_config("triton", True))))
    attempt("warm_step", "tiny", lambda: run(tiny_trainer(data, recorded=False)))


def speed() -> None:
    """Tokens a second of the small model, and how long a forward and a draw take by themselves."""
    import torch

    from bd3lm.config import SampleConfig
    from bd3lm.model import DecodeStep, KVCache
    from bd3lm.sample.draw_triton import run_draw

    model = random_model("small", bf16=True)
    length = 8 if REHEARSE else 128
    window = 16 if REHEARSE else 1024
    autocast = torch.autocast(DEVICE, torch.bfloat16)

    def rows(batch: int, block: int, replay: bool, top_p: float) -> dict[str, Any]:
        cfg = SampleConfig(length=length, top_p=top_p)
        sampler = sampler_of(model, block, window, replay)
        with autocast:
            begun = time.perf_counter()
            sampler.generate(cfg, [[]] * batch)
            first = time.perf_counter() - begun
            begun = time.perf_counter()
            sampler.generate(cfg, [[]] * batch)
            spent = time.perf_counter() - begun
        return {"tokens_per_second": batch * (length - 1) / spent, "first_s": first, "s": spent}

    grid = [(1, 4, True, 1.0), (32, 4, True, 1.0), (32, 4, True, 0.9), (32, 4, False, 1.0),
            (1, 4, False, 1.0), (128, 16, True, 1.0)]  # fmt: skip
    for batch, block, replay, top_p in grid[:1] if REHEARSE else grid:
        attempt("speed", "rows", lambda b=batch, s=block, r=replay, p=top_p: rows(b, s, r, p),
                B=batch, S=block, replay=replay, top_p=top_p)  # fmt: skip

    def parts(batch: int, block: int, filled: int) -> dict[str, Any]:
        found = {}
        with torch.inference_mode(), autocast:
            cache = KVCache(model.cfg, batch, window, torch.device(DEVICE))
            for tensor in (*cache.k, *cache.v):
                tensor.normal_()
            cache.length = filled
            step = DecodeStep(model, cache, block, model.logits)
            ids = torch.randint(2, model.vocab_size, (batch, block), device=DEVICE)
            select = torch.arange(batch, device=DEVICE) * block
            found["forward_ms"] = milliseconds(lambda: step(ids, select), 20)
            logits = step(ids, select).clone()
            numbers = torch.rand(batch, dtype=torch.float64, device=DEVICE)
            for top_p in (1.0, 0.9):
                cfg = SampleConfig(top_p=top_p)
                found[f"draw_ms_{top_p}"] = milliseconds(
                    lambda c=cfg: run_draw(logits, numbers, c, None), 10)  # fmt: skip
        weights = sum(p.numel() for p in model.parameters())
        found["bytes_floor_ms_bf16"] = 2 * weights / 3.35e9
        return found

    for batch, block in ((1, 4), (32, 4), (128, 16))[: 1 if REHEARSE else 3]:
        attempt("speed", "parts", lambda b=batch, s=block: parts(b, s, window // 2),
                B=batch, S=block)  # fmt: skip
