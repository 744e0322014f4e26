"""Generative perplexity against sums written out, and the command that reports it."""

import itertools
import json
import math

import pytest
import torch

from bd3lm.cli import judge
from bd3lm.errors import ConfigError
from bd3lm.evaluate.generative import WINDOW, CausalLM, generative_perplexity, text_nats

V = 7


class Bigram:
    """p(next | previous) from a table: windows cannot change it."""

    name, eos_id = "bigram", 3

    def __init__(self):
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))

    def encode(self, text):
        return [int(c) for c in text]

    def logits(self, ids):
        return self.table[ids]


class Depth(Bigram):
    """Model that reveals its length of context: the logit of token 0 grows with the position."""

    def logits(self, ids):
        out = torch.zeros(*ids.shape, V)
        out[..., 0] = torch.arange(ids.shape[1]) / 100
        return out


def digits(num, seed):
    ids = torch.randint(0, V, (num,), generator=torch.Generator().manual_seed(seed))
    return "".join(map(str, ids.tolist()))


@pytest.mark.parametrize("num", [2, 5, WINDOW, WINDOW + 1, 1500, 3000])
def test_every_token_but_the_first_and_eos_is_scored_once(num):
    model, text = Bigram(), digits(num, num)
    log_p = model.table.double().log_softmax(-1)
    ids = model.encode(text)
    wanted = [-log_p[a, b].item() for a, b in itertools.pairwise(ids) if b != 3]
    found = text_nats(model, ids)
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def test_later_windows_bring_at_least_512_tokens_of_context():
    ids = [0] * 2500
    p = text_nats(Depth(), ids).neg().exp()
    given = 100 * (torch.log(p * (V - 1)) - torch.log1p(-p))  # position in its window
    context = (given.round() + 1).int()
    assert context[:1023].tolist() == list(range(1, 1024))
    assert context[1023:].min() >= 512
    assert context.max() <= 1023


def test_the_two_averages():
    model = Bigram()
    texts = [digits(40, 1), digits(400, 2), "5"]
    result = generative_perplexity(model, texts)
    parts = [text_nats(model, model.encode(t)) for t in texts[:2]]
    assert result.texts == 2
    assert result.tokens == sum(map(len, parts))
    assert result.gen_ppl == pytest.approx(math.exp(torch.cat(parts).mean().item()))
    assert result.gen_ppl_rows == pytest.approx(sum(math.exp(p.mean().item()) for p in parts) / 2)
    with pytest.raises(ConfigError, match="one has two tokens or more"):
        generative_perplexity(model, ["1", ""])


def test_an_evaluator_that_cannot_load_says_what_is_allowed(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="the extra `eval` is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "nothing"), str(tmp_path / "none.gguf")):
        with pytest.raises(ConfigError, match=r"evaluator = .*: must be a "):
            CausalLM(name, torch.device("cpu"))


def sample(ids, stop="length", nfe=3):
    text = " ".join(f"w{i}" for i in ids)
    return {"text": text, "ids": ids, "stop": stop, "nfe": nfe, "nfe_paper": nfe - 1, "seconds": 1}


def test_the_command_reports_lengths_stops_and_cost(tmp_path, capsys):
    file = tmp_path / "samples.jsonl"
    rows = [sample([1, 1, 2, 2]), sample([1, 2], "eos", 1), sample([4] * 10, "degenerate", 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge.main([str(file), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["length_median"] == 4
    assert found["length_max"] == 10
    assert found["stops"] == {"length": 1, "eos": 1, "degenerate": 1}
    assert (found["nfe"], found["nfe_paper"]) == (3, 2)
    assert found["entropy"] == pytest.approx(2 * math.log(2) / 3)
    judge.main([str(file)])
    assert "entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "no such file"), ("", "at least one sample"), ("{", "line 1"), ("{}", "no text, ids")],
)
def test_the_command_refuses(tmp_path, capsys, content, sentence):
    file = tmp_path / "samples.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        judge.main([str(file)])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
