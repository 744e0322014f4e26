"""The boards' evaluator: what it counts, and what its verdicts follow from."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import EvalConfig, ModelConfig, ObjectiveConfig, TrainConfig
from bd3lm.data import Dataset, prepare
from bd3lm.model import Transformer

sys.path.insert(0, str(Path(__file__).parents[2] / "benches" / "python"))
import board_rules
import boards

TEXTS = ["Der Fluß fließt am Haus vorbei.", "naïve café — 😀", "The old house stood by the river."]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("boards")
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS)
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    prepare([folder / "text.jsonl"], tokenizer, folder / "set")
    return Dataset(folder / "set")


def loaded(tokenizer, block_size):
    """A model whose every prediction is uniform."""
    cfg = TrainConfig(
        seq_len=16,
        block_size=block_size,
        model=ModelConfig(width=8, depth=1, heads=1, tied_embeddings=True),
        eval=EvalConfig(repeats=2),
    )
    model = Transformer(cfg.model, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return Checkpoint(cfg, model, tokenizer, 1, Path("nowhere"))


def entry(score, **changes):
    cfg = TrainConfig(block_size=16, steps=2, batch_size=4, shuffle=False)
    values = {
        "config": cfg,
        "device": "a processor",
        "parameters": 1000,
        "vocab_size": 50_258,
        "train_rows": 8,
        "train_seconds": 1.0,
        "score": score,
        "artifact": {"weights": 16_000_000},
    }
    return board_rules.Entry(**values | changes)


def verdicts(rules):
    return [rule.verdict for rule in rules]


@pytest.mark.parametrize("block_size", [4, 8])
def test_bits_a_byte_of_the_raw_text(data, tokenizer, block_size):
    """A uniform prediction costs ln(V − 1) nats: all ids but the mask."""
    score = board_rules.score_text(loaded(tokenizer, block_size), data)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert size > sum(map(len, TEXTS))  # bytes are not characters
    count = board_rules.Count(len(TEXTS), tokens, raw_bytes=size, decoded_bytes=size)
    assert (score.count, score.scored_tokens, score.complete) == (count, tokens, True)
    bits = tokens * math.log2(tokenizer.vocab_size - 1)
    assert score.bits_per_byte == pytest.approx(bits / size, rel=1e-5)
    exact = block_size == 4
    assert score.estimator == ("exact" if exact else "stratified")
    assert score.mc_error == 0 or not exact
    assert (score.marginal_bits_per_byte is None) != exact
    lost = dataclasses.replace(score, count=dataclasses.replace(count, decoded_bytes=size - 1))
    assert not lost.complete


def test_every_rule_can_be_broken(data, tokenizer):
    score = board_rules.score_text(loaded(tokenizer, 4), data)
    fineweb = {"data": "hub:x/fineweb-edu@train", "valid": "hub:x/fineweb-edu@valid"}
    good = entry(score)
    assert verdicts(board_rules.nano_rules(good)) == ["kept"] * 5 + ["not comparable"] * 3
    cfg = dataclasses.replace(good.config, **fineweb)
    assert verdicts(board_rules.nano_rules(entry(score, config=cfg))[5:]) == [
        "kept",
        "broken",
        "kept",
    ]
    for index, changes in enumerate(
        (
            {"parameters": 162_000_001},
            {"config": dataclasses.replace(cfg, block_size=8)},
            {
                "config": dataclasses.replace(
                    cfg,
                    model=dataclasses.replace(cfg.model, clean_stream="causal"),
                    objective=ObjectiveConfig(ar_weight=1.0),
                )
            },
            {"config": dataclasses.replace(cfg, shuffle=True)},
            {"train_rows": 7},
        )
    ):
        assert board_rules.nano_rules(entry(score, **changes))[index].verdict == "broken"
    golf = verdicts(board_rules.golf_rules(good))
    assert golf == [
        "kept",
        "not comparable",
        "not comparable",
        "kept",
        "not comparable",
        "not comparable",
    ]
    large = entry(score, artifact={"weights": 16_000_000, "scripts": 1}, device="NVIDIA H100 80GB")
    late = dataclasses.replace(large, train_seconds=601.0)
    assert verdicts(board_rules.golf_rules(late))[:3] == ["broken", "broken", "kept"]


def test_packed_weights_are_within_half_a_step():
    torch.manual_seed(0)
    cfg = ModelConfig(width=16, depth=1, heads=1, tied_embeddings=True)
    model, copy = Transformer(cfg, 50), Transformer(cfg, 50)
    artifact = boards.pack(model)
    boards.unpack(artifact, copy)
    assert len(artifact) < 2 * sum(p.numel() for p in model.parameters())
    for mine, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        if mine.ndim == 2:
            step = mine.abs().amax(1, keepdim=True) / 127
            assert ((mine - theirs).abs() <= 0.55 * step + 1e-7).all()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("board", boards.BOARDS)
def test_the_full_entries_are_within_the_limits(board):
    cfg = boards.BOARDS[board][0]("full")
    with torch.device("meta"):
        model = Transformer(cfg.model, 50_258 if board == "nano" else 16_384)
    parameters = sum(p.numel() for p in model.parameters())
    if board == "nano":
        assert parameters <= board_rules.NANO_PARAMETERS
        assert cfg.steps * cfg.batch_size * cfg.seq_len < board_rules.NANO_RECORD_TOKENS
        assert (cfg.block, cfg.shuffle) == (16, False)
    else:  # a byte a weight, before zlib
        assert parameters + sum(boards.code_bytes().values()) < board_rules.GOLF_BYTES
