"""Tokenizers: the shipped one, files, folders and hub names, with the special ids made explicit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import tokenizers as hf

from bd3lm import hub
from bd3lm.errors import ConfigError, TokenizerError

BOS_NAMES = ("<|endoftext|>", "[CLS]", "<|begin_of_text|>", "<|bos|>", "<bos>", "<s>")
EOS_NAMES = ("<|endoftext|>", "[SEP]", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>")
MASK_NAMES = ("[MASK]", "<|mask|>", "<mask>", "<|MASK|>")


class SpecialIds(Protocol):
    """The special ids of a vocabulary, as a manifest or a tokenizer holds them."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def bos_id(self) -> int:
        """Stands at position 0."""
        ...

    @property
    def eos_id(self) -> int:
        """Ends a document."""
        ...

    @property
    def mask_id(self) -> int:
        """The noise."""
        ...


class Tokenizer:
    """A Hugging Face tokenizer and the ids a diffusion model needs.

    BOS and EOS are looked up under the usual names. The mask token is the tokenizer's own where
    it has one, else an id of its own after the last (GPT-2: 50257, so that V = 50258).

    Args:
        text: content of a ``tokenizer.json``.
        name: for messages.

    Raises:
        TokenizerError: a definition that does not load, or that has no end-of-text token.
    """

    def __init__(self, text: str, name: str) -> None:
        try:
            self._inner = hf.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"tokenizer {name}: {error}") from error
        self._inner.no_padding()
        self._inner.no_truncation()
        self.name, self.json = name, text
        size = 1 + max(self.ids().values(), default=-1)
        self.eos_id = self._find(EOS_NAMES, "end-of-text")
        self.bos_id = self._find(BOS_NAMES, "beginning-of-text")
        named = [i for i in map(self._inner.token_to_id, MASK_NAMES) if i is not None]
        self.mask_id = named[0] if named else size
        self.vocab_size = max(size, self.mask_id + 1)

    def _find(self, names: Sequence[str], what: str) -> int:
        for name in names:
            found = self._inner.token_to_id(name)
            if found is not None:
                return found
        raise TokenizerError(
            f"tokenizer {self.name}: no {what} token; one of {', '.join(names)} is needed"
        )

    @cached_property
    def sha256(self) -> str:
        """Digest of the definition."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    def ids(self) -> dict[str, int]:
        """Ids by token."""
        return self._inner.get_vocab(with_added_tokens=True)

    def with_mask(self, token: str) -> Tokenizer:
        """A copy in which an added token that no text uses is the mask, under the name <|mask|>.

        Args:
            token: its present name, e.g. ``<|reserved_special_token_0|>``.

        Raises:
            ConfigError: the tokenizer has a mask of its own, or no such added token, or it begins
                or ends a text.
        """
        definition = json.loads(self.json)
        added = {entry["content"]: entry for entry in definition.get("added_tokens") or []}
        own = [name for name in MASK_NAMES if self._inner.token_to_id(name) is not None]
        if own:
            raise ConfigError("mask-token", token, f"left out: {self.name} has {own[0]}")
        if token not in added:
            raise ConfigError("mask-token", token, f"an added token of {self.name}")
        if added[token]["id"] in (self.bos_id, self.eos_id):
            raise ConfigError("mask-token", token, "a token other than those of a text's ends")
        return Tokenizer(_renamed(definition, token, MASK_NAMES[1]), f"{self.name} ({token})")

    @property
    def special(self) -> tuple[int, int, int, int]:
        """``(vocab_size, bos_id, eos_id, mask_id)``."""
        return self.vocab_size, self.bos_id, self.eos_id, self.mask_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens around it."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        known = [i for i in ids if i not in (self.bos_id, self.eos_id, self.mask_id)]
        return self._inner.decode(known, skip_special_tokens=True)

    def check_matches(self, other: SpecialIds, source: object) -> None:
        """Check that a vocabulary has the same special ids.

        Raises:
            TokenizerError: the first that differs.
        """
        for field in ("vocab_size", "bos_id", "eos_id", "mask_id"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise TokenizerError(
                    f"tokenizer {self.name}: its {field} is {mine}, that of {source} is {theirs}"
                )


def _renamed(definition: dict[str, Any], old: str, new: str) -> str:
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


def load_tokenizer(name: Path | str, mask_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: ``default`` (byte-level BPE made for the shipped corpus); a ``tokenizer.json``; a
            BERT ``vocab.txt``; a GPT-2 ``merges.txt`` or ``vocab.bpe`` with its ``vocab.json``
            or ``encoder.json`` beside it; a folder that holds one of these; or a name on the
            Hugging Face hub.
        mask_token: an added token that serves as the mask (:meth:`Tokenizer.with_mask`). None:
            the tokenizer's own mask, else a new id after the last.

    Raises:
        TokenizerError: nothing of that name, or it does not load.
        ConfigError: ``mask_token`` cannot be the mask.
    """
    if mask_token is not None:
        return load_tokenizer(name).with_mask(mask_token)
    if name == "default":
        asset = files("bd3lm") / "assets" / "tokenizer.json"
        return Tokenizer(asset.read_text(encoding="utf-8"), "default")
    path = Path(name)
    if path.is_dir():
        for inside in ("tokenizer.json", "vocab.txt", "merges.txt", "vocab.bpe"):
            if (path / inside).is_file():
                return load_tokenizer(path / inside)
        raise TokenizerError(f"tokenizer {name}: the folder holds no tokenizer.json or vocab.txt")
    if path.is_file():
        return Tokenizer(_definition(path), str(name))
    return Tokenizer(_from_hub(str(name)), str(name))


