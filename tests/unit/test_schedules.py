"""Schedules and weightings against formulas written down a second time, in torch's float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from bd3lm import _core
from bd3lm.config import NoiseConfig, from_dict, to_dict
from bd3lm.config.names import DetokenizerName, PackingName, ScheduleName, WeightingName
from bd3lm.data import NoiseSpec, Schedule, Weighting, draw_noise
from bd3lm.errors import ConfigError
from bd3lm.systems.sized_noise import schedule_of

EPS, MU, SIGMA, MU2, SIGMA2, MIXTURE = 1e-3, 0.3, 0.2, 0.8, 0.15, 0.6
BIMODAL = {"mu": MU, "sigma": SIGMA, "mu2": MU2, "sigma2": SIGMA2, "mixture": MIXTURE}


def gaussian_quantile(t: Tensor, mu: float, sigma: float) -> Tensor:
    below, above = (ndtr(torch.tensor(x / sigma, dtype=torch.float64)) for x in (-mu, 1 - mu))
    return mu + sigma * ndtri(below + t * (above - below))


def gaussian_cdf(p: Tensor, mu: float, sigma: float) -> Tensor:
    below, above = (ndtr(torch.tensor(x / sigma, dtype=torch.float64)) for x in (-mu, 1 - mu))
    return (ndtr((p - mu) / sigma) - below) / (above - below)


def mixture_cdf(p: Tensor) -> Tensor:
    return MIXTURE * gaussian_cdf(p, MU, SIGMA) + (1 - MIXTURE) * gaussian_cdf(p, MU2, SIGMA2)


class MixtureQuantile(torch.autograd.Function):
    """F⁻¹ by halving; its slope is one over the density."""

    @staticmethod
    def forward(ctx, t):
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            below = mixture_cdf(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        ctx.save_for_backward(low)
        return low

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        with torch.enable_grad():
            p = p.detach().requires_grad_()
            (density,) = torch.autograd.grad(mixture_cdf(p).sum(), p)
        return grad / density


class Reference(NamedTuple):
    kwargs: dict[str, float]
    mask_prob: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


REFERENCES = {
    "loglinear": Reference({}, lambda t: t, lambda p: p),
    "square": Reference({}, lambda t: t**2, torch.sqrt),
    "square_root": Reference({}, torch.sqrt, lambda p: p**2),
    "logarithmic": Reference({}, lambda t: torch.log(1 + t) / math.log(2), lambda p: 2**p - 1),
    "cosine": Reference(
        {"eps": EPS},
        lambda t: 1 - (1 - EPS) * torch.cos(math.pi * t / 2),
        lambda p: 2 / math.pi * torch.arccos((1 - p) / (1 - EPS)),
    ),
    "gaussian": Reference(
        {"mu": MU, "sigma": SIGMA},
        lambda t: gaussian_quantile(t, MU, SIGMA),
        lambda p: gaussian_cdf(p, MU, SIGMA),
    ),
    "bimodal_gaussian": Reference(BIMODAL, MixtureQuantile.apply, mixture_cdf),
}

T = torch.cat([torch.linspace(1e-3, 0.999, 500), torch.tensor([1e-3, 0.5])]).double()


def both(mask_prob: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """p(t) and, by differentiation, p'(t)/p(t)."""
    t = T.clone().requires_grad_()
    p = mask_prob(t)
    (slope,) = torch.autograd.grad(p.sum(), t)
    return p.detach(), slope / p.detach()


