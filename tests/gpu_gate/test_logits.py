"""The kernels over rows of logits: the head's cross-entropy, and draws of tokens."""

from __future__ import annotations

from typing import Any

import pytest
from cases import DTYPES

pytestmark = pytest.mark.slow  # half a minute in the interpreter

# Of float32 sums of a few dozen exponentials, and of one rounding to the logits' dtype.
NATS = 2e-6
GRADIENT = {"fp32": 2e-6, "bf16": 5e-3, "fp16": 1e-3}
# Chi-square above this with ten degrees of freedom has a probability of 1e-6.
CHI_SQUARE = 48.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_and_its_gradient(logits: dict[str, Any], dtype: str) -> None:
    mine = {k: v for k, v in logits["cross_entropy"].items() if k.startswith(dtype)}
    assert len(mine) == 3
    for name, errors in mine.items():
        assert errors["nats"] <= NATS, name
        assert errors["gradient"] <= GRADIENT[dtype], name
        assert errors["mask"] == 0.0, "the mask token is not even a rival"
        assert errors["same"] == 1.0, "with and without a gradient"
        assert errors["border"] == 1.0, "nothing is written past a row"


def test_draws_are_those_of_the_cpu(logits: dict[str, Any]) -> None:
    """Token by token, under all settings, ties between equal logits included."""
    assert len(logits["draws"]) >= 12
    for way, found in logits["draws"].items():
        assert found["same"] == 1.0, way
        assert found["narrow"] == 1.0, way
        assert found["log_p"] <= 1e-6, way
        assert found["impossible"] == 0.0, way


def test_tokens_follow_the_law_of_the_cpu(logits: dict[str, Any]) -> None:
    drawn, law = logits["law"]["drawn"], logits["law"]["law"]
    rows = sum(drawn)
    assert rows >= 500
    assert not any(n for n, p in zip(drawn, law, strict=True) if p == 0), "outside the support"
    terms = [(n - rows * p) ** 2 / (rows * p) for n, p in zip(drawn, law, strict=True) if p > 0]
    assert 3 <= len(terms) <= 11, "degrees of freedom that the limit allows for"
    assert sum(terms) <= CHI_SQUARE
