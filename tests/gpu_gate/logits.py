"""The kernels over rows of logits in Triton's interpreter: cross-entropy, and exact draws.

Called by ``interpret.py``; ``test_logits.py`` holds the results against their limits.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from cases import DTYPES
from torch import Tensor

from bd3lm.config import SampleConfig
from bd3lm.model.cross_entropy_triton import run_cross_entropy
from bd3lm.sample.draw import draw
from bd3lm.sample.draw_triton import run_draw

# Tail of a block alone, whole blocks alone, both; the interpreter's block holds 32.
VOCABS = (20, 64, 70)
WAYS: tuple[dict[str, Any], ...] = (
    {"top_p": 1.0},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1.0, "top_k": 1},
    {"top_p": 1.0, "top_k": 7},
    {"top_p": 0.6, "top_k": 12},
    {"top_p": 1.0, "top_k": 500},
    {"temperature": 0.0},
    {"temperature": 0.4, "top_p": 0.95},
    {"temperature": 3.0, "top_p": 0.5, "forbidden": (0, 3, 19)},
    {"top_p": 0.8, "repetition_penalty": 1.7},
    {"top_p": 1e-9},
)
LAW_ROWS = 512


def room(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random logits as a view of wider rows, and the columns past them, which stay NaN."""
    wide = torch.full((rows, vocab + 16), float("nan"), dtype=dtype)
    wide[:, :vocab] = torch.randn(rows, vocab) * 3
    return wide[:, :vocab], wide[:, vocab:]


def cross_entropy() -> dict[str, dict[str, float]]:
    """Errors of every dtype and vocabulary against float64: nats, and gradient over its largest."""
    found = {}
    for dtype, vocab in itertools.product(DTYPES, VOCABS):
        torch.manual_seed(vocab)
        logits, border = room(5, vocab, DTYPES[dtype])
        mask_id = (vocab - 1, 0, 33)[VOCABS.index(vocab)]
        target = (torch.arange(5) * 13 + 1) % (vocab - 2) + (mask_id == 0)
        target += (target == mask_id).long()
        weight = torch.tensor([0.0, 1.0, 0.25, 3.0, 1e-3])
        exact = logits.double().index_fill(1, torch.tensor(mask_id), -torch.inf).log_softmax(1)
        nats = -exact.gather(1, target[:, None]).squeeze(1)
        wanted = exact.exp() * weight[:, None].double()
        wanted.scatter_add_(1, target[:, None], -weight[:, None].double())
        plain = run_cross_entropy(logits, target, None, mask_id)
        again = run_cross_entropy(logits, target, weight, mask_id)
        found[f"{dtype} {vocab}"] = {
            "nats": ((plain - nats).abs().max() / nats.abs().max()).item(),
            "same": float(torch.equal(plain, again)),
            "gradient": ((logits - wanted).abs().max() / wanted.abs().max()).item(),
            "mask": logits[:, mask_id].float().abs().max().item(),
            "border": float(border.isnan().all()),
        }
    return found


def draws() -> dict[str, dict[str, float]]:
    """Tokens and log-probabilities against those of the Rust kernel, way by way."""
    found = {}
    for number, way in enumerate(WAYS):
        cfg = SampleConfig(**way)
        torch.manual_seed(number)
        # Rounded to bf16: many tokens share one logit, and their ids decide between them.
        logits = (torch.randn(24, VOCABS[number % 3]) * 3).bfloat16().float()
        logits[:, 5] = -torch.inf
        uniform = torch.rand(24, dtype=torch.float64)
        uniform[:3] = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
        seen = torch.rand(logits.shape) < 0.3 if cfg.repetition_penalty != 1 else None
        token, log_p = run_draw(logits, uniform, cfg, seen)
        wanted, wanted_log_p = draw(logits, uniform, cfg, seen)
        narrow = token if number % 2 else run_draw(logits.bfloat16(), uniform, cfg, seen)[0]
        found[str(way)] = {
            "same": (token == wanted).double().mean().item(),
            "narrow": (narrow == token).double().mean().item(),
            "log_p": (log_p - wanted_log_p).abs().max().item(),
            "impossible": float((token == 5).any()),
        }
    return found


def law() -> dict[str, list[float]]:
    """Number of draws of each token in :data:`LAW_ROWS` rows, and its exact probability."""
    cfg = SampleConfig(top_p=0.85, top_k=9, temperature=1.3, forbidden=(2,), repetition_penalty=1.4)
    torch.manual_seed(5)
    logits = torch.randn(1, 12)
    seen = torch.arange(12)[None] % 3 == 0
    rows = logits.expand(LAW_ROWS, -1).contiguous()
    uniform = torch.rand(LAW_ROWS, dtype=torch.float64)
    token, _ = run_draw(rows, uniform, cfg, seen.expand(LAW_ROWS, -1).contiguous())
    # The law from the Rust kernel, by an even grid of uniform numbers.
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    many = logits.expand(len(grid), -1)
    exact, _ = draw(many.contiguous(), grid, cfg, seen.expand(len(grid), -1))
    return {
        "drawn": torch.bincount(token, minlength=12).double().tolist(),
        "law": (torch.bincount(exact, minlength=12).double() / len(grid)).tolist(),
    }


def run() -> dict[str, Any]:
    """Figures that ``test_logits.py`` asserts."""
    torch.manual_seed(0)
    return {"cross_entropy": cross_entropy(), "draws": draws(), "law": law()}