def _definition(path: Path) -> str:
    """A ``tokenizer.json``, made from an older kind of file where necessary."""
    try:
        if path.suffix == ".txt" and not path.name.endswith("merges.txt"):
            bert = hf.BertWordPieceTokenizer(str(path), lowercase=True)
            return bert.to_str()
        if path.name.endswith(("merges.txt", "vocab.bpe")):
            return _byte_level(path)
        return path.read_text(encoding="utf-8")
    except TokenizerError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"tokenizer {path}: {error}") from error


def _byte_level(merges: Path) -> str:
    """GPT-2's pair of files, whatever prefix their names share."""
    for old, new in (("merges.txt", "vocab.json"), ("vocab.bpe", "encoder.json")):
        vocab = merges.with_name(merges.name.removesuffix(old) + new)
        if merges.name.endswith(old) and vocab.is_file():
            pairs = [
                (left, right)
                for line in merges.read_text(encoding="utf-8").splitlines()
                if line and not line.startswith("#version")
                for left, right in [line.split(" ")]
            ]
            ids = json.loads(vocab.read_text(encoding="utf-8"))
            made = hf.ByteLevelBPETokenizer(ids, pairs)
            end = "<|endoftext|>"
            if end in ids:
                made.add_special_tokens([end])
            return made.to_str()
    raise TokenizerError(f"tokenizer {merges}: its vocab.json or encoder.json is not beside it")


def _from_hub(name: str) -> str:
    if name.startswith((".", "/", "~")) or name.endswith((".json", ".txt", ".bpe")):
        raise TokenizerError(f"tokenizer {name}: no such file or directory")
    hub.connect()
    try:
        return hf.Tokenizer.from_pretrained(name).to_str()
    except Exception as error:  # network, name and format errors alike
        raise TokenizerError(
            f"tokenizer {name}: no such file, and the Hugging Face hub does not give it "
            f"({hub.reason(error)})"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Make a byte-level BPE: lossless on any text, with ``<|endoftext|>`` and ``<|mask|>``.

    Args:
        texts: what to learn the merges from.
        vocab_size: V, special tokens included; at least 258.

    Raises:
        ConfigError: a vocabulary that cannot hold all bytes.
    """
    if vocab_size < 258:
        raise ConfigError("vocab-size", vocab_size, "at least 258: all bytes and two special ids")
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|mask|>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_batched(texts), trainer)
    return Tokenizer(inner.to_str(), "trained")


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 256:
            yield batch
            batch = []
    yield batch
