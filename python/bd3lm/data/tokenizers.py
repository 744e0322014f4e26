"""Tokenizers: the shipped one, files, folders and hub names, with the special ids made explicit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, takewhile
from pathlib import Path
from typing import Protocol

import tokenizers as hf

from bd3lm import _core
from bd3lm.data.tokenizer_files import find_definition, read_template
from bd3lm.data.tokenizer_json import (
    CHAT,
    EOS_NAMES,
    MASK_NAMES,
    ROLES,
    has_field,
    own_roles,
    renamed,
    with_added,
    with_roles,
    without_dropout,
)
from bd3lm.errors import ConfigError, TokenizerError

TRAIN_BYTES = 1 << 30
"""Text from which a tokenizer is trained: more hardly changes its merges, and costs memory."""


class SpecialIds(Protocol):
    """The special ids of a vocabulary, as a manifest or a tokenizer holds them."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def bos_id(self) -> int:
        """First token of every row."""
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

    BOS, EOS and the mask are the tokens that the tokenizer's configuration names, else those under
    the usual names. One token serves as both BOS and EOS where there is no other. Without a mask
    token, the mask is an id of its own after the largest (GPT-2: 50257, so that V = 50258). Ids
    below V that the tokenizer does not use are allowed.

    Padding, truncation and BPE-dropout are off.

    Args:
        text: content of a ``tokenizer.json``.
        name: for messages.
        special: names of special tokens by their key in ``tokenizer_config.json`` (``bos_token``,
            ``eos_token``, ``cls_token``, ``sep_token``, ``mask_token``).
        chat_template: in Jinja (:class:`bd3lm.data.ChatTemplate`). None: the definition's own, if
            it holds one.

    Raises:
        TokenizerError: a definition that does not load, or without any token to end a text.
    """

    def __init__(
        self,
        text: str,
        name: str,
        special: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.name = name
        names = [*chain(*(usual for _, usual in ROLES.values())), *(special or {}).values()]
        try:
            largest, tokens = _core.vet_tokenizer(text, names)
        except TokenizerError as error:
            raise TokenizerError(str(error).replace("definition", name, 1)) from None
        self._set(without_dropout(text))
        if tokens is None:
            with errors_of_library(name):
                tokens = self._inner.get_vocab_size(), list(map(self._inner.token_to_id, names))
        size, found = tokens
        self._ids = {token: i for token, i in zip(names, found, strict=True) if i is not None}
        ids = self._roles(special or {})
        size = max(size, (largest or 0) + 1)
        bos, eos, mask = (ids.get(role) for role in ROLES)
        if bos is None and eos is None:
            raise TokenizerError(
                f"tokenizer {name}: it has no token that ends a text; one of "
                f"{', '.join(EOS_NAMES)} is needed, or a tokenizer_config.json that names one"
            )
        self.eos_id = _either(eos, bos)
        self.bos_id = _either(bos, eos)
        self.mask_id = size if mask is None else mask
        self.vocab_size = max(size, self.mask_id + 1)
        if self.mask_id in (self.bos_id, self.eos_id):
            raise TokenizerError(f"tokenizer {name}: its mask token is also its BOS or EOS token")
        if chat_template is not None and chat_template != self.chat_template:
            self._set(with_added(self.json, self.eos_id, self.eos_token, {CHAT: chat_template}))

    def _set(self, text: str) -> None:
        self.json = text
        for read in ("_inner", "chat_template"):
            self.__dict__.pop(read, None)

    @cached_property
    def _inner(self) -> hf.Tokenizer:
        """The library's tokenizer. Large ones take a second to load, which preparing data saves."""
        with errors_of_library(self.name):
            inner = hf.Tokenizer.from_str(self.json)
            inner.no_padding()
            inner.no_truncation()
        return inner

    def _roles(self, special: Mapping[str, str]) -> Mapping[str, int]:
        """The ids of the special tokens, by role: the definition's own, named, or usual."""
        own = own_roles(self.json)
        usual = {role: self._find(names) for role, (_, names) in ROLES.items()}
        given = {
            role: self._find([special[key] for key in keys if key in special])
            for role, (keys, _) in ROLES.items()
        }
        named = {role: i for role, i in given.items() if i is not None and role not in own}
        if any(usual[role] != i for role, i in named.items()):
            # The definition is then complete by itself, in a data set or a checkpoint.
            contents = {i: token for token, i in self._ids.items() if i in named.values()}
            self._set(with_roles(self.json, named, contents))
        found = {role: i for role, i in usual.items() if i is not None}
        return {**found, **named, **own}

    def _find(self, names: Sequence[str]) -> int | None:
        """The id of the first of these tokens that there is."""
        return next((self._ids[name] for name in names if name in self._ids), None)

    @cached_property
    def sha256(self) -> str:
        """Digest of the definition."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def chat_template(self) -> str | None:
        """The chat template in Jinja; None where there is none."""
        if not has_field(self.json, CHAT, '"'):
            return None
        added = json.loads(self.json).get("added_tokens") or []
        return next((entry[CHAT] for entry in added if CHAT in entry), None)

    def with_chat_template(self, template: Path | str) -> Tokenizer:
        """A copy with another chat template.

        Args:
            template: a ``Path`` is a file; a ``str`` is the template itself.

        Raises:
            TokenizerError: the file cannot be read.
        """
        text = read_template(template) if isinstance(template, Path) else template
        return Tokenizer(self.json, self.name, chat_template=text)

    @property
    def bos_token(self) -> str:
        """BOS as text."""
        return self._inner.id_to_token(self.bos_id) or ""

    @property
    def eos_token(self) -> str:
        """EOS as text."""
        return self._inner.id_to_token(self.eos_id) or ""

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
        own = self._roles({}).get("mask")
        if own is not None:
            mine = self._inner.id_to_token(own)
            raise ConfigError("mask-token", token, f"left out: {self.name} has {mine}")
        if token not in added:
            raise ConfigError("mask-token", token, f"an added token of {self.name}")
        if added[token]["id"] in (self.bos_id, self.eos_id):
            raise ConfigError("mask-token", token, "a token other than those of a text's ends")
        return Tokenizer(renamed(definition, token, MASK_NAMES[1]), f"{self.name} ({token})")

    @property
    def special(self) -> tuple[int, int, int, int]:
        """``(vocab_size, bos_id, eos_id, mask_id)``."""
        return self.vocab_size, self.bos_id, self.eos_id, self.mask_id

    def encode(self, text: str) -> list[int]:
        """Encode a text, without special tokens around it.

        A text that spells out the mask token has the mask id there, which lets a prompt hold
        places to fill; :func:`bd3lm.data.prepare` encodes it as ordinary characters.

        Raises:
            TokenizerError: a text that is not UTF-8, or that the model cannot encode.
        """
        with errors_of_library(self.name):
            if not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise TokenizerError("the text must be UTF-8: it holds other bytes") from None
            return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special tokens are left out."""
        known = [i for i in ids if i not in (self.bos_id, self.eos_id, self.mask_id)]
        with errors_of_library(self.name):
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


