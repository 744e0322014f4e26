"""Tokenizers: their sources, and that a data set holds exactly their ids."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers as hf

from bd3lm.data import Dataset, Tokenizer, load_tokenizer, prepare, train_tokenizer
from bd3lm.errors import ConfigError, TokenizerError
from bd3lm.hub import PROXIES
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


@pytest.mark.parametrize("kind", ["default", "gpt2", "bert", "more tokens"])
def test_the_library_is_not_loaded_for_special_ids(
    kind: str, tokenizer: Tokenizer, gpt2: Tokenizer, bert: Tokenizer, tmp_path: Path
) -> None:
    text = {"gpt2": gpt2, "bert": bert}.get(kind, tokenizer).json
    library = hf.Tokenizer.from_str(text)
    if kind == "more tokens":
        library.add_tokens(["the", "<a>", "<b>"])
        library.add_special_tokens(["<eos>", "<mask>"])
        text = library.to_str()
    made = Tokenizer(text, kind, {"eos_token": "<eos>"} if kind == "more tokens" else {})
    file = tmp_path / "x.txt"
    file.write_text("the house")
    assert prepare([file], made, tmp_path / "set")[0].num_tokens > 2
    assert "_inner" not in vars(made)
    assert library.id_to_token(made.eos_id) == made.eos_token
    size = library.get_vocab_size()
    mask = library.token_to_id("[MASK]" if kind == "bert" else "<|mask|>")
    assert (made.vocab_size, made.mask_id) == ((size + 1, size) if mask is None else (size, mask))


def test_merges_of_tokens_that_are_not_there_are_refused(tokenizer: Tokenizer) -> None:
    definition = json.loads(tokenizer.json)
    definition["model"]["merges"].append(["no", "such"])
    with pytest.raises(TokenizerError, match="tokenizer x: "):
        Tokenizer(json.dumps(definition), "x")


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


def test_a_mask_token_in_a_text_is_ordinary_characters(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = "so <|mask|> it is, and <|endoftext|>"
    assert tokenizer.mask_id in tokenizer.encode(text)
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": text}))
    prepare([path], tokenizer, tmp_path / "set")
    ids = Dataset(tmp_path / "set").document(0).tolist()
    assert tokenizer.mask_id not in ids
    # The same characters, without the special token between them.
    definition = json.loads(tokenizer.json)
    definition["added_tokens"] = [
        entry for entry in definition["added_tokens"] if entry["id"] != tokenizer.mask_id
    ]
    plain = hf.Tokenizer.from_str(json.dumps(definition))
    assert ids == [*plain.encode(text, add_special_tokens=False).ids, tokenizer.eos_id]
    assert plain.decode(ids[:-2], skip_special_tokens=False) == text.removesuffix("<|endoftext|>")


def test_folders_and_prefixes(shared_data: Path, gpt2: Tokenizer, tmp_path: Path) -> None:
    source = shared_data / "tokenizers"
    shutil.copy(source / "gpt2_vocab.bpe", tmp_path / "merges.txt")
    with pytest.raises(TokenizerError, match=r"its vocab\.json or encoder\.json must be in"):
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
        ("{}/plain.json", "no token that ends a text; one of .* is needed"),
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
    with pytest.raises(ConfigError, match="vocab-size = 257: must be 258"):
        train_tokenizer(texts, 257)
    assert train_tokenizer([], 258).encode("é") != []


def changed(tokenizer: Tokenizer, names: dict[str, str]) -> str:
    """The shipped definition with other names of its special tokens."""
    definition = json.loads(tokenizer.json)
    for entry in definition["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    return json.dumps(definition)


@pytest.mark.parametrize("name", ["<|bos|>", "</s>", "[SEP]", "<s>"])
def test_one_token_for_both_ends(name: str, tokenizer: Tokenizer) -> None:
    made = Tokenizer(changed(tokenizer, {"<|endoftext|>": name}), name)
    assert made.bos_id == made.eos_id == tokenizer.eos_id
    assert made.special == tokenizer.special


@pytest.mark.parametrize("name", ["<|mdm_mask|>", "<mask>", "[MASK]", "<MASK>"])
def test_names_of_the_mask(name: str, tokenizer: Tokenizer) -> None:
    assert Tokenizer(changed(tokenizer, {"<|mask|>": name}), name).special == tokenizer.special


def test_names_in_the_configuration(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = changed(tokenizer, {"<|endoftext|>": "the end", "<|mask|>": "noise"})
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"or a tokenizer_config\.json that names one"):
        load_tokenizer(tmp_path)
    config = {"eos_token": {"content": "the end"}, "bos_token": None, "mask_token": "noise"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(name)
        assert loaded.special == tokenizer.special
    # The names go along with the definition.
    assert Tokenizer(loaded.json, "copy").special == tokenizer.special
    (tmp_path / "a.txt").write_text("some text")
    prepare([tmp_path / "a.txt"], loaded, tmp_path / "set")
    assert Dataset(tmp_path / "set").tokenizer.special == tokenizer.special
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: it must be JSON"):
        load_tokenizer(tmp_path)


def test_holes_among_the_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(changed(tokenizer, {"<|mask|>": "plain"}))
    largest = max(definition["model"]["vocab"].values())
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = {t: largest + 7 if i == largest else i for t, i in vocab.items()}
    made = Tokenizer(json.dumps(definition), "hole")
    assert (made.mask_id, made.vocab_size) == (largest + 8, largest + 9)
    (tmp_path / "a.txt").write_text("some text " + " ".join(TEXTS))
    prepare([tmp_path / "a.txt"], made, tmp_path / "set")
    definition["model"]["vocab"] = {t: 10**9 if i == largest else i for t, i in vocab.items()}
    with pytest.raises(TokenizerError, match="its largest id is 1000000000"):
        Tokenizer(json.dumps(definition), "far")


def test_dropout_is_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(tokenizer.json)
    definition["model"]["dropout"] = 0.5
    made = Tokenizer(json.dumps(definition), "dropout")
    for text in TEXTS:
        assert made.encode(text) == tokenizer.encode(text)
    path = tmp_path / "a.txt"
    path.write_text("the house by the river " * 50)
    prepare([path], made, tmp_path / "set")
    assert Dataset(tmp_path / "set").document(0).tolist()[:-1] == tokenizer.encode(path.read_text())
    assert json.loads((tmp_path / "set" / "tokenizer.json").read_text())["model"]["dropout"] is None


def test_sentencepiece_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(TokenizerError, match="SentencePiece models are not read; convert it"):
            load_tokenizer(name)


def test_the_hub_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def refuse(address: object, **_: object) -> None:
        attempts.append(address)
        raise OSError("[Errno -2] Name or service not known")

    for proxy in PROXIES:
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for _ in range(2):
        with pytest.raises(
            TokenizerError, match=r"nobody/nothing: .*offline, and not in the local"
        ):
            load_tokenizer("nobody/nothing")
        assert len(attempts) == 1


def hostile(tokenizer: Tokenizer) -> dict[str, str]:
    """Definitions on which the library panics, aborts or runs for hours."""

    def with_part(**parts: object) -> str:
        return json.dumps(json.loads(tokenizer.json) | parts)

    def with_model(**parts: object) -> str:
        definition = json.loads(tokenizer.json)
        definition["model"] |= parts
        return json.dumps(definition)

    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    return {
        "charsmap": with_part(normalizer=charsmap),
        "growth": with_part(normalizer={"type": "Sequence", "normalizers": [double] * 60}),
        "prefix": with_model(continuing_subword_prefix="x" * 99),
        "model": with_part(model=None),
        "list": "[]",
        "number": "3",
        "nothing": "",
        "deep": "[" * 100_000,
    }


def test_hostile_definitions_are_refused(tokenizer: Tokenizer) -> None:
    for name, text in hostile(tokenizer).items():
        with pytest.raises(TokenizerError, match=f"tokenizer {name}: ") as raised:
            Tokenizer(text, name)
        assert "\n" not in str(raised.value)


def test_a_split_that_backtracks_is_one_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(tokenizer.json)
    definition["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": r"(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    made = Tokenizer(json.dumps(definition), "slow")
    text = "a" * 40 + "b"
    with pytest.raises(TokenizerError):
        made.encode(text)
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(TokenizerError, match="it cannot encode a text"):
        prepare([tmp_path / "a.txt"], made, tmp_path / "set")
    assert not (tmp_path / "set").exists()
