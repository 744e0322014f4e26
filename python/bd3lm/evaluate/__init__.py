"""Likelihood and sample quality."""

from bd3lm.evaluate.likelihood import Likelihood, evaluate_likelihood
from bd3lm.evaluate.quality import distinct_n, known_word_share

__all__ = ["Likelihood", "distinct_n", "evaluate_likelihood", "known_word_share"]
