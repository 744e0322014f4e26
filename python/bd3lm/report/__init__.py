"""Plots."""

from bd3lm.report.plots import plot_loss, read_metrics

__all__ = ["plot_loss", "read_metrics"]
