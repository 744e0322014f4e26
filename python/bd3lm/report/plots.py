"""Figures of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: never look for a display

from matplotlib import pyplot as plt


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]


def plot_loss(metrics: list[dict[str, Any]], file: Path, title: str) -> None:
    """Training loss and validation NELBO, in nats a token, over steps.

    Args:
        metrics: lines of ``metrics.jsonl``.
        file: the PNG to write.
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    loss = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    valid = [(m["step"], m["val_nelbo"]) for m in metrics if "val_nelbo" in m]
    if loss:
        axes.plot(*zip(*loss, strict=True), color="#4477aa", linewidth=1, label="training loss")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="#cc6677", label="validation NELBO")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
