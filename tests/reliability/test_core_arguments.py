"""Bad arguments of the extension's data functions: an exception, never a crash or a hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = r"""
import random, sys
import numpy as np
from bd3lm import _core
from bd3lm.data import load_tokenizer

seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
draw = random.Random(seed)
tokenizer = load_tokenizer("default")
INTS = [0, 1, 2, 3, 7, 64, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**62, 2**63, 2**64 - 1,
        2**64, 10**30]
FLOATS = [0.0, 0.5, 1.0, -1.0, float("nan"), float("inf"), 1e300]
WORDS = ["", "text", "wrap", "aligned", "best_fit", "loglinear", "/dev/zero", folder, "\0", "a.b",
         "jsonl", "\ud800", tokenizer.json]


def number():
    return draw.choice(INTS)


def array():
    dtype = draw.choice([np.uint64, np.int64, np.int32, np.uint8, np.float32, bool, object])
    shape = draw.choice([(), (0,), (3,), (64,), (2, 3), (1, 64)])
    made = np.zeros(shape, dtype)
    if made.size and dtype not in (bool, object):
        made.flat[0] = draw.choice([0, 1, 63])
    match draw.randrange(5):
        case 0:
            made.setflags(write=False)
        case 1 if made.ndim == 1:
            made = made[::-1]
        case 2 if made.ndim == 1:
            made = np.broadcast_to(made[:1], (8,)) if made.size else made
        case 3 if made.dtype != object:
            made = made.astype(made.dtype.newbyteorder())
    return made


def anything():
    return draw.choice([number, array, lambda: draw.choice(FLOATS), lambda: draw.choice(WORDS),
                        lambda: None, lambda: (number(), number(), number(), number()),
                        lambda: [draw.choice(WORDS)], lambda: store, lambda: draw.random() < 0.5])()


def reading():
    fields = {"text_field": "text", "filter": None, "lines": False, "detokenizer": None,
              "no_eos": False, "format": None, "strict": False, "rows": None, "chat": None}
    for key in draw.sample(sorted(fields), draw.randrange(3)):
        fields[key] = anything()
    if draw.random() < 0.1:
        fields.pop("lines")
    return fields


ids = np.arange(4, 200, dtype=np.int32)
store = _core.TokenStore.from_arrays(ids, np.array([96, 100], np.uint64), (300, 0, 1, 2))
plan = _core.RowPlan(store, seq_len=16, block_size=4, packing="aligned", row_eos=False, stride=None,
                     keep_last=True, documents=True)


def special():
    return draw.choice([(300, 0, 1, 2), tuple(number() for _ in range(4)), anything()])


CALLS = {
    "from_arrays": lambda: _core.TokenStore.from_arrays(
        draw.choice([ids, array()]), draw.choice([np.array([196], np.uint64),
        np.array([2**63, 2**63], np.uint64), array()]), special()),
    "open": lambda: _core.TokenStore.open(draw.choice(WORDS), draw.choice([None, True, False])),
    "plan": lambda: _core.RowPlan(
        store, seq_len=number(), block_size=number(), packing=draw.choice(WORDS),
        row_eos=draw.random() < 0.5, stride=draw.choice([None, number()]),
        keep_last=draw.random() < 0.5, documents=draw.random() < 0.5),
    "gather": lambda: plan.gather(draw.choice([array(), np.array([number() % 2**64], np.uint64)])),
    "document": lambda: store.document(number()),
    "row_order": lambda: _core.row_order(
        number(), number(), number(), draw.choice([0, 5, number()])),
    "detokenize": lambda: _core.detokenize(draw.choice([*WORDS, "lm1b"]), draw.choice(WORDS)),
    "vet": lambda: _core.vet_tokenizer(
        draw.choice([*WORDS, "{}", '{"model": {"vocab": []}}']), draw.choice([WORDS, anything()])),
    "rows": lambda: _core.parquet_rows(draw.choice(WORDS)),
    "count": lambda: _core.count_records(
        [draw.choice([folder + "/x.txt", "gone"])], reading=reading()),
    "documents": lambda: list(_core.Documents([draw.choice([folder + "/x.txt", "gone"])],
                                              reading=reading())),
    "prepare": lambda: _core.prepare(
        [folder + "/x.txt"], folder + f"/set{draw.random()}", draw.choice([tokenizer.json, "{}"]),
        draw.choice([tokenizer.special, special()]), reading=reading(),
        held_out=draw.choice([None, 0.5, *FLOATS]), threads=draw.choice([1, 2, number()]),
        progress=draw.choice([None, lambda *_: None, 3])),
}
for i in range(count):
    name = draw.choice(sorted(CALLS))
    print(name, flush=True)
    try:
        CALLS[name]()
    except Exception as error:
        pass
print("done")
"""


@pytest.mark.parametrize(
    ("seeds", "count"),
    [(1, 150), pytest.param(20, 500, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def test_bad_arguments_are_exceptions(seeds: int, count: int, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a text of a few words\n" * 20)
    for seed in range(seeds):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(seed), str(count), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        last = done.stdout.splitlines()[-1:]
        assert (done.returncode, last) == (0, ["done"]), (seed, last, done.stderr[-2000:])
        assert "panicked" not in done.stderr, (seed, done.stderr[-2000:])
