"""Sections that train and sample small models, against the losses of a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import DEVICE, HERE, REHEARSE, WORK, attempt, errors

TINY_STEPS, DEMO_STEPS, JOINT_STEPS = 60, 200, 60
SHAPING = (
    "system", "seq_len", "block_size", "steps", "batch_size", "micro_batch", "seed", "precision",
    "packing", "shuffle", "init_unigram", "model", "noise", "objective", "optim", "eval",
)  # fmt: skip
"""Settings that a curve depends on."""


class Quiet:
    """A reporter that says nothing."""

    def step(self, done: int, metrics: dict[str, float]) -> None: ...
    def validation(self, step: int, result: object) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...
    def note(self, message: str) -> None: ...


def curve_configs() -> dict[str, Any]:
    """Models that are trained on both devices; without dropout, whose generators differ."""
    from bd3lm.config import ObjectiveConfig, preset

    tiny = preset("tiny")
    tiny = dataclasses.replace(
        tiny, seq_len=128, block_size=4, batch_size=8, micro_batch=None, steps=TINY_STEPS,
        precision="fp32", compile=False, model=dataclasses.replace(tiny.model, dropout=0.0),
        optim=dataclasses.replace(tiny.optim, lr=1e-3, warmup_steps=10),
    )  # fmt: skip
    demo = preset("demo")
    demo = dataclasses.replace(
        demo, steps=DEMO_STEPS, batch_size=8, block_size=16, precision="fp32", compile=False,
        init_unigram=False,
        model=dataclasses.replace(demo.model, dropout=0.0),
        eval=dataclasses.replace(demo.eval, every=0),
    )  # fmt: skip
    joint = dataclasses.replace(
        demo, steps=JOINT_STEPS, block_size=4,
        model=dataclasses.replace(demo.model, clean_stream="causal", previous_tokens=2),
        objective=ObjectiveConfig(ar_weight=1.0, block_sizes=(2, 4, 16), views=2),
    )  # fmt: skip
    curves = {"demo": demo, "tiny": tiny, "joint": joint}
    if not REHEARSE:
        return curves
    small = {"width": 32, "heads": 1, "depth": 1}
    return {
        name: dataclasses.replace(
            c, batch_size=2, seq_len=32, steps=1, model=dataclasses.replace(c.model, **small)
        )
        for name, c in curves.items()
    }


def splits() -> Any:
    """The shipped text, prepared."""
    from bd3lm.data.resolve import open_splits

    folder = Path(tempfile.mkdtemp(dir=WORK))
    return open_splits(None, None, "default", folder, lambda note: None)


def losses(
    cfg: Any, data: Any, device: str, *, validated: bool = not REHEARSE
) -> tuple[list[float], float, float | None]:
    """The loss of every step, milliseconds a step, and nats a token of the validation split."""
    import torch

    from bd3lm.training import Trainer

    out = Path(tempfile.mkdtemp(dir=WORK))
    trainer = Trainer(dataclasses.replace(cfg, device=device), data.train, data.valid, out, Quiet())
    begun = time.perf_counter()
    values = torch.stack([trainer.step()[0] for _ in range(cfg.steps)]).tolist()  # waits once
    spent = (time.perf_counter() - begun) / cfg.steps * 1e3
    trainer.batches.close()
    return values, spent, trainer.validate(quick=True).nelbo if validated else None


def curve_settings(cfg: Any) -> dict[str, Any]:
    """The settings that a curve depends on, as its file keeps them."""
    from bd3lm.config import to_dict

    values = to_dict(cfg)
    return {name: values[name] for name in SHAPING}


def stale_curves() -> list[str]:
    """Curves whose settings are not today's; a setting that the file lacks had its default."""
    from bd3lm.config import TrainConfig
    from bd3lm.config.serialize import from_dict

    known = json.loads((HERE / "cpu_curve.json").read_text())
    wanted = {name: curve_settings(cfg) for name, cfg in curve_configs().items()}
    return [
        name
        for name in sorted(wanted.keys() | known.keys())
        if name not in wanted
        or name not in known
        or curve_settings(from_dict(TrainConfig, known[name]["settings"])) != wanted[name]
        or len(known[name]["losses"]) != wanted[name]["steps"]
    ]


def curve(only: list[str] | None) -> None:
    """Write the losses of the CPU and the settings they belong to next to this file."""
    WORK.mkdir(parents=True, exist_ok=True)
    data = splits()
    path = HERE / "cpu_curve.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, cfg in curve_configs().items():
        if only and name not in only:
            continue
        values, spent, nelbo = losses(cfg, data, "cpu")
        rounded = [round(v, 6) for v in values]
        known[name] = {"settings": curve_settings(cfg), "losses": rounded, "nelbo": nelbo}
        path.write_text(json.dumps(known) + "\n")
        print(name, spent, values[:3], values[-3:], flush=True)