@pytest.mark.parametrize("name", REFERENCES)
def test_probability_weight_and_inverse(name: str) -> None:
    reference = REFERENCES[name]
    schedule = Schedule(name, **reference.kwargs)
    p, w = both(reference.mask_prob)
    np.testing.assert_allclose(schedule.mask_prob(T), p, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(schedule.loss_weight(T), w, rtol=1e-7)
    np.testing.assert_allclose(schedule.inverse(p), reference.inverse(p), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(schedule.inverse(p), T, rtol=1e-7, atol=1e-9)
    assert schedule.mask_prob(1.0) == pytest.approx(1.0, abs=1e-10)


def test_the_papers_bimodal_form() -> None:
    def literal(t: Tensor) -> Tensor:
        first = gaussian_quantile(t.clamp(max=MIXTURE - 1e-9) / MIXTURE, MU, SIGMA)
        share = ((t - MIXTURE) / (1 - MIXTURE)).clamp(min=1e-9)
        return torch.where(t < MIXTURE, first, gaussian_quantile(share, MU2, SIGMA2))

    schedule = Schedule("bimodal_gaussian", **BIMODAL, paper_weights=True)
    p, w = both(literal)
    np.testing.assert_allclose(schedule.mask_prob(T), p, rtol=1e-8)
    np.testing.assert_allclose(schedule.loss_weight(T), w, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"paper_weights = true: .* no inverse"):
        schedule.inverse(0.5)


def test_shapes_are_kept() -> None:
    t = np.full((2, 3, 1), 0.5)
    assert Schedule("square").mask_prob(t).tolist() == [[[0.25]] * 3] * 2
    assert Schedule("square").mask_prob([]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("linear", {}, "schedule = linear: must be one of loglinear, square, .*bimodal_gaussian"),
        ("gaussian", {"sigma": 0.2}, "mu = None: must be a number"),
        ("gaussian", {"mu": 0.5}, "sigma = None: must be a number"),
        ("gaussian", {"mu": 0.5, "sigma": 0.0}, "sigma = 0: must be greater than 0"),
        ("gaussian", {"mu": math.nan, "sigma": 0.1}, "mu = NaN: must be finite"),
        ("gaussian", {"mu": 50.0, "sigma": 0.1}, "mu = 50: .* no mass"),
        ("cosine", {"eps": 1.0}, r"eps = 1: must be in \[0, 1\)"),
        ("bimodal_gaussian", BIMODAL | {"mixture": 1.0}, "mixture = 1: must be in"),
        ("bimodal_gaussian", BIMODAL | {"sigma2": -1.0}, "sigma2 = -1: must be greater"),
        ("bimodal_gaussian", BIMODAL | {"mu2": math.inf}, "mu2 = inf: must be finite"),
        ("bimodal_gaussian", {"mu": MU, "sigma": SIGMA}, "mu2 = None: must be a number"),
    ],
)
def test_wrong_parameters_name_themselves(
    name: str, kwargs: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(name, **kwargs)


def weighting_reference(name: str, k: float, alpha: Tensor) -> Tensor:
    low = torch.sigmoid(torch.tensor(-20.0, dtype=torch.float64))
    alpha = alpha.clamp(low, 1 - low)
    log_odds = torch.log(alpha / (1 - alpha))
    bump = torch.exp(-((log_odds - 2.4) ** 2) / (2 * 2.4**2)) / (2.4 * math.sqrt(2 * math.pi))
    return {
        "nelbo": torch.ones_like(alpha),
        "edm": bump * (torch.exp(-log_odds) + 0.5**2) / 0.5**2,
        "iddpm": 2 * torch.sqrt(alpha * (1 - alpha)),
        "sigmoid": (1 - alpha) / (1 - (1 - math.exp(-k)) * alpha),
        "flow_matching": torch.sqrt((1 - alpha) / alpha),
    }[name]


@pytest.mark.parametrize("schedule", REFERENCES)
@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("nelbo", 0.0),
        ("edm", 0.0),
        ("iddpm", 0.0),
        ("sigmoid", -1.0),
        ("sigmoid", 2.0),
        ("flow_matching", 0.0),
    ],
)
def test_weightings(schedule: str, name: str, k: float) -> None:
    made = Schedule(schedule, **REFERENCES[schedule].kwargs)
    t = torch.cat([T, torch.ones(1).double()])  # where α = 0 and the clamp binds
    alpha = 1 - torch.from_numpy(made.mask_prob(t))
    expected = weighting_reference(name, k, alpha)
    np.testing.assert_allclose(Weighting(name, k=k).at(made, t), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", REFERENCES)
def test_simple_makes_the_total_weight_one(schedule: str) -> None:
    made = Schedule(schedule, **REFERENCES[schedule].kwargs)
    total = Weighting("simple").at(made, T) * made.loss_weight(T)
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_sigmoid_of_zero_is_simple_under_loglinear() -> None:
    schedule = Schedule("loglinear")
    a, b = (Weighting(name).at(schedule, T) for name in ("sigmoid", "simple"))
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_unknown_weighting() -> None:
    with pytest.raises(ConfigError, match=r"weighting = p2: must be one of nelbo, edm, .*, simple"):
        Weighting("p2")


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("schedule", ScheduleName),
        ("weighting", WeightingName),
        ("packing", PackingName),
        ("detokenizer", DetokenizerName),
    ],
)
def test_settings_name_what_the_core_has(kind: str, choices: object) -> None:
    assert list(get_args(choices)) == _core.names(kind)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("name", REFERENCES)
