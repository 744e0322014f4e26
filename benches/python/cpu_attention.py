"""Forward + backward of the Rust CPU attention against dense SDPA and the best pure PyTorch form.

    python benches/python/cpu_attention.py --threads 1 2 --rounds 9 [--out FILE]

The three are timed in turn within each round, so that a busy machine slows all of them; what is
reported is the median over rounds of the ratio within a round. Every case is first checked
against the dense result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, seconds, write
from torch import Tensor

from bd3lm.model.attention import BlockMask, rust

aten = torch.ops.aten


class Case(NamedTuple):
    """One shape: batch, heads, sequence, head width, block and dtype."""

    batch: int
    heads: int
    seq_len: int
    width: int
    block: int
    dtype: str


CASES = [
    Case(64, 8, 128, 32, 4, "float32"),
    Case(64, 8, 128, 32, 16, "float32"),
    Case(64, 8, 128, 32, 128, "float32"),
    Case(4, 8, 1024, 32, 16, "float32"),
    Case(4, 12, 1024, 64, 16, "float32"),
    Case(64, 8, 128, 32, 16, "bfloat16"),
    Case(4, 8, 1024, 32, 16, "bfloat16"),
]


class Part(NamedTuple):
    """Rows [n, tq] that attend to rows [n, tk], under a mask [n, 1, tq, tk] or all of them."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


