"""Noise: its arguments, and the law it follows."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3lm.data import Batch, Loader, NoiseSpec, Rows, Schedule, Weighting, draw_noise
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError

L, S = 32, 4
LOGLINEAR = Schedule("loglinear")
SPECS = {
    "bernoulli": NoiseSpec(LOGLINEAR),
    "independent": NoiseSpec(LOGLINEAR, strata=False),
    "clip": NoiseSpec(LOGLINEAR, clip=(0.3, 0.8)),
    "resample": NoiseSpec(LOGLINEAR, clip=(0.3, 0.8), resample=True),
    "frequency": NoiseSpec(LOGLINEAR, gamma=np.tile(np.float32([1.5, 0.5]), 2500)),
    "count": NoiseSpec(LOGLINEAR, estimator="count"),
    "count_clip": NoiseSpec(LOGLINEAR, estimator="count", clip=(0.3, 0.8)),
    "full": NoiseSpec(LOGLINEAR, estimator="full"),
}


def ones(rows: int, seq_len: int = L) -> tuple[Tensor, Tensor]:
    x0 = torch.arange(rows * seq_len).reshape(rows, seq_len) % 5000
    return x0, torch.ones(rows, seq_len, dtype=torch.bool)


def draw(spec: NoiseSpec, rows: int = 64, **where: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw_noise(spec, *ones(rows), S, **({"seed": 1, "step": 2} | where))


def blocks(mask: Tensor) -> Tensor:
    return mask.view(-1, S).sum(-1)


def loader(batch_size: int, seed: int = 3) -> Loader:
    documents = [list(range(4, 4 + n)) for n in (900, 40, 1, 700)]
    data = TokenArrays(documents, vocab_size=5000, bos_id=1, eos_id=2, mask_id=3)
    return Loader(Rows(data, seq_len=L, block_size=S, packing="aligned"), batch_size, seed)


def equal(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("name", SPECS)
def test_rows_have_the_noise_of_their_place_in_the_global_batch(name: str) -> None:
    whole = draw(SPECS[name], 64)
    x0, noisable = ones(64)
    for start, stop in [(0, 1), (1, 24), (24, 64)]:
        rows = slice(start, stop)
        part = draw_noise(
            SPECS[name],
            x0[rows],
            noisable[rows],
            S,
            seed=1,
            step=2,
            first_row=start,
            num_rows=64,
        )
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("name", [name for name in SPECS if name != "full"])
def test_seed_step_and_row_each_change_the_noise(name: str) -> None:
    base = draw(SPECS[name])
    assert all(torch.equal(a, b) for a, b in zip(base, draw(SPECS[name]), strict=True))
    for where in ({"seed": 5}, {"step": 5}, {"first_row": 64}):
        assert not torch.equal(base[0], draw(SPECS[name], **where)[0])
    assert not torch.equal(base[0][0], base[0][1])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_are_the_batch(name: str, parts: int) -> None:
    made = loader(16)
    whole = made.batch(7, SPECS[name])
    pieces = [made.batch(7, SPECS[name], part=(i, parts)) for i in range(parts)]
    size = 16 // parts * L
    for field in ("x0", "xt", "mask_prob", "weight", "doc_ids"):
        joined = torch.cat([getattr(p, field) for p in pieces])
        assert torch.equal(joined, getattr(whole, field)), field
    masked = torch.cat([p.masked + i * size for i, p in enumerate(pieces)])
    assert torch.equal(masked, whole.masked)
    assert sum(p.num_noisable for p in pieces) == whole.num_noisable


def test_the_parts_of_a_batch_agree() -> None:
    made = loader(16)
    batch = made.batch(0, SPECS["bernoulli"])
    is_masked = torch.zeros(16 * L, dtype=torch.bool)
    is_masked[batch.masked] = True
    is_masked = is_masked.view(16, L)
    assert torch.equal(batch.xt, torch.where(is_masked, 3, batch.x0))
    assert torch.all(batch.doc_ids[is_masked] >= 0)
    assert not is_masked[:, 0].any()
    level = batch.mask_prob.view(-1)[batch.masked // S]
    torch.testing.assert_close(batch.weight, 1 / level)  # loglinear: w = 1/p
    clean = made.rows.batch(np.arange(len(made.rows), dtype=np.uint64))
    known = {tuple(row) for row in clean.x0.tolist()}
    assert all(tuple(row) in known for row in batch.x0.tolist())


def test_an_epoch_holds_every_row_once() -> None:
    made = loader(10)
    n = len(made.rows)
    assert n % 10, "so that batches straddle epochs"
    seen = torch.cat([made.batch(step, SPECS["full"]).x0 for step in range(n)])
    clean = made.rows.batch(np.arange(n, dtype=np.uint64)).x0.tolist()
    orders = []
    for epoch in seen.split(n):
        orders.append([clean.index(row) for row in epoch.tolist()])
        assert sorted(orders[-1]) == list(range(n))
    assert orders[0] != orders[1]
    assert not torch.equal(loader(10, seed=4).batch(0, SPECS["full"]).x0, seen[:10])


LARGE = """
import hashlib, sys, torch
from bd3lm.data import NoiseSpec, Schedule, draw_noise
x0 = torch.arange(1100 * 128).reshape(1100, 128) % 5000
for estimator in ("bernoulli", "count"):
    spec = NoiseSpec(Schedule("cosine"), estimator=estimator)
    drawn = draw_noise(spec, x0, x0 > 9, 8, seed=1, step=2)
    print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in drawn)).hexdigest())
