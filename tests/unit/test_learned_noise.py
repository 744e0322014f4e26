"""Noise that training learns: clips, distributions of counts, token rarity; and its variance."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from bd3lm.config import ModelConfig, NoiseConfig, TrainConfig
from bd3lm.data import Loader, NoiseSpec, Rows, Schedule, Weighting, draw_noise
from bd3lm.errors import ConfigError
from bd3lm.evaluate import count_statistics, evaluate_likelihood, nelbo_variance, search_clip
from bd3lm.evaluate.draws import exact_draws
from bd3lm.evaluate.variance import CountStatistics, clip_candidates
from bd3lm.systems import BlockDiffusion, build_system
from bd3lm.systems.learned_noise import CountDistribution, fitted, rarity_exponents
from tests.conftest import MASK_ID, tiny_model, token_arrays

SCHEDULES = {
    "loglinear": {},
    "square": {},
    "square_root": {},
    "logarithmic": {},
    "cosine": {},
    "gaussian": {"mu": 0.5, "sigma": 0.2},
    "bimodal_gaussian": {"mu": 0.3, "sigma": 0.2, "mu2": 0.8, "sigma2": 0.2, "mixture": 0.6},
}
S = 4


def rows_of(num, seq_len=16, block_size=S):
    return Rows(token_arrays(num), seq_len=seq_len, block_size=block_size)


# --- every schedule's estimator --------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_estimates_the_same_bound(name):
    """bernoulli under each schedule against exact, within its error and the part below 1e-3."""
    model, rows = tiny_model(), rows_of(300)
    system, schedule = BlockDiffusion(S, MASK_ID), Schedule(name, **SCHEDULES[name])
    exact = evaluate_likelihood(system, model, rows, estimator="exact")
    found = evaluate_likelihood(
        system, model, rows, estimator="bernoulli", repeats=120, schedule=schedule
    )
    lowest = schedule.mask_prob(1e-3).item()
    missed = lowest * 20  # ∫ w p dt over the levels left out, times the largest CE there is
    assert abs(found.nelbo - exact.nelbo) < 4.5 * found.mc_error + missed
    assert found.mc_error < 0.2


def exact_clipped(model, system, batch, schedule, clip):
    """The clipped objective by all subsets: B is ∫ p^(k-1)(1-p)^(n-k) dp over the clip / (b-a)."""
    low, high = (schedule.mask_prob(t).item() for t in clip)
    width = clip[1] - clip[0]
    nodes = np.linspace(low, high, 20001)
    p, dp = (nodes[1:] + nodes[:-1]) / 2, np.diff(nodes)

    weight = torch.zeros(S + 1, S + 1, dtype=torch.float64)  # [n, k]
    for n in range(1, S + 1):
        for k in range(1, n + 1):
            weight[n, k] = float((p ** (k - 1) * (1 - p) ** (n - k)) @ dp) / width
    score = system.scorer(model, batch.x0, None)
    noisable = batch.noisable.view(batch.x0.shape[0], -1, S)
    n = noisable.sum(-1)
    total = 0.0
    for draw in exact_draws(batch.noisable, S):
        select = draw.mask.flatten().nonzero().squeeze(1)
        nats = torch.zeros(draw.mask.numel(), dtype=torch.float64)
        xt = torch.where(draw.mask, MASK_ID, batch.x0)
        with torch.no_grad():
            nats[select] = score(xt, select, draw.mask_prob).double()
        y = nats.view(-1, S).sum(-1)
        k = draw.mask.view(-1, S).sum(-1)
        total += float(y @ weight[n.flatten(), k])
    return total / int(noisable.sum())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("estimator", ["bernoulli", "count"])
def test_clipped_losses_have_the_clipped_objective_as_mean(name, estimator):
    """Training batches under U[0.3, 0.8] against the incomplete-Beta form (docs/math.md §4)."""
    model, rows = tiny_model(), rows_of(64 * 15)
    schedule, clip = Schedule(name, **SCHEDULES[name]), (0.3, 0.8)
    system = BlockDiffusion(S, MASK_ID)
    batch = rows.batch(np.arange(64, dtype=np.uint64))
    want = exact_clipped(model, system, batch, schedule, clip)
    spec = NoiseSpec(schedule, estimator=estimator, clip=clip)
    loader = Loader(rows, 64, 1)
    with torch.no_grad():
        batches = [loader.batch(step, spec) for step in range(40)]
        losses = [float(system.loss(model, b)) / b.num_noisable for b in batches]
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert abs(np.mean(losses) - want) < 4.5 * error
    assert error < 0.05 * want


# --- reweighting -----------------------------------------------------------------------------


def test_reported_perplexity_never_sees_the_weighting():
    model, rows = tiny_model(), rows_of(150)
    cfg = TrainConfig(seq_len=16, noise=NoiseConfig(weighting="flow_matching"))
    weighted = evaluate_likelihood(build_system(cfg, MASK_ID), model, rows, estimator="exact")
    plain = evaluate_likelihood(BlockDiffusion(S, MASK_ID), model, rows, estimator="exact")
    assert weighted.nelbo == plain.nelbo
    sampled = {"estimator": "stratified", "repeats": 4}
    assert (
        evaluate_likelihood(build_system(cfg, MASK_ID), model, rows, **sampled).nelbo
        == evaluate_likelihood(BlockDiffusion(S, MASK_ID), model, rows, **sampled).nelbo
    )


def test_monotone_weightings_are_told():
    """w̃ must not fall with t (docs/math.md §3): sigmoid and simple rise with p, sech does not."""
    loglinear = Schedule("loglinear")
    assert Weighting("nelbo").keeps_bound(loglinear)
    assert Weighting("simple").keeps_bound(loglinear)
    assert Weighting("sigmoid", k=1.0).keeps_bound(loglinear)
    assert Weighting("flow_matching").keeps_bound(loglinear)
    assert not Weighting("iddpm").keeps_bound(loglinear)  # 2√(α(1-α)) has its maximum at one half
    assert not Weighting("edm").keeps_bound(loglinear)
    # simple is 1/w(t): under the gaussian w rises again towards t = 1.
    assert not Weighting("simple").keeps_bound(Schedule("gaussian", mu=0.5, sigma=0.2))


@pytest.mark.parametrize("weighting", ["sigmoid", "iddpm", "flow_matching", "simple"])
def test_a_time_conditioned_model_trains_the_reweighted_objective(weighting):
    """count against a rule over p of Σ over masks: ∫ w̃(p)/p · E[CE(mask, p) | p] dp, S = 2."""
    size, seq_len = 2, 8
    cfg = TrainConfig(
        seq_len=seq_len,
        block_size=size,
        model=ModelConfig(width=16, depth=2, heads=2, cond_width=8, time_conditioning=True),
        noise=NoiseConfig(weighting=weighting),
    )
    model = tiny_model(cond_width=8, time_conditioning=True)
    system = build_system(cfg, MASK_ID)
    rows = rows_of(64 * 7, seq_len, size)
    batch = rows.batch(np.arange(16, dtype=np.uint64))
    score = system.scorer(model, batch.x0, None)
    theta = (np.arange(48) + 0.5) * math.pi / 48  # p = (1 - cos θ)/2: no singular ends
    levels, steps = (1 - np.cos(theta)) / 2, np.sin(theta) / 2 * math.pi / 48
    factor = Weighting(weighting).at(Schedule("loglinear"), levels)
    want = 0.0
    with torch.no_grad():
        for p, dp, w in zip(levels, steps, factor, strict=True):
            for pattern in ([0], [1], [0, 1]):
                mask = torch.zeros(16, seq_len // size, size, dtype=torch.bool)
                mask[..., pattern] = True
                mask = mask.view(16, seq_len) & batch.noisable
                select = mask.flatten().nonzero().squeeze(1)
                xt = torch.where(mask, MASK_ID, batch.x0)
                nats = score(xt, select, torch.full((16, seq_len // size), p))
                # Blocks of one noisable token have one pattern of probability p.
                block, n = select // size, batch.noisable.view(-1, size).sum(1)
                k = mask.view(-1, size).sum(1)
                chance = p**k * (1 - p) ** (n - k)
                keep = k == len(pattern)
                want += float((nats * (chance * keep)[block]).sum()) * w / p * dp
        want /= int(batch.noisable.sum())
        found = []
        for step in range(400):
            mask, level, weight = draw_noise(
                system.noise(step), batch.x0, batch.noisable, size, seed=1, step=step
            )
            select = mask.flatten().nonzero().squeeze(1)
            nats = score(torch.where(mask, MASK_ID, batch.x0), select, level)
            found.append(float((nats * weight.flatten()[select // size]).sum()))
    found = np.array(found) / int(batch.noisable.sum())
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() - want) < 4 * error
    assert error < 0.02 * want


# --- variance and clips ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "how"),
    [
        ((1e-3, 1.0), {}),
        ((0.3, 0.8), {}),
        ((0.5, 1.0), {}),
        ((0.3, 0.8), {"resample": True}),
        ((0.5, 1.0), {"resample": True}),
        ((1e-3, 1.0), {"count_probs": np.full(S, 1 / S)}),
        ((0.3, 0.8), {"count_probs": np.array([0.1, 0.2, 0.3, 0.4])}),
    ],
)
def test_the_integral_over_t_is_the_variance_of_drawn_noise(trained, clip, how):
    model, data = trained
    rows, system = Rows(data, seq_len=16, block_size=S), BlockDiffusion(S, MASK_ID)
    statistics = count_statistics(system, model, rows, max_rows=256, repeats=12)
    loglinear = Schedule("loglinear")
    found = statistics.variance(loglinear, clip, **how)
    if "count_probs" in how:
        q = how["count_probs"].tolist()
        spec = NoiseSpec(loglinear, estimator="count", clip=clip, count_probs=q)
    else:
        spec = NoiseSpec(loglinear, clip=clip, strata=False, **how)
    drawn = [
        nelbo_variance(system, model, rows, spec, batches=4, batch_size=64, seed=seed)
        for seed in range(12)
    ]
    error = np.std(drawn, ddof=1) / math.sqrt(len(drawn))
    # Levels near 1e-3 have weights of a thousand: a drawn variance is a rough one there.
    assert abs(found - np.mean(drawn)) < 4 * error + 0.05 * found


@pytest.mark.parametrize("estimator", ["bernoulli", "count"])
def test_one_pass_picks_the_interval_of_36_passes(trained, estimator):
    """Brute force draws every interval's own noise over the same rows."""
    model, data = trained
    rows, system = Rows(data, seq_len=16, block_size=S), BlockDiffusion(S, MASK_ID)
    loglinear = Schedule("loglinear")
    statistics = count_statistics(system, model, rows, max_rows=256, repeats=12)
    cfg = NoiseConfig(estimator=estimator)
    how = {"count_probs": BlockDiffusion(S, MASK_ID, cfg).count_probs}
    best, variance = search_clip(statistics, loglinear, **how)
    assert variance == statistics.variance(loglinear, best, **how)
    brute = {
        clip: nelbo_variance(
            system,
            model,
            rows,
            NoiseSpec(loglinear, clip=clip, estimator=estimator),
            batches=4,
            batch_size=64,
        )
        for clip in clip_candidates(S)
    }
    assert len(brute) == 36
    assert best == min(brute, key=lambda clip: brute[clip])


