"""Tables 9 and 12 and figure 2, which need no training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bd3lm.data import Schedule, Weighting
from bd3lm.data.noise import WEIGHTINGS

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def schedules() -> dict[str, Schedule]:
    """All seven schedules with the parameters used here; σ and μ2 are not stated in the paper."""
    plain = ("loglinear", "square", "square_root", "logarithmic", "cosine")
    return {name: Schedule(name) for name in plain} | {
        "gaussian": Schedule("gaussian", mu=0.5, sigma=0.2),
        "bimodal_gaussian": Schedule(
            "bimodal_gaussian", mu=0.3, sigma=0.2, mu2=0.8, sigma2=0.2, mixture=0.6
        ),
    }


@dataclass(frozen=True)
class Formula:
    """A table without trainings.

    Attributes:
        markdown: the table.
        title: of the picture.
        x: its horizontal axis.
        panels: its curves by name, by vertical axis.
        band: part of the horizontal axis to shade, and its name.
    """

    markdown: str
    title: str
    x: NDArray[np.float64]
    panels: dict[str, dict[str, NDArray[np.float64]]]
    band: tuple[float, float, str] | None = None


def table9() -> Formula:
    """p(t) and w(t) of every schedule, with w checked against the slope of p."""
    head = ["schedule", *(f"p({t:g}), w({t:g})" for t in LEVELS), "w against p′/p by differences"]
    rows = []
    for name, schedule in schedules().items():
        p, w = schedule.mask_prob(LEVELS), schedule.loss_weight(LEVELS)
        step = 1e-6
        ends = [schedule.mask_prob(np.array(LEVELS) + s) for s in (-step, step)]
        slope = (ends[1] - ends[0]) / (2 * step)
        error = float(np.max(np.abs(slope / p / w - 1)))
        values = [f"{a:.3f}, {b:.3f}" for a, b in zip(p, w, strict=True)]
        rows.append([name, *values, f"within {error:.0e}"])
    note = (
        "The paper writes loss_scaling = −w. Gaussian schedules: μ = 0.5; 0.3 and 0.8; σ = 0.2. A "
        "clip draws t from a part of the axis (shaded: U[0.3, 0.8]) and leaves p and w as they are."
    )
    t = np.linspace(0.005, 1.0, 200)
    panels = {
        "p(t), mask probability": {n: s.mask_prob(t) for n, s in schedules().items()},
        "w(t), weight of a masked token": {n: s.loss_weight(t) for n, s in schedules().items()},
    }
    text = _markdown("### Table 9: Noise schedules", head, rows, note)
    return Formula(text, "Noise schedules", t, panels, (0.3, 0.8, "a clip: t ~ U[0.3, 0.8]"))


def table12() -> Formula:
    """w̃(t) of every weighting under loglinear, where t = p."""
    loglinear = Schedule("loglinear")
    head = ["weighting", *(f"w̃({t:g})" for t in LEVELS)]
    rows = [
        [name, *(f"{x:.4g}" for x in Weighting(name).at(loglinear, LEVELS))] for name in WEIGHTINGS
    ]
    note = (
        "The paper's last column is printed one row too low and its EDM lacks a bracket; these are "
        "the formulas it names. sigmoid (k = 0) and simple are the same function here."
    )
    t = np.linspace(0.02, 0.98, 97)
    lines = {name: Weighting(name).at(loglinear, t) for name in WEIGHTINGS}
    text = _markdown("### Table 12: Weighting functions (loglinear)", head, rows, note)
    return Formula(text, "Weighting of the bound", t, {"w̃(t)": lines})


def figure2() -> Formula:
    """Total weights w̃·w, and for which schedules a weighting keeps the bound."""
    head = ["weighting", *schedules()]
    rows = [
        [
            name,
            *(
                "holds" if Weighting(name).keeps_bound(schedule) else "fails"
                for schedule in schedules().values()
            ),
        ]
        for name in WEIGHTINGS
    ]
    note = (
        "Whether w̃ does not fall with t, the condition under which the weighted loss is still a "
        "bound of its kind."
    )
    loglinear, t = Schedule("loglinear"), np.linspace(0.02, 0.98, 97)
    total = {n: Weighting(n).at(loglinear, t) * loglinear.loss_weight(t) for n in WEIGHTINGS}
    text = _markdown("### Figure 2: Reweightings, and their condition", head, rows, note)
    title = "Weight of a masked token's loss (loglinear)"
    return Formula(text, title, t, {"w̃(t)·w(t)": total})


FORMULAS = {f.__name__: f for f in (table9, table12, figure2)}


def _markdown(heading: str, head: list[str], rows: list[list[str]], note: str) -> str:
    def line(texts: list[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    body = [line(head), line(["---"] * len(head)), *map(line, rows)]
    return "\n".join([heading, "", *body, "", note, ""])
