"""The mask as intervals against its definition, one query and one key at a time."""

import pytest
import torch

from bd3lm.model.attention import BlockMask

SHAPES = [(8, 4), (7, 3), (5, 1), (6, 6), (9, 4)]


def documents(seq_len, docs):
    """Rows of document ids: two documents and padding, in odd places."""
    if not docs:
        return None
    cut = seq_len // 2 + 1
    first = [0] * cut + [1] * (seq_len - cut)
    second = [0] * (seq_len - 2) + [-1, -1]
    return torch.tensor([first, second], dtype=torch.int32)


def allowed(q, k, block_size, seq_len, doc, *, noised, causal_end=0):
    """docs/math.md §7, literally; with an xt stream, index < L is xt and the rest is x0."""
    q_clean, k_clean = (not noised or q >= seq_len), (not noised or k >= seq_len)
    i, j = q % seq_len, k % seq_len
    if doc is not None and (doc[i] != doc[j] or doc[i] < 0):
        return False
    bq, bk = i // block_size, j // block_size
    if not q_clean and not k_clean:
        return bq == bk
    if not q_clean and k_clean:
        return bq > bk
    if q_clean and k_clean:
        return i >= j if i < causal_end else bq >= bk
    return False


@pytest.mark.parametrize(("seq_len", "block_size"), SHAPES)
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("form", ["training", "denoise", "clean"])
@pytest.mark.parametrize("last", [True, False], ids=["", "no last block"])
@pytest.mark.parametrize("causal_end", [0, 3, 99], ids=["", "causal at first", "causal"])
def test_dense_is_the_definition(seq_len, block_size, docs, form, last, causal_end):
    if form == "clean" and not last:
        pytest.skip("x0 alone is whole")
    doc_ids = documents(seq_len, docs)
    if form == "denoise" and causal_end:
        pytest.skip("no x0 position is a query")
    causal_end = min(causal_end, seq_len)
    options = {"causal_end": causal_end} if causal_end else {}
    mask = getattr(BlockMask, form)(seq_len, block_size, doc_ids, **options)
    mask = mask if last else mask.without_last_clean()
    dense = mask.dense()
    assert dense.shape[1:] == (mask.num_queries, mask.num_keys)
    for row in range(dense.shape[0]):
        doc = None if doc_ids is None else doc_ids[row].tolist()
        for q in range(mask.num_queries):
            for k in range(mask.num_keys):
                noised = form != "clean"
                expected = allowed(
                    q, k, block_size, seq_len, doc, noised=noised, causal_end=causal_end
                )
                assert bool(dense[row, q, k]) == expected, (row, q, k)


def test_no_noised_query_sees_the_last_clean_block():
    whole = BlockMask.denoise(9, 4).dense()
    assert not whole[:, :, 9 + 8 :].any()
    assert torch.equal(BlockMask.denoise(9, 4).without_last_clean().dense(), whole[:, :, : 9 + 8])


def test_cached_queries_are_the_last_rows():
    whole = BlockMask.clean(12, 4).dense()
    assert torch.equal(BlockMask.clean(12, 4, first=8).dense(), whole[:, 8:])


def test_live_fraction_is_the_stated_one():
    seq_len, block_size = 32, 4
    live = BlockMask.training(seq_len, block_size).dense().double().mean().item()
    assert live == (seq_len**2 + seq_len * block_size) / (2 * seq_len) ** 2
