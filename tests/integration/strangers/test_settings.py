"""Wrong settings, refused before work: walked by hypothesis."""

from __future__ import annotations

import dataclasses
import json
import os
from itertools import chain
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bd3lm.cli import compare, evaluate, export, judge, prepare, sample, train
from bd3lm_paper import cli as paper
from tests.integration.strangers.common import MAINS, SAMPLE, TINY, outcome, refused

# --- settings before work -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sample.forbidden", "not one token"], "forbidden = 'not one token': must be one token"),
        (["--sample.forbidden", "99999999"], "forbidden = 99999999: must be ids in [0, "),
        (["--block-size", "32", "--sample.length", "64"], "length = 64: must be at most 32"),
        (["--system", "sedd", "--sample.threshold", "0.5"], "must be left out for sedd"),
    ],
)
def test_sampling_settings_are_checked_before_training(corpus, capsys, tmp_path, words, sentence):
    out = tmp_path / "run"
    base = [w for w in TINY if w not in ("--sample.length", "16")]
    line = ["--data", corpus, "--out", out, *base, *words]
    assert sentence in refused(capsys, train.main, *line)
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "eval", "judge"])
def test_data_is_verified_where_that_is_wanted(folder, command, capsys, tmp_path, monkeypatch):
    from bd3lm.data import store

    seen = []
    real = store._core.TokenStore.open
    fake = SimpleNamespace(open=lambda path, verify: seen.append(verify) or real(path, verify))
    monkeypatch.setattr(store._core, "TokenStore", fake)
    data = str(folder / "data [v2]")
    (tmp_path / "s.jsonl").write_text(json.dumps(SAMPLE | {"text": "the old house"}))
    lines = {
        "train": ["--data", data, "--out", str(tmp_path / "run"), *TINY],
        "eval": [str(folder / "r [1]"), "--rows", "2"],
        "judge": [str(tmp_path / "s.jsonl"), "--reference", f"{data}/valid"],
    }
    MAINS[f"bd3lm-{command}"]([*lines[command], "--verify"])
    assert seen
    assert set(seen) == {True}


# --- all settings of all commands -----------------------------------------------------------------


NUMBERS = st.sampled_from(
    "-1 0 1 2 3 7 -9999999999 18446744073709551616 1e39 -1e-300 nan inf -inf 0.5 1e-9 1.5 x".split()
)
WORDS = st.sampled_from(["", "x", "[b]", "auto", "\udce9", "None", "../nowhere", "-1", "True"])


def options_of(kind, prefix=""):
    """Options of an argument dataclass: name, and whether it is a switch."""
    import typing

    found = []
    for name, hint in typing.get_type_hints(kind).items():
        option = f"--{prefix}{name.replace('_', '-')}"
        inner = [hint, *typing.get_args(hint)]
        nested = [h for h in inner if dataclasses.is_dataclass(h)]
        if nested:
            below = nested[0].__name__ in ("TrainConfig",) or option == "--draw"
            found += options_of(nested[0], "" if below else f"{prefix}{name}.")
        else:
            found.append((option, hint is bool or inner[0] is bool))
    return found


def lines_of(kind, harmless):
    """Command lines: one to three options with odd values."""
    options = [o for o in options_of(kind) if o[0] not in harmless]
    value = st.one_of(NUMBERS, WORDS)
    one = st.sampled_from(options).flatmap(
        lambda o: st.just([o[0]]) if o[1] else value.map(lambda v: [f"{o[0]}={v}"])
    )
    return st.lists(one, min_size=1, max_size=3).map(lambda parts: list(chain(*parts)))


def check_line(capsys, call, words):
    """Exit 0, or 2 with one sentence or the parser's frame; never a traceback."""
    capsys.readouterr()
    code = outcome(call, *words)
    text = capsys.readouterr().err
    assert code in (0, 2), (words, text[-2000:])
    assert "Traceback" not in text, words
    if code == 2:
        assert text.startswith("error: ") or "For full helptext" in text, text


EXAMPLES = settings(  # more of them in `make check-slow`
    max_examples=int(os.environ.get("BD3LM_EXAMPLES", "8")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@EXAMPLES
@given(words=lines_of(train.TrainArgs, {"--out", "--resume"}))
def test_any_setting_of_train(words, corpus, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("any") / "run"
    base = [*TINY, "--data", str(corpus), "--out", str(out), "--eval.rows", "2"]
    # `steps` and sizes that are right would take minutes: accepted ones give a small run.
    check_line(capsys, train.main, [*base, *words])


@EXAMPLES
@given(words=lines_of(sample.SampleArgs, {"--checkpoint", "--live", "--save-live"}))
def test_any_setting_of_sample(words, checkpoint, capsys):
    check_line(capsys, sample.main, [checkpoint, "--length", "12", *words])


@EXAMPLES
@given(words=lines_of(evaluate.EvalArgs, {"--checkpoint"}))
def test_any_setting_of_eval(words, checkpoint, capsys, tmp_path_factory):
    text = tmp_path_factory.getbasetemp() / "any.txt"
    text.write_text("the old house stood by the river")
    check_line(capsys, evaluate.main, [checkpoint, "--data", str(text), *words])


@EXAMPLES
@given(words=lines_of(prepare.PrepareArgs, {"--inputs", "--out"}))
def test_any_setting_of_prepare(words, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("any")
    (folder / "t.txt").write_text("the old house\nstood by the river")
    check_line(capsys, prepare.main, [str(folder / "t.txt"), "--out", str(folder / "o"), *words])


@EXAMPLES
@given(words=lines_of(judge.JudgeArgs, {"--samples"}))
def test_any_setting_of_judge(words, tmp_path_factory, capsys):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(SAMPLE) + "\n")
    check_line(capsys, judge.main, [str(file), *words])


@EXAMPLES
@given(words=lines_of(compare.CompareArgs, {"--runs", "--out"}))
def test_any_setting_of_compare(words, folder, tmp_path_factory, capsys):
    picture = tmp_path_factory.mktemp("any") / "c.png"
    check_line(capsys, compare.main, [str(folder / "r [1]"), "--out", str(picture), *words])


@EXAMPLES
@given(words=lines_of(export.ExportArgs, {"--checkpoint", "--out"}))
def test_any_setting_of_export(words, checkpoint, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("any") / "o"
    check_line(capsys, export.main, [checkpoint, str(out), "--layout", "bd3lm", *words])


@EXAMPLES
@given(words=lines_of(paper.PaperArgs, {"--tables", "--out", "--page"}))
def test_any_setting_of_paper(words, tmp_path_factory, capsys):
    out = str(tmp_path_factory.mktemp("any") / "o")
    check_line(capsys, paper.main, ["table9", "--scale", "smoke", "--out", out, *words])
