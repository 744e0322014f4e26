"""Host code between the operators and the kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from bd3lm.model.attention.cuda.launch import count_chunks, padded


@pytest.mark.parametrize(
    ("multiprocessors", "programs", "key_tiles", "chunks"),
    [
        (108, 1000, 512, 1),  # the device is full as it is
        (108, 12, 512, 18),
        (132, 1, 4096, 64),
        (108, 12, 20, 5),
        (108, 12, 3, 1),
    ],
)
def test_a_long_cache_is_split_to_fill_the_device(
    multiprocessors: int, programs: int, key_tiles: int, chunks: int
) -> None:
    assert count_chunks(multiprocessors, programs, key_tiles) == chunks


def test_heads_are_padded_to_what_a_product_takes() -> None:
    assert [padded(width) for width in (1, 16, 24, 96, 256)] == [16, 16, 32, 128, 256]
