"""Settings of a tiny run, and outcomes of commands."""

from __future__ import annotations

import json

from bd3lm.cli import evaluate, judge, prepare, sample, train

SHORT = (
    "--seq-len 32 --batch-size 4 --log-every 1 --eval.every 0 --sample.length 16 --steps 2 "
    "--device cpu"
).split()
"""Options of a run of seconds, for a model that is given."""
TINY = [*SHORT, *"--model.width 32 --model.depth 1 --model.heads 2".split()]
ODD = "the old [b]house[/b] :key: 1:100:5 [red] [/INST] x[i] 'quoted' [/"
"""Text that rich would read as markup, emoji codes and links."""
SAMPLE = {"text": "a", "ids": [1], "stop": "eos", "nfe": 1, "nfe_paper": 1, "seconds": 0.1}
"""A record of ``bd3lm sample --json``."""
MAINS = {
    "bd3lm-train": train.main,
    "bd3lm-prepare": prepare.main,
    "bd3lm-eval": evaluate.main,
    "bd3lm-sample": sample.main,
    "bd3lm-judge": judge.main,
}


def outcome(call, *words):
    """Exit code of a command in this process."""
    try:
        call([str(word) for word in words])
    except SystemExit as stop:
        return stop.code
    return 0


def refused(capsys, call, *words):
    """The one sentence of a command that must refuse its words."""
    capsys.readouterr()
    assert outcome(call, *words) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    return text


def drawn(capsys, *words):
    capsys.readouterr()
    sample.main([str(word) for word in words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]