@pytest.mark.parametrize("block_size", [1, 2])
def test_a_search_with_resample_leaves_out_what_holds_no_share(block_size):
    """An interval at S = 1 below 1 would mask nothing, and nothing has no variance."""
    share, moments = np.zeros(block_size + 1), np.zeros((2, block_size + 1, block_size + 1))
    share[-1] = 1.0
    moments[0, :, 1:], moments[1, :, 1:] = 2.0, 5.0
    statistics = CountStatistics(block_size, share, *moments)
    clip, variance = search_clip(statistics, Schedule("loglinear"), resample=True)
    assert any(clip[0] <= k / block_size <= clip[1] for k in range(1, block_size + 1))
    assert variance > 0
    noise = NoiseConfig(estimator="bernoulli", resample=True, clip_search=True)
    system = BlockDiffusion(block_size, MASK_ID, noise)
    system.set_clip(clip)
    system.noise(0).check(16, block_size)
    batch = Loader(rows_of(300, block_size=block_size), 8, 1).batch(0, system.noise(0))
    assert len(batch.masked) > 0


@pytest.mark.parametrize("block_size", [4, 16])
def test_counts_have_less_variance_than_levels(trained, block_size):
    model, data = trained
    rows, system = (
        Rows(data, seq_len=16, block_size=block_size),
        BlockDiffusion(block_size, MASK_ID),
    )
    loglinear = Schedule("loglinear")
    levels, counts = (
        np.mean(
            [
                nelbo_variance(
                    system,
                    model,
                    rows,
                    NoiseSpec(loglinear, estimator=estimator),
                    batches=4,
                    batch_size=64,
                    seed=seed,
                )
                for seed in range(4)
            ]
        )
        for estimator in ("bernoulli", "count")
    )
    assert counts < 0.7 * levels


