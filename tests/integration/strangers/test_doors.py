"""One command with early help, prompts, holes, comparisons; samples that are watched."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bd3lm.cli import compare, evaluate, judge, main, prepare, sample, train
from tests.integration.strangers.common import SHORT, TINY, drawn, refused


def settings_of(out):
    return json.loads((out / "config.json").read_text())


# --- one command, early help ----------------------------------------------------------------------


def test_help_and_refusals_need_no_heavy_import():
    code = """
import sys
from bd3lm.cli.main import COMMANDS, main
lines = [[name, "--help"] for name in COMMANDS] + [["--help"], ["--version"], ["nothing"], [],
    ["train", "--steps", "0"], ["train", "--model.heads", "5"], ["train", "--data", "not there"],
    ["train", "--resume", "--out", "not there"],
    ["sample", "not there"], ["eval", "not there"],
    ["prepare", "x", "--out", "o", "--threads", "0"], ["judge", "not there"],
    ["paper", "table1", "--out", "o", "--seeds", "0"],
    ["compare", "not there"], ["compare", "."], ["export", "not there", "o", "--layout", "hf"]]
for line in lines:
    try:
        main(line)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    assert code == (0 if not line or line[-1].startswith("--") else 2), line
heavy = {"torch", "numpy", "matplotlib", "tokenizers", "datasets", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "command = nothing: must be one of train, prepare, sample" in done.stderr


def test_every_command_has_its_two_names():
    scripts = re.findall(
        r'^(bd3lm\S*) = "bd3lm\.cli\.main:(\w+)"$',
        (Path(__file__).parents[3] / "pyproject.toml").read_text(),
        flags=re.MULTILINE,
    )
    assert len(scripts) == 7
    for name, function in scripts:
        called = getattr(main, function)
        if name != "bd3lm":
            assert called.args == (name.removeprefix("bd3lm-"),)


@pytest.mark.parametrize(
    "words",
    [["tiny", "--steps", "0"], ["--steps", "0", "tiny"], ["--row-eos", "tiny", "--steps=0"]],
)
def test_a_preset_may_stand_anywhere(capsys, words):
    assert "steps = 0: must be" in refused(capsys, train.main, *words)
    assert train._preset_of(words)[0] == "tiny"


def test_a_value_is_no_preset():
    assert train._preset_of(["--steps", "5", "--out", "tiny"])[0] is None
    assert train._preset_of(["--noise.clip", "0.3", "0.8", "small"])[0] == "small"


# --- small doors ----------------------------------------------------------------------------------


def test_a_hole_is_filled_and_the_rest_stays(checkpoint, capsys):
    words = [checkpoint, "--hole", "___", "--hole-tokens", "3", "--json", "--num", "2"]
    records = drawn(capsys, *words, "--prompt", "the ___ stood by ___ river")
    for record in records:
        if record["stop"] == "length":
            assert re.fullmatch(r"the.* stood by.* river", record["text"], flags=re.DOTALL)
    assert any(record["stop"] == "length" for record in records)
    assert "must be a text that holds the hole" in refused(
        capsys, sample.main, *words, "--prompt", "the old"
    )


def test_prompts_come_from_a_file_or_a_pipe(checkpoint, capsys, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("the old\nby the river\n")
    (tmp_path / "p.jsonl").write_text('"the\\nold"\n')
    same = [checkpoint, "--length", "24", "--json", "--num", "2", "--prompts"]
    texts = [record["text"] for record in drawn(capsys, *same, tmp_path / "p.txt")]
    assert [text.startswith("the old") for text in texts] == [True, True, False, False]
    assert all(text.startswith("by the river") for text in texts[2:])
    assert drawn(capsys, *same, tmp_path / "p.jsonl")[0]["text"].startswith("the\nold")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the old\nby the river\n")))
    assert [record["text"] for record in drawn(capsys, *same, "-")] == texts
    assert "must be a file with at least one line" in refused(
        capsys, sample.main, *same, os.devnull
    )


def test_a_forbidden_word_is_not_drawn(checkpoint, capsys, tokenizer):
    words = [checkpoint, "--num", "4", "--json", "--length", "32"]
    seen = [token for record in drawn(capsys, *words) for token in record["ids"]]
    token = next(t for t in seen if re.fullmatch(" [a-z]{3,}", tokenizer.decode([t])))
    word = tokenizer.decode([token]).strip()
    after = drawn(capsys, *words, "--forbidden", word, seen[0])
    assert not {token, seen[0]} & {t for record in after for t in record["ids"]}
    assert "forbidden = 'not one token': must be one token" in refused(
        capsys, sample.main, *words, "--forbidden", "not one token"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prompt", "caf\udce9 old"], "must be valid UTF-8 text"),
        (["--prompt", "the <|mask|> mill"], "'the <|mask|> mill': must be a text without the mask"),
        (["--prompt", "x", "--prompts", "p"], "prompts = p: must be given without --prompt"),
        (["--save-live", "x.mp4"], "save-live = x.mp4: must be a .html or .gif file"),
        (["--fps", "-1"], "fps = -1.0: must be"),
        (["--seed", str(2**64)], f"seed = {2**64}: must be in ["),
        (["--temperature", "nan"], "temperature = nan: must be a finite float32"),
        (["--steps", "2", "--threshold", "0.5"], "steps, threshold = set: must be one at a time"),
    ],
)
def test_sample_refuses_in_words(checkpoint, capsys, words, sentence):
    assert sentence in refused(capsys, sample.main, checkpoint, *words)


def test_eval_finds_what_is_meant(folder, checkpoint, corpus, capsys, tmp_path):
    evaluate.main([checkpoint, "--json"])  # the run's own validation data
    own = json.loads(capsys.readouterr().out)
    evaluate.main([checkpoint, "--json", "--data", str(corpus)])  # a folder with its valid/
    assert json.loads(capsys.readouterr().out) == own
    text = tmp_path / "s.jsonl"
    text.write_text('{"sentence": "the old house stood by the river"}\n')
    evaluate.main([checkpoint, "--json", "--data", str(text), "--text-field", "sentence"])
    assert json.loads(capsys.readouterr().out)["tokens"] > 3
    for words in (["--batch-size", "-3"], ["--batch-size", "0"], ["--repeats", "0"]):
        assert "must be at least 1" in refused(capsys, evaluate.main, checkpoint, *words)


def test_text_goes_with_the_tokenizer_of_the_data(folder, corpus, capsys, tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text('{"sentence": "the old house stood by the river and no one knew"}\n' * 20)
    small = tmp_path / "small"
    prepare.main(
        [str(text), "--text-field", "sentence", "--tokenizer", "train:300", "--out", str(small)]
    )
    data = ["--data", str(small), "--valid", str(text), "--text-field", "sentence"]
    train.main([*data, *TINY, "--out", str(tmp_path / "run")])
    assert "Trained in" in capsys.readouterr().out
    sentence = refused(
        capsys, train.main, "--data", corpus, "--tokenizer", small / "tokenizer.json", *TINY,
        "--out", tmp_path / "other",
    )  # fmt: skip
    assert "must be left out or the tokenizer that" in sentence
    assert "was prepared with" in sentence


def test_shape_and_tokenizer_come_from_init_from(folder, checkpoint, corpus, capsys, tmp_path):
    out = tmp_path / "run"
    train.main(["--init-from", checkpoint, "--data", str(corpus), "--out", str(out), *SHORT])
    model = settings_of(out)["model"]
    assert (model["width"], model["heads"]) == (32, 2)


@pytest.mark.parametrize(
    ("first", "then", "causal"),
    [
        (["demo"], ["joint"], "causal"),
        (["joint"], ["demo"], "causal"),
        (["demo", "--model.token-shift"], ["demo", "--system", "ar"], "block"),
        (["demo", "--model.no-head-bias", "--no-init-unigram"], ["demo"], "block"),
    ],
    ids=["joint", "joint before", "shifted", "no bias"],
)
def test_a_run_of_another_kind_begins_with_a_checkpoint(corpus, tmp_path, first, then, causal):
    """Where the preset asks for another model, the weights decide; a restart is the same line."""
    data = ["--data", str(corpus)]
    train.main([*first, *data, *TINY, "--out", str(tmp_path / "first")])
    words = [*then, *data, *SHORT, "--init-from", str(tmp_path / "first"), "--resume"]
    train.main([*words, "--out", str(tmp_path / "then")])
    found = settings_of(tmp_path / "then")
    assert found["model"]["clean_stream"] == causal
    assert found["model"]["width"] == settings_of(tmp_path / "first")["model"]["width"]
    assert not found["init_unigram"]
    (tmp_path / "first").rename(tmp_path / "gone")
    train.main([*words, "--out", str(tmp_path / "then"), "--steps", "3"])
    assert settings_of(tmp_path / "then") == found | {"steps": 3}


def test_training_reads_standard_input(tmp_path):
    lines = "".join(f"house number {i} by the river\n" for i in range(3000))
    code = "import sys; from bd3lm.cli.train import main; main(sys.argv[1:])"
    words = ["--data", "-", *TINY, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert settings_of(tmp_path / "run")["data"] == "-"


def test_samples_are_judged_from_a_pipe(checkpoint, capsys, monkeypatch, tmp_path):
    records = drawn(capsys, checkpoint, "--json", "--num", "2", "--length", "16")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    judge.main(["-", "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == 2
    for text, sentence in (
        ("[1]\n", "line 1: not a JSON object"),
        ('{"text": "x"}\n', "line 1: no ids, stop"),
        (json.dumps(records[0] | {"ids": ["x"]}) + "\n", "line 1: ids has another type"),
        ("[" * 100_000, "line 1: not a JSON object"),
        ("", "must be a file with at least one sample"),
    ):
        (tmp_path / "s.jsonl").write_text(text)
        assert sentence in refused(capsys, judge.main, tmp_path / "s.jsonl")


def test_runs_are_compared(folder, capsys, tmp_path):
    run_folder, picture = folder / "r [1]", tmp_path / "c.png"
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "metrics.jsonl").write_text('{"step": 1, "loss": 5.5}\n{"step": 2, "lo')
    compare.main([str(run_folder), str(stopped), "--out", str(picture)])
    head, first, second, wrote = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "system", "S", "L"]
    assert first.startswith(str(run_folder))
    assert "5.5" in second.split()
    assert wrote == f"wrote {picture}"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "must be a new file, without --force" in refused(
        capsys, compare.main, run_folder, "--out", picture
    )
    assert "is not a run" in refused(capsys, compare.main, tmp_path, "--out", tmp_path / "x.png")


# --- watching -------------------------------------------------------------------------------------


def test_forwards_are_recorded_and_saved(checkpoint, capsys, tmp_path):
    page = tmp_path / "live.html"
    prompt = "</script> <!--<script> the"
    words = [checkpoint, "--length", "24", "--prompt", prompt, "--save-live", str(page)]
    sample.main([*words, "--json", "--num", "2"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    text = page.read_text(encoding="utf-8")
    assert text.count("<script>") == text.count("</script>") == 1  # the page's own
    assert "<!--" not in text
    assert "http" not in text
    frames = json.loads(re.search(r"const frames = (.*);", text)[1])
    last = [frame for frame in frames if "ended by" in frame["caption"]]
    assert ["".join(piece[0] for piece in frame["pieces"]) for frame in last] == [
        record["text"] for record in records
    ]
    kinds = {piece[1] for frame in frames for piece in frame["pieces"]}
    assert {"given", "masked", "new"} <= kinds
    assert any("p = " in frame["caption"] for frame in frames)


def test_a_recording_is_a_picture_too(checkpoint, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "live.gif"
    sample.main([checkpoint, "--length", "12", "--save-live", str(file)])
    assert image.open(file).n_frames > 4


def test_live_text_is_the_sample(checkpoint, capsys):
    words = [checkpoint, "--length", "24", "--device", "cpu"]
    text = drawn(capsys, *words, "--json")[0]["text"]
    sample.main([*words, "--live"])
    assert capsys.readouterr().out == text + "\n"
