"""Write the scaling table of guides/several-gpus.md: ``python docs/scaling.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bd3lm.checkpoint.tensors import empty_model
from bd3lm.config import ModelConfig, ParallelConfig, TrainConfig
from bd3lm.model.scaling import RankCost, rank_cost

PAGE = Path(__file__).with_name("guides") / "several-gpus.md"
BEGIN, END = "<!-- scaling -->\n", "<!-- /scaling -->\n"
RANKS = (8, 64, 512)
MACHINE = 8
"""GPUs of a machine."""
MFU, PEAK = 0.4, 989e12
"""Assumed share of the bf16 peak of an H100's data sheet."""
INSIDE, BETWEEN = 450e9, 50e9
"""Bytes a second out of one GPU: NVLink in a machine of eight, 400 Gbit/s between machines."""

_QWEN = {
    "mlp": "swiglu",
    "norm": "rmsnorm",
    "qk_norm": True,
    "mlp_bias": False,
    "head_bias": False,
    "cond_width": 0,
}
MODELS: dict[str, tuple[ModelConfig, int, int, bool]] = {
    "170M": (ModelConfig(width=768, depth=12, heads=12, cond_width=128), 50_258, 8, False),
    "1.5B": (
        ModelConfig(
            width=1536,
            depth=28,
            heads=12,
            kv_heads=2,
            mlp_width=8960,
            tied_embeddings=True,
            **_QWEN,  # type: ignore[arg-type]
        ),
        151_936,
        4,
        True,
    ),
    "8B": (
        ModelConfig(width=4096, depth=36, heads=32, kv_heads=8, mlp_width=12288, **_QWEN),  # type: ignore[arg-type]
        151_936,
        8,
        True,
    ),
}
"""Shape, V, rows of a forward at most, and whether activations are computed again."""
WAYS = [("170M", "ddp"), ("1.5B", "ddp"), ("1.5B", "fsdp"), ("8B", "fsdp"), ("8B", "hsdp")]
"""hsdp: fsdp with a copy of the model on each machine."""


def cost(name: str, way: str, ranks: int) -> RankCost:
    """Cost of a model in steps of 512 rows of 4096 tokens."""
    shape, vocabulary, micro, recompute = MODELS[name]
    cfg = TrainConfig(
        seq_len=4096,
        batch_size=512,
        micro_batch=micro,
        recompute=recompute,
        model=shape,
        parallel=ParallelConfig(
            strategy="ddp" if way == "ddp" else "fsdp",
            replicas=ranks // MACHINE if way == "hsdp" else 1,
        ),
    )
    return rank_cost(cfg, empty_model(shape, vocabulary), ranks)


def rows() -> Iterator[str]:
    """Rows of the table."""
    for name, way in WAYS:
        for ranks in RANKS[1:] if way == "hsdp" else RANKS:
            found = cost(name, way, ranks)
            near = INSIDE if ranks <= MACHINE or way == "hsdp" else BETWEEN
            far = INSIDE if ranks <= MACHINE else BETWEEN
            seconds = found.flops / (MFU * PEAK), found.sent / near + found.sent_far / far
            parts = (found.state, found.working, found.activations, found.memory)
            numbers = [f"{n / 1e9:.1f}" for n in (*parts, found.sent, found.sent_far)]
            cells = [name, way, str(ranks), *numbers, *(f"{s:.2f}" for s in seconds)]
            yield "| " + " | ".join(cells) + " |"


def table() -> str:
    """The table."""
    heads = "model, , GPUs, state, in use, activations, GB in all, GB sent in a copy, between, "
    heads += "s of products, s of traffic"
    names = heads.split(", ")
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|", *rows()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table in its place."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
