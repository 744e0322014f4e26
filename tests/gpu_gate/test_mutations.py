"""A gate that passes everything is worth nothing: each change of the kernels must fail it."""

from __future__ import annotations

import pytest
from interpreter import Errors, too_large
from mutations import MUTATIONS, Mutation


def test_probes_pass_unchanged(mutated: list[list[Errors]]) -> None:
    assert len(mutated[0]) == len({mutation.probe for mutation in MUTATIONS})
    for errors in mutated[0]:
        assert not too_large(errors, "fp32")


@pytest.mark.parametrize(
    ("index", "mutation"), list(enumerate(MUTATIONS)), ids=[m.what for m in MUTATIONS]
)
def test_caught(mutated: list[list[Errors]], index: int, mutation: Mutation) -> None:
    (errors,) = mutated[1 + index]
    assert too_large(errors, "fp32"), f"{mutation.what}: {errors}"