def test_levels_and_probabilities_outside_their_range_are_refused(name: str, value: float) -> None:
    schedule = Schedule(name, **REFERENCES[name].kwargs)
    calls = {"t": [schedule.mask_prob, schedule.loss_weight], "p": [schedule.inverse]}
    calls["t"].append(lambda t: Weighting().at(schedule, t))
    calls["p"].append(schedule.loss_weight_at)
    for field, functions in calls.items():
        for function in functions:
            with pytest.raises(ConfigError, match=rf"{field} = .*: must be in [\[(]0, 1\]"):
                function([0.5, value])
    with pytest.raises(ConfigError, match=r"t = 0: must be in \(0, 1\]"):
        schedule.loss_weight(0.0)


@pytest.mark.filterwarnings("ignore:p.0. = 0.001")
@pytest.mark.parametrize("name", REFERENCES)
def test_a_callable_agrees_with_the_schedule_it_tabulates(name: str) -> None:
    """The errors that the docstring of ``from_callable`` states."""
    schedule = Schedule(name, **REFERENCES[name].kwargs)
    table = Schedule.from_callable(lambda t: float(schedule.mask_prob(t)))
    t = np.concatenate([np.geomspace(1e-3, 1, 5000), 1 - np.geomspace(1e-6, 0.9, 5000)])
    p, w = schedule.mask_prob(t), schedule.loss_weight(t)
    weight_error = 1e-7 if name in ("loglinear", "square", "square_root") else 1e-4
    inside = t < 1
    np.testing.assert_allclose(table.mask_prob(t), p, rtol=1e-6)
    np.testing.assert_allclose(table.loss_weight(t)[inside], w[inside], rtol=weight_error)
    np.testing.assert_allclose(table.inverse(p), t, rtol=1e-6)
    np.testing.assert_allclose(table.loss_weight_at(p)[inside], w[inside], rtol=weight_error)


def test_a_table_says_which_mass_it_misses() -> None:
    with pytest.warns(UserWarning, match=r"p\(0\) = 0\.1: the bound misses"):
        table = Schedule.table([0, 0.5, 1], [0.1, 0.4, 1])
    assert table.mask_prob(0.0) == pytest.approx(0.1)
    assert table.inverse(0.05) == 0.0


def test_values_that_float64_cannot_tell_apart_are_left_out() -> None:
    table = Schedule.from_callable(lambda t: 1 - (1 - t) ** 4)
    assert table.points is not None
    assert table.points[-2][1] < 1 - 1e-13
    np.testing.assert_allclose(table.mask_prob(0.5), 1 - 0.5**4, rtol=1e-6)