def hierarchy(seq_len: int, block: int, leaf: int = 64) -> Iterator[Part]:
    """The training mask as unmasked rectangles of doubling size and masked diagonal tiles.

    Within each pair of neighbouring x0 segments the later one, in both streams, attends to all
    of the earlier one; the rest are tiles along the diagonal.
    """
    tile = max(leaf, block)
    if seq_len % tile or (seq_len // tile) & (seq_len // tile - 1):
        tile = seq_len
    dense = BlockMask.training(seq_len, block).dense()[0]
    rows = torch.arange(seq_len).view(-1, tile)
    for stream in (0, seq_len):
        queries = rows + stream
        keys = rows + seq_len if stream else torch.cat([rows, rows + seq_len], dim=1)
        yield Part(queries, keys, dense[queries[:, :, None], keys[:, None, :]][:, None])
    size = tile
    while size < seq_len:
        pairs = torch.arange(seq_len).view(-1, 2, size)
        later, earlier = pairs[:, 1], pairs[:, 0]
        yield Part(torch.cat([later, later + seq_len], dim=1), earlier + seq_len, None)
        size *= 2


class Hierarchical(torch.autograd.Function):
    """Parts by ATen's flash attention, merged by their log-sum-exp."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, parts: list[Part]) -> Tensor:
        out = torch.zeros(q.shape, dtype=torch.float32)
        lse = torch.full(q.shape[:3], float("-inf"))
        for part in parts:
            inputs = [_take(x, rows) for x, rows in zip((q, k, v), _rows(part), strict=True)]
            o, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, attn_mask=_bias(part, q)
            )
            o, part_lse = _put(o, part), _put(part_lse[..., None], part)[..., 0]
            rows = part.queries.flatten()
            before = lse[:, :, rows]
            merged = torch.logaddexp(before, part_lse)
            keep, add = (before - merged).exp()[..., None], (part_lse - merged).exp()[..., None]
            out[:, :, rows] = out[:, :, rows] * keep + o * add
            lse[:, :, rows] = merged
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=torch.float32) for x in (q, k, v)]
        for part in ctx.parts:
            inputs = [_take(x, rows) for x, rows in zip((q, k, v), _rows(part), strict=True)]
            # Exact for each part, given the output and log-sum-exp of the whole.
            d = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _take(d_out, part.queries),
                *inputs,
                _take(out, part.queries),
                _take(lse[..., None], part.queries)[..., 0],
                0.0,
                False,
                attn_mask=_bias(part, q),
            )
            for total, x, rows in zip(grads, d, _rows(part), strict=True):
                flat = x.unflatten(0, (-1, rows.shape[0])).transpose(1, 2).flatten(2, 3)
                total.index_add_(2, rows.flatten(), flat.float())
        return (*(g.to(q.dtype) for g in grads), None)


def _rows(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    return part.queries, part.keys, part.keys


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """[B, H, T, D] and rows [n, t] to [B * n, H, t, D]."""
    return x[:, :, rows].transpose(1, 2).flatten(0, 1)


def _put(x: Tensor, part: Part) -> Tensor:
    """[B * n, H, t, D] to [B, H, n * t, D] in float32."""
    return x.unflatten(0, (-1, part.queries.shape[0])).transpose(1, 2).flatten(2, 3).float()


def _bias(part: Part, q: Tensor) -> Tensor | None:
    if part.mask is None:
        return None
    bias = torch.zeros(part.mask.shape, dtype=q.dtype).masked_fill(~part.mask, float("-inf"))
    return bias.repeat(q.shape[0], 1, 1, 1)


def measure(case: Case, threads: int, rounds: int) -> dict:
    """Median milliseconds of each, and the median ratios of the peers to ours."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, case.dtype)
    shape = (case.batch, 2 * case.seq_len, case.heads, case.width)
    q, k, v, d_out = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = BlockMask.training(case.seq_len, case.block)
    dense = mask.dense()[:, None]
    parts = list(hierarchy(case.seq_len, case.block))

    def run(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = attention(*leaves)
        return (out, *torch.autograd.grad(out, leaves, d_out))

    forms = {
        "rust": lambda: run(lambda *x: rust.rust_attention(*x, mask)),
        "dense": lambda: run(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=dense)),
        "hierarchical": lambda: run(lambda *x: Hierarchical.apply(*x, parts)),
    }
    want = forms["dense"]()
    for name in ("rust", "hierarchical"):
        limit = 2e-5 if dtype == torch.float32 else 4e-2
        for a, b in zip(forms[name](), want, strict=True):
            assert (a.float() - b.float()).abs().max() <= limit * max(1.0, b.abs().max()), name
    times = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            times[name].append(1e3 * seconds(form))
    result = {"case": case._asdict(), "threads": threads}
    for name, values in times.items():
        result[f"{name}_ms"] = statistics.median(values)
    for name in ("dense", "hierarchical"):
        ratios = [a / b for a, b in zip(times[name], times["rust"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        result[f"{name}_ratio"] = statistics.median(ratios)
        result[f"{name}_ratio_quartiles"] = [quartiles[0], quartiles[2]]
    pairs = case.batch * case.heads * case.seq_len * (case.seq_len + case.block)
    result["gflops"] = 14 * case.width * pairs / result["rust_ms"] / 1e6
    return result


def alternation(threads: int, rounds: int) -> dict:
    """Attention between matrix products, as in a training step, against each on its own.

    After a parallel region OpenMP's threads spin for a while; an attention kernel whose threads
    had to compete with them would make the alternation slower than the sum.
    """
    torch.set_num_threads(threads)
    x, weight = torch.randn(4096, 256), torch.randn(256, 1024)
    q, k, v = (torch.randn(16, 256, 8, 32).transpose(1, 2) for _ in range(3))
    mask = BlockMask.training(128, 16)

    def products() -> None:
        for _ in range(2):
            torch.mm(x, weight)

    def attention() -> None:
        rust.rust_attention(q, k, v, mask)

    def repeat(*steps: Callable[[], None]) -> float:
        def body() -> None:
            for _ in range(20):
                for step in steps:
                    step()

        return seconds(body)

    ratios, times = [], []
    with torch.no_grad():
        repeat(products, attention)
        for _ in range(rounds):
            apart = repeat(products), repeat(attention)
            together = repeat(products, attention)
            ratios.append(together / sum(apart))
            times.append(apart)
    return {
        "threads": threads,
        "products_ms": 50 * statistics.median(t[0] for t in times),
        "attention_ms": 50 * statistics.median(t[1] for t in times),
        "together_over_sum": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_attention.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    header = f"{'B':>3} {'H':>3} {'L':>5} {'D':>3} {'S':>4} {'dtype':>9} {'threads':>7}"
    print(f"{header} {'rust ms':>9} {'GF/s':>6} {'dense':>7} {'hierarchical':>12}")
    results = []
    for threads in args.threads:
        for case in CASES:
            r = measure(case, threads, args.rounds)
            results.append(r)
            b, h, length, d, s, dtype = case
            print(
                f"{b:3} {h:3} {length:5} {d:3} {s:4} {dtype:>9} {threads:7} {r['rust_ms']:9.1f} "
                f"{r['gflops']:6.0f} {r['dense_ratio']:6.2f}x {r['hierarchical_ratio']:11.2f}x",
                flush=True,
            )
    mixed = [alternation(threads, args.rounds) for threads in args.threads]
    for r in mixed:
        print(
            f"{r['threads']} threads, products {r['products_ms']:.2f} ms and attention "
            f"{r['attention_ms']:.2f} ms: in turn {r['together_over_sum']:.2f} of their sum"
        )
    write(args.out, {"isas": rust.available_isas(), "cases": results, "alternation": mixed})


if __name__ == "__main__":
    main()