"""


def test_threads_do_not_change_the_noise() -> None:
    environment = os.environ | {"RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LARGE]
    one = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    x0 = torch.arange(1100 * 128).reshape(1100, 128) % 5000
    for estimator, digest in zip(("bernoulli", "count"), one.stdout.split(), strict=True):
        spec = NoiseSpec(Schedule("cosine"), estimator=estimator)
        whole = draw_noise(spec, x0, x0 > 9, 8, seed=1, step=2)  # several threads
        joined = hashlib.sha256(b"".join(x.numpy().tobytes() for x in whole)).hexdigest()
        assert joined == digest
        small = [  # few enough rows for the calling thread
            draw_noise(
                spec,
                x0[i : i + 100],
                x0[i : i + 100] > 9,
                8,
                seed=1,
                step=2,
                first_row=i,
                num_rows=1100,
            )
            for i in range(0, 1100, 100)
        ]
        for i, tensor in enumerate(whole):
            assert torch.equal(torch.cat([part[i] for part in small]), tensor)


@pytest.mark.parametrize("clip", [None, (0.3, 0.8)])
def test_levels_are_one_a_stratum(clip: tuple[float, float] | None) -> None:
    low, high = clip or (1e-3, 1.0)
    _, level, _ = draw(NoiseSpec(LOGLINEAR, clip=clip), 16)
    place = (level.double().view(-1).sort().values - low) / (high - low) * level.numel()
    assert torch.all((place - torch.arange(level.numel()) - 0.5).abs() < 0.501)
    # Without strata, some interval is hit twice; and a stratum is not tied to a position.
    loose = draw(SPECS["independent"], 16)[1].double().view(-1).sort().values * level.numel()
    assert loose.floor().unique().numel() < level.numel()
    again = draw(NoiseSpec(LOGLINEAR, clip=clip), 16, step=3)[1]
    assert not torch.equal(level.argsort(0), again.argsort(0))


@pytest.mark.parametrize("schedule", ["loglinear", "square", "cosine"])
def test_masks_follow_their_level(schedule: str) -> None:
    made = Schedule(schedule)
    mask, level, weight = draw(NoiseSpec(made), 4096)
    p = level.double().view(-1)
    variance = (p * (1 - p)).sum() / S
    error = (mask.view(-1, S).double().mean(-1) - p).sum() / variance.sqrt()
    assert abs(error) < 4
    t = made.inverse(p.numpy())
    np.testing.assert_allclose(weight.view(-1), made.loss_weight(t), rtol=2e-3)
    # Positions of a block are independent given its level.
    pairs = mask.view(-1, S).double() - p[:, None]
    product = pairs[:, 0] * pairs[:, 3]
    assert abs(product.mean() / product.std() * math.sqrt(len(p))) < 4


@pytest.mark.parametrize("q", [None, [0.4, 0.3, 0.2, 0.1]])
def test_counts_have_their_law_and_weight(q: list[float] | None) -> None:
    mask, level, weight = draw(NoiseSpec(LOGLINEAR, estimator="count", count_probs=q), 4096)
    k = blocks(mask)
    shares = torch.bincount(k, minlength=S + 1)[1:] / len(k)
    law = torch.tensor(q or [0.25] * S)
    assert torch.all((shares - law).abs() < 4 * (law * (1 - law) / len(k)).sqrt())
    torch.testing.assert_close(weight.view(-1), 1 / (k * law[k - 1]))
    for size in range(1, S + 1):  # p given k is Beta(k, S-k+1), each subset as likely
        p = level.view(-1)[k == size].double()
        mean = size / (S + 1)
        deviation = math.sqrt(mean * (1 - mean) / (S + 2) / len(p))
        assert abs(p.mean() - mean) < 4 * deviation
        variance = mean * (1 - mean) / (S + 2)
        assert abs(p.var() / variance - 1) < 0.06
        subsets = mask.view(-1, S)[k == size].double() @ torch.tensor([8.0, 4, 2, 1]).double()
        counts = subsets.unique(return_counts=True)[1].double()
        assert len(counts) == math.comb(S, size)
        expected = counts.sum() / len(counts)
        assert torch.all((counts - expected).abs() < 4.5 * expected.sqrt())


def test_clipped_counts_weigh_as_the_clipped_objective() -> None:
    a, b = 0.3, 0.8

    def above(p: float, k: int) -> float:  # I_p(k, S-k+1) by its binomial sum
        return sum(math.comb(S, j) * p**j * (1 - p) ** (S - j) for j in range(k, S + 1))

    mask, level, weight = draw(SPECS["count_clip"], 512)
    expected = torch.tensor(
        [math.nan] + [S / k * (above(b, k) - above(a, k)) / (b - a) for k in range(1, S + 1)]
    )
    torch.testing.assert_close(weight.view(-1), expected[blocks(mask)])
    assert level.min() >= a - 1e-6
    assert level.max() <= b + 1e-6


def test_shares_of_counts() -> None:
    spec = NoiseSpec(LOGLINEAR, estimator="count", stratum=(1, 2))
    assert set(blocks(draw(spec)[0]).tolist()) == {3, 4}


def test_blocks_with_few_noisable_tokens() -> None:
    x0, _ = ones(2000, 12)
    noisable = torch.tensor([False] * 4 + [True, False, False, False] + [True, True, False, True])
    for name in ("bernoulli", "count", "resample"):
        mask, _, weight = draw_noise(
            SPECS[name], x0, noisable.expand(2000, -1).contiguous(), S, seed=0, step=0
        )
        assert not mask[:, ~noisable].any()
        assert not weight[:, 0].any()
        if name == "count":
            assert mask[:, 4].all()
            k = mask[:, 8:].sum(1)
            assert set(k.tolist()) == {1, 2, 3}
            torch.testing.assert_close(weight[:, 2], 3 / k)
        if name == "resample":  # one token: no k fits, so plain masks; three: only two of them
            assert 0.45 < mask[:, 4].double().mean() < 0.65
            assert set(mask[:, 8:].sum(1).tolist()) == {1, 2}


def test_clip_and_resample() -> None:
    mask, level, weight = draw(SPECS["clip"], 256)
    assert 0.3 <= level.min() < 0.31
    assert 0.79 < level.max() <= 0.8
    torch.testing.assert_close(weight, 1 / level)  # no factor b-a
    assert set(blocks(mask).tolist()) == {0, 1, 2, 3, 4}
    mask, level, weight = draw(SPECS["resample"], 256)
    torch.testing.assert_close(weight, 1 / level)
    k = blocks(mask)
    assert set(k.tolist()) == {2, 3}
    p = level.double().view(-1)
    two, three = 6 * p**2 * (1 - p) ** 2, 4 * p**3 * (1 - p)
    share = three / (two + three)
    error = ((k == 3).double() - share).sum() / (share * (1 - share)).sum().sqrt()
    assert abs(error) < 4
    full = draw(NoiseSpec(LOGLINEAR, clip=(1.0, 1.0)))
    assert full[0].all()
    assert torch.all(full[1] == 1)
    assert torch.all(full[2] == 1)


def test_weighting_multiplies_the_weight() -> None:
    plain, spec = draw(SPECS["bernoulli"]), NoiseSpec(LOGLINEAR, weighting=Weighting("iddpm"))
    _, level, weight = draw(spec)
    factor = 2 * (level * (1 - level)).sqrt()
    torch.testing.assert_close(weight, plain[2] * factor, rtol=1e-3, atol=1e-4)


def test_rare_tokens_are_masked_more_often() -> None:
    mask, level, _ = draw(SPECS["frequency"], 4096)
    x0, _ = ones(4096)
    rare = mask[x0 % 2 == 1].double().mean()
    assert rare > mask[x0 % 2 == 0].double().mean() + 0.05
    p = level.double().view(-1)
    excess = mask.view(-1, S).double().mean(-1) - p
    assert abs(excess.mean()) < 4 * (p * (1 - p) / S).mean().sqrt() / math.sqrt(len(p))


PAPER = Schedule(
    "bimodal_gaussian", mu=0.3, sigma=0.2, mu2=0.8, sigma2=0.2, mixture=0.5, paper_weights=True
)
GAMMA = np.ones(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"estimator": "exact"}, "estimator = exact: must be one of bernoulli, count, full"),
        ({"clip": (0.8, 0.3)}, r"clip = \[0.8, 0.3\]: must be \[a, b\] with 0 <= a <= b <= 1"),
        ({"clip": (-0.1, 0.3)}, r"clip = \[-0.1, 0.3\]"),
        ({"clip": (0.0, 1e-3)}, r"clip = \[0, 0.001\]: must be \[a, b\] with a < b"),
        ({"clip": (math.nan, 1.0)}, r"clip = \[NaN, 1\]"),
        ({"resample": True}, "resample = true: must be false unless the estimator is bernoulli"),
        ({"resample": True, "estimator": "count", "clip": (0.3, 0.8)}, "resample = true"),
        ({"gamma": GAMMA, "estimator": "count"}, "gamma = given: .* bernoulli"),
        ({"gamma": GAMMA, "resample": True, "clip": (0.3, 0.8)}, "gamma = given"),
        ({"gamma": 0 * GAMMA}, "gamma = given: must be greater than 0 for every token"),
        (
            {"estimator": "count", "count_probs": [0.5, 0.0]},
            "count_probs = given: must be greater than 0",
        ),
        (
            {"estimator": "count", "stratum": (2, 2)},
            r"stratum = \(2, 2\): must be \(index, number\) with index <",
        ),
        ({"schedule": PAPER, "estimator": "count"}, "paper_weights = true: must be false unless"),
        ({"schedule": PAPER, "clip": (0.3, 0.8)}, "paper_weights = true: must be false unless"),
    ],
)
def test_wrong_combinations_name_themselves(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NoiseSpec(**({"schedule": LOGLINEAR} | kwargs))


def test_what_the_rows_do_not_allow() -> None:
    with pytest.raises(ConfigError, match="block_size = 5: must be a divisor of seq_len = 32"):
        SPECS["bernoulli"].check(32, 5)
    narrow = NoiseSpec(LOGLINEAR, clip=(0.3, 0.45), resample=True)
    with pytest.raises(ConfigError, match=r"clip = \[0.3, 0.45\]: must be around a k/4"):
        draw(narrow)
    with pytest.raises(ConfigError, match=r"count_probs = 2 numbers: must be one for each k"):
        draw(NoiseSpec(LOGLINEAR, estimator="count", count_probs=[0.5, 0.5]))
    with pytest.raises(ConfigError, match=r"part = \(0, 17\): must be .index, number. with"):
        loader(16).batch(0, SPECS["full"], part=(0, 17))
    with pytest.raises(ConfigError, match=r"part = \(2, 2\)"):
        loader(16).batch(0, SPECS["full"], part=(2, 2))
