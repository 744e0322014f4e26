"""Divergences of samples from held-out text, and the frontier over temperature."""

import json
import math
import random

import numpy as np
import pytest

from bd3lm.cli import judge
from bd3lm.config import SampleConfig
from bd3lm.errors import ConfigError
from bd3lm.evaluate.divergence import jensen_shannon, mauve, ngram_divergence
from bd3lm.evaluate.frontier import frontier
from bd3lm.sample import Sampler
from bd3lm.systems import BlockDiffusion
from tests.conftest import tiny_model
from tests.unit.test_generative import Bigram, sample

WORDS = [a + b for a in "bcdfg" for b in "aeiou"]


def text(seed, count, weights=None):
    generator = random.Random(seed)
    return " ".join(generator.choices(WORDS, weights, k=count))


def test_jensen_shannon_is_its_definition():
    p, q = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.25, 0.25, 0.0, 0.5])
    middle = (p + q) / 2
    want = sum(
        0.5 * x * math.log(x / m)
        for side in (p, q)
        for x, m in zip(side, middle, strict=True)
        if x > 0
    )
    assert jensen_shannon("aabc", "abdd") == pytest.approx(want)
    assert jensen_shannon("abc", "def") == pytest.approx(math.log(2))


def test_text_of_the_same_law_is_at_its_floor_and_other_text_above():
    reference = [text(1, 4000), text(2, 4000)]
    same = ngram_divergence([text(3, 2000)], reference, 2)
    assert same.nats == pytest.approx(same.floor, rel=0.2)
    narrow = ngram_divergence([text(4, 2000, [3.0] * 5 + [1.0] * 20)], reference, 2)
    repeated = ngram_divergence([" ".join(WORDS[:5] * 400)], reference, 2)
    assert same.nats < narrow.nats < repeated.nats < math.log(2)
    assert same.grams == 1999
    assert ngram_divergence([text(5, 5000)], [text(6, 5000)], 1).floor is None
    with pytest.raises(ConfigError, match="0 and 3999 2-grams"):
        ngram_divergence(["one"], [text(1, 4000)], 2)


class Words:
    """A tokenizer of one word an id."""

    def encode(self, text):
        return [WORDS.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(WORDS[i % len(WORDS)] for i in ids)


def test_a_frontier_trades_entropy_for_probability():
    sampler = Sampler(
        tiny_model(), BlockDiffusion(4, 15), window=32, bos_id=0, eos_id=99, tokenizer=Words()
    )
    judge_ = Bigram()
    judge_.encode = lambda text: [WORDS.index(word) % 7 for word in text.split()]
    points = frontier(
        sampler,
        SampleConfig(num=16, length=32, top_p=1.0),
        (0.0, 0.5, 1.0, 2.0),
        evaluator=judge_,
        reference=[text(1, 2000)],
    )
    entropies = [point.entropy for point in points]
    assert entropies == sorted(entropies)
    assert [point.forwards for point in points] == pytest.approx([1.0] * 4)
    assert points[0].divergence[1] > points[3].divergence[1]
    assert {point.gen_ppl is None for point in points} == {False}
    with pytest.raises(ConfigError, match="temperatures"):
        frontier(sampler, SampleConfig(), ())


def test_mauve_is_an_extra():
    if __import__("importlib.util").util.find_spec("mauve"):
        pytest.skip("it is installed here")
    with pytest.raises(ConfigError, match="mauve = True: must be off without its package"):
        mauve(None, ["a"], ["b"])


def test_the_command_compares_with_a_reference(tmp_path, capsys):
    file, reference = tmp_path / "samples.jsonl", tmp_path / "held_out.txt"
    rows = [sample(list(range(20))) | {"text": text(7, 20)} for _ in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference.write_text(text(8, 500))
    judge.main([str(file), "--reference", str(reference), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["divergence_1"] > found["divergence_1_floor"] > 0
    for n in (2, 3):  # so short a text holds hardly a gram twice
        assert math.log(2) + 1e-9 > found[f"divergence_{n}"] > 0.6
    for args, sentence in (
        (["--reference", str(tmp_path / "none")], "no such file"),
        (["--mauve"], "mauve = True: must be off without --reference and --evaluator"),
    ):
        with pytest.raises(SystemExit):
            judge.main([str(file), *args])
        assert sentence in capsys.readouterr().err.replace("\n", " ")
