"""Packing plans lose no token, invent none and score none twice."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bd3lm.data import Rows
from bd3lm.data.rows import CleanBatch
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError

BOS, EOS, MASK, FIRST = 1, 2, 3, 10
Lengths = list[int]

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 8)).filter(lambda kb: kb[0] * kb[1] >= 2)


def store(lengths: Lengths) -> TokenArrays:
    """Documents whose ids are FIRST, FIRST + 1, … over the whole set, so that each is unique."""
    ends = list(accumulate(lengths, initial=FIRST))
    documents = [list(range(a, b)) for a, b in pairwise(ends)]
    return TokenArrays(documents, vocab_size=1 << 20, bos_id=BOS, eos_id=EOS, mask_id=MASK)


def every_row(rows: Rows) -> CleanBatch:
    batch = rows.batch(np.arange(len(rows), dtype=np.uint64))
    assert batch.x0.shape == (len(rows), rows.seq_len)
    return batch


def document_of(lengths: Lengths) -> np.ndarray:
    """Number of the document that each token belongs to."""
    return np.repeat(np.arange(len(lengths)), lengths)


@given(lengths, shapes, st.booleans())
def test_wrap_is_the_concatenation_cut(
    lengths: Lengths, shape: tuple[int, int], keep: bool
) -> None:
    seq_len = shape[0] * shape[1]
    stream = list(range(FIRST, FIRST + sum(lengths)))
    room = seq_len - 1
    expected = [[BOS, *stream[i : i + room]] for i in range(0, len(stream), room)]
    if not keep and len(expected[-1]) < seq_len:
        expected.pop()
    if not expected:
        with pytest.raises(ConfigError, match="do not fill one row"):
            Rows(store(lengths), seq_len=seq_len, block_size=shape[1], keep_last=keep)
        return
    rows = Rows(store(lengths), seq_len=seq_len, block_size=shape[1], keep_last=keep)
    assert rows.num_stream_tokens == len(stream)
    batch = every_row(rows)
    assert len(rows) == len(expected)
    for i, row in enumerate(expected):
        n = len(row)
        assert batch.x0[i, :n].tolist() == row
        assert batch.noisable[i].tolist() == [False] + [True] * (n - 1) + [False] * (seq_len - n)
    padded = len(expected[-1]) < seq_len
    assert (batch.doc_ids is not None) == padded
    if batch.doc_ids is not None:  # without documents, a row counts as one
        n = len(expected[-1])
        assert batch.doc_ids[-1].tolist() == [0] * n + [-1] * (seq_len - n)


@given(lengths, shapes)
def test_wrap_with_an_eos_a_row(lengths: Lengths, shape: tuple[int, int]) -> None:
    seq_len = max(shape[0], 3) * shape[1]
    stream = list(range(FIRST, FIRST + sum(lengths)))
    room = seq_len - 2
    rows = Rows(store(lengths), seq_len=seq_len, block_size=shape[1], row_eos=True, keep_last=True)
    batch = every_row(rows)
    for i, row in enumerate(range(0, len(stream), room)):
        expected = [BOS, *stream[row : row + room], EOS]
        assert batch.x0[i, : len(expected)].tolist() == expected
        assert batch.noisable[i].sum() == len(expected) - 1


@given(lengths, st.integers(2, 6), st.integers(1, 8), st.data())
def test_strides_score_every_token_once(
    lengths: Lengths, blocks: int, block_size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, blocks - 1)) * block_size
    seq_len = blocks * block_size
    rows = Rows(
        store(lengths), seq_len=seq_len, block_size=block_size, stride=stride, keep_last=True
    )
    batch = every_row(rows)
    stream = list(range(FIRST, FIRST + sum(lengths)))
    assert batch.x0[batch.noisable].tolist() == stream
    # A later row begins a stride further, and its scored part is preceded by all of its context.
    assert batch.x0[:, 1].tolist() == [stream[i * stride] for i in range(len(rows))]
    assert not batch.noisable[1:, : seq_len - stride].any()


@given(lengths, shapes, st.sampled_from(["aligned", "best_fit"]))
def test_segments(lengths: Lengths, shape: tuple[int, int], packing: str) -> None:
    blocks, block_size = shape
    seq_len = blocks * block_size
    batch = every_row(Rows(store(lengths), seq_len=seq_len, block_size=block_size, packing=packing))
    assert batch.doc_ids is not None
    scored = batch.x0[batch.noisable]
    assert sorted(scored.tolist()) == list(range(FIRST, FIRST + sum(lengths)))
    if packing == "aligned":
        assert scored.tolist() == sorted(scored.tolist())
    document = document_of(lengths)
    segments = []
    for x0, noisable, doc_ids in zip(batch.x0, batch.noisable, batch.doc_ids, strict=True):
        live = doc_ids[doc_ids >= 0]
        assert live.unique().tolist() == list(range(int(live.max()) + 1)), "numbered from 0"
        assert not noisable[doc_ids < 0].any()
        for number in live.unique():
            (where,) = torch.nonzero(doc_ids == number, as_tuple=True)
            start, end = int(where[0]), int(where[-1]) + 1
            assert start % block_size == 0, "a document starts a block"
            assert len(where) == end - start >= 2
            assert x0[start] == BOS
            assert noisable[start:end].tolist() == [False] + [True] * (end - start - 1)
            ids = x0[start + 1 : end].numpy() - FIRST
            assert ids.tolist() == list(range(int(ids[0]), int(ids[-1]) + 1))
            assert len(set(document[ids])) == 1
            segments.append(ids)
    if packing == "best_fit":  # cut only where no row could hold the document
        room = seq_len - 1
        assert len(segments) == sum(-(-n // room) for n in lengths)


@given(lengths, shapes)
def test_wrap_can_tell_documents_apart(lengths: Lengths, shape: tuple[int, int]) -> None:
    seq_len = shape[0] * shape[1]
    rows = Rows(
        store(lengths), seq_len=seq_len, block_size=shape[1], keep_last=True, documents=True
    )
    batch = every_row(rows)
    assert batch.doc_ids is not None
    for x0, noisable, doc_ids in zip(batch.x0, batch.noisable, batch.doc_ids, strict=True):
        document = document_of(lengths)[x0[noisable].numpy() - FIRST]
        assert doc_ids[noisable].tolist() == (document - document[0]).tolist()
        assert doc_ids[0] == 0, "BOS belongs to the first"


@given(lengths, shapes, st.data())
def test_any_order_of_rows(lengths: Lengths, shape: tuple[int, int], data: st.DataObject) -> None:
    seq_len = shape[0] * shape[1]
    rows = Rows(store(lengths), seq_len=seq_len, block_size=shape[1], packing="best_fit")
    whole = every_row(rows)
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    some = rows.batch(np.array(picked, dtype=np.uint64))
    assert torch.equal(some.x0, whole.x0[picked])
    assert torch.equal(some.noisable, whole.noisable[picked])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size": 3}, "block_size = 3: must be a divisor of seq_len = 8"),
        ({"block_size": 0}, "block_size = 0: must be a divisor"),
        ({"seq_len": 1, "block_size": 1}, "seq_len = 1: must be 2 to"),
        ({"seq_len": 2, "row_eos": True}, "seq_len = 2: must be 3 to"),
        ({"seq_len": 64}, "seq_len = 64: .* 20 tokens do not fill one row"),
        ({"stride": 3}, "stride = 3: must be a multiple of 2 below 8"),
        ({"stride": 8}, "stride = 8"),
        ({"stride": 2, "row_eos": True}, "stride = 2: must be left out where rows close"),
        ({"packing": "first_fit"}, "packing = first_fit: must be one of wrap, aligned, best_fit"),
        ({"packing": "aligned", "row_eos": True}, "packing = aligned: must be wrap"),
    ],
)
def test_what_is_not_allowed_names_itself(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rows(store([20]), **({"seq_len": 8, "block_size": 2} | kwargs))  # type: ignore[arg-type]


def test_a_row_that_does_not_exist() -> None:
    rows = Rows(store([20]), seq_len=8, block_size=2)
    with pytest.raises(ConfigError, match="row = 2: must be below the 2 rows"):
        rows.batch(np.array([0, 2], dtype=np.uint64))
