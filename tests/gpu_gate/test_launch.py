"""Host code between the operators and the kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

import torch

from bd3lm.model.attention.triton.launch import count_chunks, laid_out, padded


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


def test_rows_begin_where_wide_loads_may() -> None:
    """Views of a fused projection are taken as they are; others are copied."""
    qkv = torch.randn(2, 10, 3 * 4 * 80)
    q, k, v = (x.unflatten(-1, (4, 80)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    for view in (q, k, v):
        assert laid_out(view) is view
    apart = torch.randn(2, 4, 10, 81)[..., :80]  # rows 81 apart
    late = torch.randn(2 * 4 * 10 * 80 + 1)[1:].view(2, 4, 10, 80)
    across = torch.randn(2, 4, 80, 10).mT
    for view in (apart, late, across):
        found = laid_out(view)
        assert torch.equal(found, view)
        assert found.data_ptr() % 16 == 0
        assert all(stride % 16 == 0 for stride in found.stride()[:-1])
        assert found.stride(-1) == 1