def test_a_fitted_law_keeps_the_mean_and_lowers_the_variance():
    """Known Y_k: nats that grow steeply with k, drawn under the uniform and the fitted law."""
    nats = np.array([0.05, 0.3, 1.5, 6.0]) * np.arange(1, 5)
    truth = sum(nats[k - 1] / k for k in range(1, 5))
    q = np.array(fitted((nats / np.arange(1, 5)) ** 2, np.ones(4)))
    assert q.sum() == pytest.approx(1.0)
    assert (q >= 0.1 / 4).all()
    moments = {}
    for name, law in (("uniform", np.full(4, 0.25)), ("fitted", q)):
        values = nats / (np.arange(1, 5) * law)
        assert law @ values == pytest.approx(truth)
        moments[name] = law @ values**2 - truth**2
    assert moments["fitted"] < 0.1 * moments["uniform"]


def test_the_law_is_learned_from_the_losses_of_training():
    model, rows = tiny_model(), rows_of(600)
    cfg = NoiseConfig(fit_counts=True)
    system = BlockDiffusion(S, MASK_ID, cfg)
    loader = Loader(rows, 8, 1)
    seen = np.zeros((2, S + 1))
    with torch.no_grad():
        for step in range(50):
            spec = system.noise(step)
            batch = loader.batch(step, spec)
            system.loss(model, batch)
            plain = BlockDiffusion(S, MASK_ID)
            k = torch.zeros(8, 16).flatten().index_fill(0, batch.masked, 1.0).view(-1, S).sum(1)
            nats = torch.zeros(8 * 16)
            score = plain.scorer(model, batch.x0, None)
            nats[batch.masked] = score(batch.xt, batch.masked, batch.mask_prob)
            y = nats.view(-1, S).sum(1)
            seen *= 0.99 if step else 1.0
            for count, value in zip(k.int().tolist(), y.tolist(), strict=True):
                seen[:, count] += ((value / max(count, 1)) ** 2, 1.0)
            assert (spec is system.noise(step + 1)) or step == 49
            system.update_noise_after_step(step + 1)
    law = system.state()["counts"]["probs"]
    np.testing.assert_allclose(law, fitted(seen[0, 1:], seen[1, 1:]), rtol=1e-4)
    again = BlockDiffusion(S, MASK_ID, cfg)
    again.load_state(json.loads(json.dumps(system.state())))
    assert again.state() == system.state()
    a, b = (loader.batch(60, s.noise(60)) for s in (system, again))
    assert torch.equal(a.xt, b.xt)
    assert torch.equal(a.weight, b.weight)