@pytest.mark.parametrize(
    ("t", "p", "message"),
    [
        ([0, 1], [0, 1], "schedule_table = 2 points: must be three or more"),
        ([0.1, 0.5, 1], [0, 0.5, 1], "must be t from 0 to 1"),
        ([0, 0.5, 1], [0, 0.5, 0.9], r"p\(1\) = 0\.9: must be p\(1\) = 1: a mass of 0\.0\d+"),
        ([0, 0.5, 0.6, 1], [0, 0.5, 0.4, 1], r"\(0\.6, 0\.4\) after \(0\.5, 0\.5\): must be"),
        ([0, 0.5, 1], [-0.5, 0.5, 1], r"p\(0\) = -0\.5: must be 0"),
        ([0, 0.5, 1], [0, math.nan, 1], "strictly increasing"),
        ([0, 0.5, 1], [0, 1], "p = 2 numbers: must be as many as the 3 levels"),
    ],
)
def test_points_that_are_no_table_name_themselves(
    t: list[float], p: list[float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule.table(t, p)


def test_callables_that_are_no_schedule_name_themselves() -> None:
    with pytest.raises(ConfigError, match=r"p\(1\) = 0\.5: .* a mass of 0\.5 is missing"):
        Schedule.from_callable(lambda t: t / 2)
    with pytest.raises(ConfigError, match="strictly increasing"):
        Schedule.from_callable(lambda t: math.sin(2.5 * t) / math.sin(2.5))
    with pytest.raises(ConfigError, match="schedule_table = 2 points"):
        Schedule.from_callable(lambda t: float(t == 1))
    with pytest.raises(ConfigError, match=r"p = 1 from t = 0\.5.*: must be strictly increasing"):
        Schedule.from_callable(lambda t: min(1.0, 2 * t))
    with pytest.raises(ConfigError, match=r"p = nan at t = .*: must be a finite number"):
        Schedule.from_callable(lambda t: math.nan if t else 0.0)
    with pytest.raises(ConfigError, match=r"p = 2 at t = 1: must be 1 there"):
        Schedule.from_callable(lambda t: 2 * t)


def test_settings_take_a_table_or_a_file_of_one(tmp_path: Path) -> None:
    points = Schedule.from_callable(lambda t: t**1.5).points
    assert points is not None
    (tmp_path / "p.json").write_text(json.dumps(points))
    np.save(tmp_path / "p.npy", np.array(points))
    cfg = NoiseConfig(schedule="table", schedule_table=points)
    for name in ("p.json", "p.npy"):
        assert NoiseConfig(schedule="table", schedule_table=str(tmp_path / name)) == cfg
    assert from_dict(NoiseConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg
    np.testing.assert_allclose(schedule_of(cfg).loss_weight(0.01), 150, rtol=1e-6)
    with pytest.raises(ConfigError, match=r"schedule-table .not given.: must be the points"):
        NoiseConfig(schedule="table")
    (tmp_path / "wrong.json").write_text("[1, 2]")
    for name in ("wrong.json", "nowhere.npy"):
        with pytest.raises(ConfigError, match=r"must be a \.json or \.npy file of pairs"):
            NoiseConfig(schedule="table", schedule_table=str(tmp_path / name))


@pytest.mark.parametrize("clip", [None, (0.3, 0.8)])
@pytest.mark.parametrize("estimator", ["bernoulli", "count"])
@pytest.mark.parametrize("name", ["loglinear", "gaussian"])
def test_a_tabulated_schedule_draws_the_same_noise(
    name: str, estimator: str, clip: tuple[float, float] | None
) -> None:
    schedule = Schedule(name, **REFERENCES[name].kwargs)
    table = Schedule.from_callable(lambda t: float(schedule.mask_prob(t)))
    x0 = torch.randint(0, 100, (64, 32), generator=torch.Generator().manual_seed(0))
    drawn = []
    for made in (schedule, table):
        spec = NoiseSpec(made, estimator=estimator, clip=clip, weighting=Weighting("iddpm"))
        drawn.append(draw_noise(spec, x0, torch.ones_like(x0) > 0, 4, seed=1, step=2))
    (mask, mask_prob, weight), (mask2, mask_prob2, weight2) = drawn
    assert (mask != mask2).float().mean() < 1e-3
    torch.testing.assert_close(mask_prob, mask_prob2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight, weight2, rtol=1e-3, atol=1e-6)