def train() -> None:
    """Train in fp32 and bf16, each loss next to the CPU's."""
    data = splits()
    path = HERE / "cpu_curve.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for name, precision in itertools.product(("tiny", "demo", "joint"), ("fp32", "bf16")):
        cfg = dataclasses.replace(curve_configs()[name], precision=precision)

        def run(cfg: Any = cfg, name: str = name, p: str = precision) -> dict[str, Any]:
            mine, spent, nelbo = losses(cfg, data, DEVICE)
            found: dict[str, Any] = {"ms_a_step": spent, "nelbo": nelbo, "losses": mine[::10]}
            if name in known and not REHEARSE:  # a rehearsal trains smaller models
                theirs = known[name]["losses"]
                apart = [abs(a - b) / b for a, b in zip(mine, theirs, strict=True)]
                found |= {
                    "first": apart[0], "first_20": max(apart[:20]), "largest": max(apart),
                    "mean_last_50": sum(mine[-50:]) / len(mine[-50:]),
                    "cpu_last_50": sum(theirs[-50:]) / len(theirs[-50:]),
                    "cpu_nelbo": known[name]["nelbo"],
                }  # fmt: skip
                limit = 2e-4 if p == "fp32" else 5e-3
                limit *= 5 if name != "tiny" else 1  # Muon's bf16 iterations magnify rounding
                found["ok"] = apart[0] <= limit and max(apart[:20]) <= 20 * limit
            return found

        attempt("train", f"{name} {precision}", run)
    attempt("train", "tiny recorded", lambda: recorded_losses(data))


def recorded_losses(data: Any) -> dict[str, Any]:
    """The losses of a step that is replayed as a CUDA graph, and of the same step launched."""
    cfg = dataclasses.replace(curve_configs()["tiny"], steps=2 if REHEARSE else 40)
    replayed = dataclasses.replace(cfg, cuda_graph=True)
    wanted, launched, _ = losses(cfg, data, DEVICE, validated=False)
    found, spent, _ = losses(replayed, data, DEVICE, validated=False)
    apart = [abs(a - b) / b for a, b in zip(found, wanted, strict=True)]
    return {
        "ok": apart[0] <= 1e-5 and max(apart) <= 4e-3, "largest": max(apart),
        "ms_a_step": spent, "launched_ms_a_step": launched,
    }  # fmt: skip


def random_model(preset_name: str, bf16: bool = False) -> Any:
    """A model with random weights everywhere, prepared for inference."""
    import torch

    from bd3lm.config import ModelConfig, preset
    from bd3lm.model import Transformer, for_inference

    cfg = ModelConfig(width=32, depth=1, heads=1) if REHEARSE else preset(preset_name).model
    vocab = 60 if REHEARSE else 50258
    torch.manual_seed(0)
    model = Transformer(cfg, vocab).to(DEVICE)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.02 if "ada" not in name else 0.002)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return for_inference(model.eval(), torch.bfloat16 if bf16 else torch.float32)


def sampler_of(model: Any, block: int, window: int, replay: bool) -> Any:
    """A sampler whose rows do not end early: EOS is an id that is never drawn."""
    from bd3lm.sample import Sampler
    from bd3lm.systems import BlockDiffusion

    system = BlockDiffusion(block, 1)
    return Sampler(model, system, window=window, bos_id=0, eos_id=-7, replay=replay)


def sample() -> None:
    """A replayed forward against ``encode``; a row drawn by either way."""
    import torch

    model = random_model("tiny")
    vocab = model.vocab_size

    def forwards(precision: str) -> dict[str, Any]:
        from bd3lm.model import DecodeStep, KVCache

        block, rows, window = 4, 3, (32 if REHEARSE else 1024)
        device = torch.device(DEVICE)
        worst = 0.0
        ids = torch.randint(2, vocab, (rows, window), device=device)
        every = torch.arange(rows * block, device=device)
        last = every // block * 2 * block + block + every % block
        autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), autocast:
            mine, theirs = (KVCache(model.cfg, rows, window, device) for _ in range(2))
            start = window // 2
            for cache in (mine, theirs):
                model.encode(ids[:, :start], block, select=every[:0], cache=cache, commit=start)
            step = DecodeStep(model, mine, block, model.logits)
            for _ in range(3):
                for length, select, commit in ((2 * block, last, block), (block, every, 0)):
                    now = ids[:, mine.length : mine.length + length]
                    found = step(now, select, commit=commit).clone()
                    features = model.encode(now, block, select=select, cache=theirs, commit=commit)
                    wanted = model.logits(features).double()
                    worst = max(worst, errors(found, wanted)["max"])
        return {"ok": worst <= (1e-5 if precision == "fp32" else 2e-2), "worst": worst}

    for precision in ("fp32", "bf16"):
        attempt("sample", f"replayed forward {precision}", lambda p=precision: forwards(p))

    def rows(precision: str, **how: Any) -> dict[str, Any]:
        from bd3lm.config import SampleConfig

        length, count = (8, 2) if REHEARSE else (96, 5)
        cfg = SampleConfig(length=length, **how)
        autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16")
        drawn = []
        for replay in (True, False):
            sampler = sampler_of(model, 4, 16 if REHEARSE else 256, replay)
            with autocast:
                drawn.append(sampler.generate(cfg, [[]] * count))
        pairs = [
            (a, b) for x, y in zip(*drawn, strict=True) for a, b in zip(x.ids, y.ids, strict=True)
        ]
        same = sum(a == b for a, b in pairs) / len(pairs)
        return {"same": same, "ok": same == 1.0 or precision == "bf16"}

    for precision, how in (("fp32", {}), ("fp32", {"top_p": 1.0}), ("bf16", {}),
                           ("fp32", {"threshold": 0.01})):  # fmt: skip
        attempt("sample", f"rows {precision} {how}", lambda p=precision, h=how: rows(p, **h))
