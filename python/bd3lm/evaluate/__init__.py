"""Likelihoods, the variance of the loss, and sample quality."""

from bd3lm.evaluate.likelihood import Likelihood, evaluate_likelihood
from bd3lm.evaluate.quality import distinct_n, known_word_share
from bd3lm.evaluate.score import conditional_likelihood, score, scoring_rows
from bd3lm.evaluate.variance import count_statistics, nelbo_variance, search_clip

__all__ = [
    "Likelihood",
    "conditional_likelihood",
    "count_statistics",
    "distinct_n",
    "evaluate_likelihood",
    "known_word_share",
    "nelbo_variance",
    "score",
    "scoring_rows",
    "search_clip",
]