def _either(one: int | None, other: int | None) -> int:
    found = one if one is not None else other
    assert found is not None
    return found


@contextmanager
def errors_of_library(name: str) -> Iterator[None]:
    """Raise exceptions and panics of the ``tokenizers`` library as one kind of error."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # A panic of Rust is no Exception; other exceptions of that sort pass.
        panic = type(error).__name__ == "PanicException"
        if not panic and not isinstance(error, Exception):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TokenizerError(f"tokenizer {name}: {reason[0]}") from None


def load_tokenizer(name: Path | str, mask_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: ``default`` (byte-level BPE made for the shipped corpus); a ``tokenizer.json``; a
            BERT ``vocab.txt``; a GPT-2 ``merges.txt`` or ``vocab.bpe`` and its ``vocab.json`` or
            ``encoder.json`` in the same folder; a folder that holds one of these; or a name on
            the Hugging Face hub. A ``tokenizer_config.json`` or ``special_tokens_map.json`` in
            the same place names its special tokens; a ``chat_template.jinja`` there, or else the
            former, has its chat template.
        mask_token: an added token that serves as the mask (:meth:`Tokenizer.with_mask`). None:
            the tokenizer's own mask, else a new id after the last.

    Raises:
        TokenizerError: nothing of that name, or it does not load.
        ConfigError: ``mask_token`` cannot be the mask.
    """
    found = find_definition(str(name))
    tokenizer = Tokenizer(found.text, found.name, found.special, found.chat_template)
    return tokenizer if mask_token is None else tokenizer.with_mask(mask_token)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, max_bytes: int = TRAIN_BYTES
) -> Tokenizer:
    """Train a byte-level BPE: lossless on any text, with ``<|endoftext|>`` and ``<|mask|>``.

    Args:
        texts: to learn the merges from.
        vocab_size: V, special tokens included; at least 258.
        max_bytes: of the texts, from the first on; the rest is not read.

    Raises:
        ConfigError: a vocabulary that cannot hold all bytes.
    """
    if not 258 <= vocab_size <= 1 << 24:
        allowed = "258 (all bytes and two special ids) to 16,777,216"
        raise ConfigError("vocab-size", vocab_size, allowed)
    inner = hf.Tokenizer(hf.models.BPE())
    inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|mask|>"],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    _train(inner, _batched(texts, max_bytes), trainer)
    return Tokenizer(inner.to_str(), "trained")


def _train(inner: hf.Tokenizer, batches: Iterator[list[str]], trainer: hf.trainers.Trainer) -> None:
    """Train on a thread of its own, because the library does not look for signals.

    Ctrl-C leaves that thread behind; it does not keep the process alive.
    """
    stopped, fed = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def feed() -> Iterator[list[str]]:
        try:
            yield from takewhile(lambda _: not stopped.is_set(), batches)
        finally:
            fed.set()

    def run() -> None:
        try:
            inner.train_from_iterator(feed(), trainer)
        except BaseException as error:  # a panic of the library is no Exception
            raised.append(error)
        finally:
            fed.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        stopped.set()
        fed.wait(1.0)  # from then on the thread does not need the interpreter, which may end
        raise
    if raised:
        raise raised[0]


def _batched(texts: Iterable[str], max_bytes: int) -> Iterator[list[str]]:
    batch: list[str] = []
    batch_bytes = total = 0
    for text in texts:
        batch.append(text)
        batch_bytes += len(text)
        total += len(text)
        if len(batch) == 256 or batch_bytes > 1 << 20:
            yield batch
            batch, batch_bytes = [], 0
        if total >= max_bytes:
            break
    yield batch
