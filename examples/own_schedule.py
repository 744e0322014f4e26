"""Train under a noise schedule of your own.

Run: python examples/own_schedule.py

A schedule is a function p(t): the probability that a token is masked at level t, strictly
increasing from p(0) = 0 to p(1) = 1. It is tabulated once, evaluated in Rust, and saved with the
checkpoint. Levels are drawn by the `bernoulli` estimator; `count`, the default, is the same under
every schedule.
"""

from typing import Any

import train_on_text

import bd3lm


def main(**settings: Any) -> None:
    """Show p, w and the inverse of t^1.5, and train under it."""
    schedule = bd3lm.Schedule.from_callable(lambda t: t**1.5)
    for t in (0.1, 0.5, 0.9):
        p, w = float(schedule.mask_prob(t)), float(schedule.loss_weight(t))
        print(f"t = {t}: p = {p:.4f}, w = {w:.4f}, t(p) = {float(schedule.inverse(p)):.4f}")

    noise = {"estimator": "bernoulli", "schedule": "table", "schedule_table": schedule.points}
    train_on_text.main(out=train_on_text.RUNS / "own-schedule", noise=noise, **settings)


if __name__ == "__main__":
    main()
