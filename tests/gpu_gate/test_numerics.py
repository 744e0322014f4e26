"""The kernels in Triton's interpreter against float64, at odd sizes, between NaN borders."""

from __future__ import annotations

from typing import Any

import pytest
from cases import EXHAUSTIVE, QUICK, Case
from interpreter import DECODES, Errors, too_large


@pytest.mark.parametrize(("index", "case"), list(enumerate(QUICK)), ids=str)
def test_attention_and_gradients(quick: list[Errors], index: int, case: Case) -> None:
    assert set(quick[index]) == {"out", "dq", "dk", "dv"}
    assert not too_large(quick[index], case.dtype)


@pytest.mark.parametrize(("index", "spec"), list(enumerate(DECODES)))
def test_decoding(quick: list[Errors], index: int, spec: dict[str, Any]) -> None:
    errors = quick[len(QUICK) + index]
    assert set(errors) == {"paged", "plain"}
    assert not too_large(errors, spec["dtype"])


@pytest.mark.slow
@pytest.mark.parametrize(("index", "case"), list(enumerate(EXHAUSTIVE)), ids=str)
def test_exhaustive(exhaustive: list[Errors], index: int, case: Case) -> None:
    assert set(exhaustive[index]) == {"out", "dq", "dk", "dv"}
    assert not too_large(exhaustive[index], case.dtype)
