"""Numbers that no computation can hold are refused by name, never wrapped or allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bd3lm import _core
from bd3lm.data import NoiseSpec, Rows, Schedule
from bd3lm.errors import ConfigError
from tests.conftest import token_arrays

HUGE = 2**64 - 1


def noise(**changed: Any) -> Callable[[], None]:
    """Noise of two rows of eight tokens, with some arguments changed."""
    args: dict[str, Any] = {
        "spec": NoiseSpec(Schedule("loglinear"))._core,
        "key": (0, 0, 0, 2),
        "seq_len": 8,
        "block_size": 4,
        "x0": np.zeros(16, np.int64),
        "noisable": np.ones(16, np.uint8),
        "mask": np.zeros(16, np.uint8),
        "mask_prob": np.zeros(4, np.float32),
        "weight": np.zeros(4, np.float32),
    }
    return lambda: _core.noise(**args | changed)


def rotation(place: tuple[int, int], count: int) -> Callable[[], None]:
    angles = np.ones(4, np.float32)
    heads = np.zeros(16, np.float32)
    return lambda: _core.rotate_heads(heads, place, count, (angles, angles, 4, False), 1)


def draw(**changed: Any) -> Callable[[], None]:
    shaping = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "forbidden": [], "threads": 1}
    token, log_p = np.zeros(1, np.int64), np.zeros(1)
    logits, uniform = np.zeros(4, np.float32), np.array([changed.pop("uniform", 0.5)])
    return lambda: _core.draw(logits, None, uniform, token, log_p, **shaping | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.row_order(1, 10, 0, 2**40), r"count = 1099511627776: must be at most 2\^24"),
        (lambda: _core.row_order(1, 10, 0, 2**61), r"count = 2305843009213693952"),
        (lambda: _core.row_order(1, 10, HUGE - 3, 8), r"first = 18446744073709551612"),
        (lambda: _core.row_order(1, 0, 0, 1), r"num_rows = 0: must be from 1 to 2\^63"),
        (lambda: _core.row_order(1, HUGE, 0, 1), r"num_rows = 18446744073709551615"),
        (noise(seq_len=0), r"seq_len = 0: must be at least 1"),
        (noise(block_size=0), r"block_size = 0: must be a divisor"),
        (noise(key=(0, 0, HUGE, HUGE)), r"num_rows = .*: must be at least first_row"),
        (noise(key=(0, 0, 0, HUGE)), r"num_rows = .*: must be few enough"),
        (noise(noisable=np.full(16, 7, np.uint8)), r"noisable = 7: must be 0 or 1"),
        (noise(mask=np.zeros(15, np.uint8)), r"mask = 15 elements: must be 16 elements long"),
        (rotation((8, HUGE - 3), 4), r"heads = 4 features from \d+ on: must be within rows of 8"),
        (rotation((8, 4), HUGE - 3), r"heads = \d+ features from 4 on"),
        (draw(temperature=-1.0), r"temperature = -1: must be a finite number of at least 0"),
        (draw(temperature=float("nan")), r"temperature = NaN"),
        (draw(top_k=0), r"top_k = 0: must be at least 1"),
        (draw(top_p=0.0), r"top_p = 0: must be greater than 0"),
        (draw(uniform=1.0), r"uniform = 1: must be in \[0, 1\)"),
        (lambda: _core.names("colour"), r"kind = colour: must be one of schedule, weighting"),
    ],
)
def test_impossible_numbers_are_named(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        call()
    assert refused.value.field
    assert refused.value.allowed


def test_the_same_arguments_unchanged_are_taken() -> None:
    noise()()
    rotation((8, 4), 4)()
    draw()()
    assert len(_core.row_order(1, 10, HUGE - 8, 8)) == 8


def test_a_batch_beyond_memory_is_named() -> None:
    rows = Rows(token_arrays(20), seq_len=2**24, block_size=4, keep_last=True)
    with pytest.raises(ConfigError, match="rows = 17592186044416: must be few enough to fit"):
        rows.batch(np.zeros(2**20, np.uint64))
