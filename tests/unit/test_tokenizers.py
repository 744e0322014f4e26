"""Tokenizers: what they are made from, and that a data set holds exactly what they say."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from bd3lm.data import Dataset, Tokenizer, load_tokenizer, prepare, train_tokenizer
from bd3lm.errors import ConfigError, TokenizerError
from tests.conftest import TEXTS

ODD = [
    *TEXTS,
    "",
    "\x00\x01\x7f\x80\u0085",
    "\ufeff\u2028\u2029\ufffd",
    "a\u0301\u0323\u1ea1",
    "\U0010ffff\ue000",
    "العربية עברית हिन्दी ไทย",
    "'s 't 're don't  'LL\t\t\n \n\r\n ",
    "ﬁ ﬂ ① Ⅳ ½ ² ſ İ ı ß",
    "x" * 300 + " " * 300 + "!" * 300,
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.fixture(scope="session")
def gpt2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "gpt2_vocab.bpe")


@pytest.fixture(scope="session")
def bert(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "bert_base_uncased_vocab.txt")


def long_texts() -> list[str]:
    """Documents that are cut into pieces, with places where a careless cut would show."""
    draw = random.Random(0)
    words = [
        "the",
        "it's",
        "naïve",
        "日本",
        "x1",
        "2b",
        "👩‍👩‍👧",
        "e\u0301",
        "I'll",
        "[i]",
        "...",
        "\n\n",
    ]
    gaps = [" ", " ", " ", "  ", "\u00a0", "\n", " \t", ""]
    mixed = "".join(draw.choice(words) + draw.choice(gaps) for _ in range(60_000))
    code = "".join(f"    if x[{i}] == {i * i}:\n        return f(x, {i})\n" for i in range(6000))
    return [mixed, code, "中文字符。" * 20_000, "a" * 80_000 + " b c " + "d e " * 20_000]


def test_default_is_lossless(tokenizer: Tokenizer) -> None:
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_default_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id == tokenizer.bos_id != tokenizer.mask_id
    assert max(tokenizer.eos_id, tokenizer.mask_id) < tokenizer.vocab_size
    special = {tokenizer.eos_id, tokenizer.mask_id}
    for text in ODD:
        assert not special & set(tokenizer.encode(text)), "no text makes them by accident"
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("ab"), tokenizer.mask_id]) == "ab"


def test_gpt2(gpt2: Tokenizer) -> None:
    assert gpt2.special == (50_258, 50_256, 50_256, 50_257)
    assert gpt2.encode("Hello, world! It's 2024.") == [
        *(15496, 11, 995, 0),
        *(632, 338, 48609, 13),
    ]
    assert gpt2.encode("<|endoftext|>") == [50_256]
    for text in ODD:
        assert gpt2.decode(gpt2.encode(text)) == text


def test_bert(bert: Tokenizer) -> None:
    assert bert.special == (30_522, 101, 102, 103)
    assert bert.encode("Hello, world! Unaffable naïve 中文") == [
        *(7592, 1010, 2088, 999, 14477, 20961, 3468, 15743),
        *(1746, 1861),
    ]
    assert bert.decode(bert.encode("Hello, World!")) == "hello, world!"


@pytest.mark.parametrize("name", ["tokenizer", "gpt2", "bert"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_data_set_holds_what_the_tokenizer_says(
    name: str, threads: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    used: Tokenizer = request.getfixturevalue(name)
    texts = [text for text in ODD + long_texts() if text]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([path], used, tmp_path / "set", threads=threads)
    data = Dataset(tmp_path / "set")
    assert data.num_documents == len(texts)
    for i, text in enumerate(texts):
        ids = data.document(i).tolist()
        assert ids == [*used.encode(text), used.eos_id], f"text {i}: {text[:40]!r}"


def test_an_added_token_with_a_space_is_never_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(tokenizer.json)
    entry = definition["added_tokens"][0] | {"id": tokenizer.vocab_size, "content": "x y"}
    definition["added_tokens"].append(entry)
    spaced = Tokenizer(json.dumps(definition), "spaced")
    text = "x y" * 40_000
    assert len(spaced.encode(text)) == 40_000
    (tmp_path / "text.txt").write_text(text)
    (manifest,) = prepare([tmp_path / "text.txt"], spaced, tmp_path / "set")
    assert manifest.num_tokens == 40_001


def test_texts_may_not_hold_the_mask_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("so <|mask|> it is")
    assert tokenizer.mask_id in tokenizer.encode("so <|mask|> it is")
    with pytest.raises(TokenizerError, match="document 1 spells out the mask token"):
        prepare([tmp_path / "text.txt"], tokenizer, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_folders_and_prefixes(shared_data: Path, gpt2: Tokenizer, tmp_path: Path) -> None:
    source = shared_data / "tokenizers"
    shutil.copy(source / "gpt2_vocab.bpe", tmp_path / "merges.txt")
    with pytest.raises(TokenizerError, match=r"its vocab\.json or encoder\.json is not beside it"):
        load_tokenizer(tmp_path)
    shutil.copy(source / "gpt2_encoder.json", tmp_path / "vocab.json")
    assert load_tokenizer(tmp_path).encode("a b") == gpt2.encode("a b")
    (tmp_path / "tokenizer.json").write_text(gpt2.json)
    assert load_tokenizer(tmp_path).sha256 == gpt2.sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"tokenizer \./nowhere: no such file or directory"),
        ("nowhere.json", r"tokenizer nowhere\.json: no such file"),
        ("{}", "the folder holds no tokenizer"),
        ("{}/tokenizer.json", r"tokenizer .*tokenizer\.json: "),
        ("{}/plain.json", "no end-of-text token; one of .* is needed"),
    ],
)
def test_bad_names(name: str, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    if name.endswith("tokenizer.json"):
        (tmp_path / "tokenizer.json").write_text("{")
    if name.endswith("plain.json"):
        definition = json.loads(tokenizer.json)
        for entry in definition["added_tokens"]:
            entry["content"] = "plain" + entry["content"]
        vocab = definition["model"]["vocab"]
        definition["model"]["vocab"] = {
            ("plain" + token if token.startswith("<|") else token): i for token, i in vocab.items()
        }
        (tmp_path / "plain.json").write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(name.format(tmp_path))


def test_training_is_deterministic_and_lossless() -> None:
    texts = ["the cat and the dog and the house " * 3, "def f(x): return x"] * 20
    texts.append(" ".join(f"number{i * i}" for i in range(500)))
    first, second = (train_tokenizer(iter(texts), 300) for _ in range(2))
    assert first.json == second.json
    assert first.vocab_size == 300
    assert (first.eos_id, first.mask_id) == (0, 1)
    for text in ODD:
        assert first.decode(first.encode(text)) == text
    words = first.encode(texts[0])
    assert len(words) < len(texts[0]) / 2, "it has learnt to join"
    with pytest.raises(ConfigError, match="vocab-size = 257: must be at least 258"):
        train_tokenizer(texts, 257)
    assert train_tokenizer([], 258).encode("é") != []
