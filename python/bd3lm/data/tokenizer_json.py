"""Content of a ``tokenizer.json``: usual names of special tokens, and changes of the definition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# The first of these that a tokenizer has, where its configuration names none.
BOS_NAMES = (
    "<|startoftext|>",
    "<|begin_of_text|>",
    "<|bos|>",
    "<bos>",
    "[BOS]",
    "<s>",
    "[CLS]",
    "<｜begin▁of▁sentence｜>",
    "<|endoftext|>",
)
EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eos|>",
    "<eos>",
    "[EOS]",
    "</s>",
    "[SEP]",
    "<｜end▁of▁sentence｜>",
)
MASK_NAMES = ("[MASK]", "<|mask|>", "<mask>", "<|MASK|>", "<|mdm_mask|>", "<MASK>", "<mask_token>")

ROLES: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "bos": (("bos_token", "cls_token"), BOS_NAMES),
    "eos": (("eos_token", "sep_token"), EOS_NAMES),
    "mask": (("mask_token",), MASK_NAMES),
}
"""Keys of ``tokenizer_config.json`` and usual names of each special token."""

KEY = "roles"
"""Key of an added token under which a definition keeps roles that a configuration file gave it."""

CHAT = "chat_template"
"""Key of the EOS token under which a definition keeps the chat template."""


def has_field(text: str, name: str, value: str) -> bool:
    r"""Return whether a definition may have a field, whose value begins so.

    A vocabulary may hold the same word as a token with its id. Parsing a large definition takes
    half a second.

    >>> [has_field(text, "roles", r"\[") for text in ('{"roles": 7}', '{"roles": ["mask"]}')]
    [False, True]
    """
    return re.search(rf'"{name}"\s*:\s*{value}', text) is not None


def own_roles(text: str) -> Mapping[str, int]:
    """The roles that a definition's added tokens have of their own."""
    if not has_field(text, KEY, r"\["):
        return {}
    added = json.loads(text).get("added_tokens") or []
    return {role: entry["id"] for entry in added for role in entry.get(KEY, []) if role in ROLES}


def with_roles(text: str, roles: Mapping[str, int], contents: Mapping[int, str]) -> str:
    """Put the roles of tokens into a definition."""
    for i, content in contents.items():
        own = {role for role, j in own_roles(text).items() if j == i}
        named = {role for role, j in roles.items() if j == i}
        text = with_added(text, i, content, {KEY: sorted(own | named)})
    return text


def with_added(text: str, i: int, content: str, values: Mapping[str, Any]) -> str:
    """Put values into the entry of an added token, which is made where there is none."""
    definition = json.loads(text)
    added = definition.setdefault("added_tokens", [])
    entry = next((entry for entry in added if entry["id"] == i), None)
    if entry is None:
        rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entry = {"id": i, "content": content, **rules}
        added.append(entry)
    entry |= {"special": True, **values}
    added.sort(key=lambda entry: entry["id"])
    return _dump(definition)


def without_dropout(text: str) -> str:
    """Switch off the dropout of a BPE."""
    if not has_field(text, "dropout", r"-?(\d*\.|\d+[eE]|[01]\b)"):
        return text
    definition = json.loads(text)
    model: dict[str, Any] = definition["model"]
    if model.get("dropout") is None:
        return text
    model["dropout"] = None
    return _dump(definition)


def _dump(definition: object) -> str:
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":"))


def renamed(definition: dict[str, Any], old: str, new: str) -> str:
    """A ``tokenizer.json`` in which an added token has another name and the same id."""
    for entry in definition["added_tokens"]:
        if entry["content"] == old:
            entry.update(content=new, special=True)
    vocab = definition["model"].get("vocab")
    if isinstance(vocab, dict) and old in vocab:
        vocab[new] = vocab.pop(old)
    elif isinstance(vocab, list):
        definition["model"]["vocab"] = [[new if t == old else t, p] for t, p in vocab]
    return json.dumps(definition, ensure_ascii=False)