def test_counts_that_were_never_seen_get_the_mean():
    counts = CountDistribution(3)
    assert not counts.update_noise_after_step(50)
    counts.observe(torch.tensor([2.0, 4.0]), torch.tensor([0, 4]), 2)
    assert not counts.update_noise_after_step(49)
    assert counts.update_noise_after_step(50)
    assert counts.probs == pytest.approx([1 / 3] * 3)


# --- rarity ----------------------------------------------------------------------------------


def test_exponents_fall_with_rarity():
    counts = np.array([5, 0, 100, 20, 5], dtype=np.uint64)
    gamma = rarity_exponents(counts, 0.5)
    assert gamma.tolist() == pytest.approx([1 - 1 / 6, 0.5, 1.5, 1 + 1 / 6, 0.5])


@pytest.mark.parametrize(
    ("schedule", "weighting"),
    list(itertools.product(["loglinear", "cosine"], ["nelbo", "sigmoid"])),
)
def test_masking_by_frequency_goes_with_every_schedule_and_weighting(schedule, weighting):
    noise = NoiseConfig(
        estimator="bernoulli", schedule=schedule, weighting=weighting, frequency_gap=0.5
    )
    rows, data = rows_of(64 * 15), token_arrays(64 * 15)
    system = BlockDiffusion(S, MASK_ID, noise)
    system.fit_to_data(data)
    plain = BlockDiffusion(S, MASK_ID, dataclasses.replace(noise, frequency_gap=0.0))
    a, b = (Loader(rows, 64, 1).batch(0, s.noise(0)) for s in (system, plain))
    assert torch.equal(a.mask_prob, b.mask_prob)
    counts = data.token_counts()
    assert counts.sum() == 64 * 15
    common = torch.from_numpy(counts.astype(np.int64))[a.x0] > np.median(counts[counts > 0])
    shares = [
        [((x.xt == MASK_ID) & kind).sum() / kind.sum() for kind in (common, ~common)]
        for x in (a, b)
    ]
    assert shares[0][0] < shares[1][0]
    assert shares[0][1] > shares[1][1]


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        ({"frequency_gap": 0.5}, "must be 0 unless noise.estimator = bernoulli"),
        ({"frequency_gap": 1.0, "estimator": "bernoulli"}, r"in \[0, 1\)"),
        (
            {"fit_counts": True, "estimator": "bernoulli"},
            "must be False unless noise.estimator = count",
        ),
        ({"paper_weights": True}, "must be False unless noise.schedule = bimodal_gaussian"),
        (
            {
                "paper_weights": True,
                "schedule": "bimodal_gaussian",
                "estimator": "bernoulli",
                "clip_search": True,
            },
            "must be False with noise.paper-weights",
        ),
        (
            {"resample": True, "clip_search": True},
            "must be False unless noise.estimator = bernoulli",
        ),
        ({"estimator": "full", "clip": (0.3, 0.8)}, "full masks all, with weight 1"),
        ({"estimator": "full", "weighting": "simple"}, "full masks all, with weight 1"),
        (
            {"clip_search": True, "frequency_gap": 0.5, "estimator": "bernoulli"},
            "must be False with noise.frequency-gap > 0",
        ),
        (
            {"resample": True, "estimator": "bernoulli"},
            "must be False without noise.clip or noise.clip-search",
        ),
    ],
)
def test_combinations_that_make_no_sense(noise, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_system(TrainConfig(noise=NoiseConfig(**noise)), MASK_ID)


def test_a_model_that_is_told_the_level_has_no_clip_search():
    model = ModelConfig(cond_width=8, time_conditioning=True)
    cfg = TrainConfig(model=model, noise=NoiseConfig(clip_search=True))
    with pytest.raises(ConfigError, match=r"must be False with model\.time-conditioning"):
        build_system(cfg, MASK_ID)


# --- the paper's bimodal form ----------------------------------------------------------------


def test_paper_weights_are_for_training_alone():
    """Paper weights count the bound twice; p(t) is not monotone, and samplers take the same law."""
    noise = NoiseConfig(
        estimator="bernoulli", schedule="bimodal_gaussian", mu=0.3, paper_weights=True
    )
    model, rows = tiny_model(), rows_of(64 * 15)
    plain = BlockDiffusion(S, MASK_ID, dataclasses.replace(noise, paper_weights=False))
    paper = BlockDiffusion(S, MASK_ID, noise)
    assert (np.diff(paper.level_grid(50)) < 0).all()
    assert paper.level_grid(50).tolist() == plain.level_grid(50).tolist()
    losses = {}
    with torch.no_grad():
        for name, system in (("paper", paper), ("plain", plain)):
            batches = [Loader(rows, 64, 1).batch(i, system.noise(i)) for i in range(60)]
            losses[name] = [float(system.loss(model, b)) / b.num_noisable for b in batches]
    mean = {name: np.mean(values) for name, values in losses.items()}
    error = {name: np.std(v, ddof=1) / math.sqrt(len(v)) for name, v in losses.items()}
    gap = mean["paper"] - 2 * mean["plain"]
    assert abs(gap) < 4.5 * math.hypot(error["paper"], 2 * error["plain"])
    assert error["paper"] < 0.05 * mean["paper"]


# --- the integral behind the clip search ------------------------------------------------------


def gaussian_moments(mu, sigma, clip, size, nats):
    """Var. NELBO for Y_k = k·nats, by a dense rule in z = (p - μ)/σ: a formula of its own."""

    def cdf(z):
        return 0.5 * math.erfc(-z / math.sqrt(2))

    low, high = cdf(-mu / sigma), cdf((1 - mu) / sigma)

    def quantile(t):
        lower, upper = -mu / sigma, (1 - mu) / sigma
        for _ in range(200):
            middle = (lower + upper) / 2
            if cdf(middle) < low + t * (high - low):
                lower = middle
            else:
                upper = middle
        return lower

    ends = quantile(clip[0]), ((1 - mu) / sigma if clip[1] == 1 else quantile(clip[1]))
    # Even in log p at the lower end, where weights rise like 1/p².
    edges = np.exp(np.linspace(*(math.log(mu + sigma * z) for z in ends), 400_001))
    p, dp = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    z = (p - mu) / sigma
    slope = sigma * (high - low) * math.sqrt(2 * math.pi) * np.exp(z**2 / 2)  # dp/dt
    k = size * p  # the mean of k, and of k² below
    first = nats * (k / p) @ dp / (clip[1] - clip[0])
    square = nats**2 * (size * p * (1 - p) + k**2)
    second = (slope / p**2 * square) @ dp / (clip[1] - clip[0])
    return (second - first**2) / size**2


@pytest.mark.parametrize(
    ("mu", "sigma", "clip", "size"),
    [
        (0.3, 0.2, (1e-3, 1.0), 4),
        (0.3, 0.2, (0.5, 1.0), 4),
        (0.4, 0.2, (1e-3, 1.0), 4),
        (0.5, 0.2, (1e-3, 1.0), 4),
        (0.1, 0.3, (1e-3, 1.0), 8),
        (0.0, 0.2, (1e-3, 1.0), 8),
        (0.7, 0.2, (0.1, 0.9), 8),
        (0.0, 0.1, (1e-3, 1.0), 4),
    ],
)
def test_the_clip_s_variance_is_exact_for_gaussian_schedules(mu, sigma, clip, size):
    """p(t) of a Gaussian rises from 0.8 to 1 in the last hundredth of t and less."""
    k = np.arange(size + 1) * 2.0
    share = np.zeros(size + 1)
    share[size] = 1.0
    mean = np.tile(k, (size + 1, 1))
    statistics = CountStatistics(size, share, mean, mean**2)
    schedule = Schedule("gaussian", mu=mu, sigma=sigma)
    want = gaussian_moments(mu, sigma, clip, size, 2.0)
    assert statistics.variance(schedule, clip) == pytest.approx(want, rel=1e-5)


def test_the_clip_s_variance_has_its_closed_form_under_loglinear():
    """S = 1, Y = 2: E[w·1{masked}·2] = 2 and E[w²·1{masked}·4] = 4·log(b/a)/(b - a)."""
    one = np.array([[0.0, 0.0], [0.0, 2.0]])
    statistics = CountStatistics(1, np.array([0.0, 1.0]), one, one**2)
    for low, high in ((1e-3, 1.0), (0.25, 0.75), (0.5, 1.0)):
        want = 4 * math.log(high / low) / (high - low) - 4
        found = statistics.variance(Schedule("loglinear"), (low, high))
        assert found == pytest.approx(want, rel=1e-9)
