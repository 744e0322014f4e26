"""Prepared data sets: token files in the Megatron layout, and their manifest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bd3lm import _core
from bd3lm.data.remote import CACHE_SIZE, open_remote
from bd3lm.data.remote_tokens import RemoteTokens
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer
from bd3lm.storage import is_url


@dataclass(frozen=True)
class Records:
    """Counts of the records of a data set's sources, by outcome.

    Attributes:
        read: records in all.
        filtered: left out by ``where``.
        empty: left out: an empty text.
        null: left out: a null text.
        bad: left out: could not be read.
        first_bad: the first of these, and why.
        repaired: kept, with U+FFFD in place of half a surrogate pair.
        long: kept, but tokenized in parts of up to 64 MiB.
    """

    read: int = 0
    filtered: int = 0
    empty: int = 0
    null: int = 0
    bad: int = 0
    first_bad: str | None = None
    repaired: int = 0
    long: int = 0


@dataclass(frozen=True)
class Manifest:
    """Description of a prepared directory.

    Attributes:
        sha256: digest of the manifest, which holds the digests of all files: it names the data.
        tokenizer_sha256: digest of the tokenizer's JSON.
        vocab_size: number of ids, the mask id included.
        bos_id: first token of every row.
        eos_id: ends every document.
        mask_id: the noise; never in a text.
        num_documents: documents, empty ones left out.
        num_tokens: tokens, the EOS of every document included.
        num_prompt_tokens: tokens of them that are prompts: clean, and never scored.
        num_bytes: UTF-8 bytes of the text without the prompts; nothing in the set can contradict
            it.
        dtype: ``uint16`` or ``int32``.
        source: names of the files that were read.
        records: counts of their records, those of both sides of a split together; None in data
            sets made before they were counted.
    """

    sha256: str
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    mask_id: int
    num_documents: int
    num_tokens: int
    num_bytes: int
    dtype: str
    source: list[str]
    records: Records | None = None
    num_prompt_tokens: int = 0

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the content of a ``manifest.json``, which Rust has checked."""
        values = json.loads(text)
        if values.get("records") is not None:
            values["records"] = Records(**values["records"])
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


class Dataset:
    """Documents of token ids, memory-mapped, or in object storage.

    The tokens of a data set at a URL are read in pieces of 16 KiB when they are needed, through a
    local cache that ends with the process. Each piece is compared with its digest.

    Args:
        path: a directory made by :func:`bd3lm.data.prepare`, or its URL, such as
            ``s3://bucket/text/train``.
        verify: compare the files with their digests, and every id with the vocabulary: ``auto``
            once, until a file changes by size, times or inode; True always; False never. Sizes and
            structure are always checked. That a data set of 64 MiB or more was verified is
            remembered in ``.verified.json`` among its files, or in the user's cache. Files at a URL
            are always verified.
        cache_size: bytes of the cache for a URL, such as ``10GB``.

    Attributes:
        path: the directory; for a URL, that of local copies of all files but the tokens.
        place: the directory or URL as it was given.
        remote: reads the tokens at a URL; None for a directory.

    Raises:
        MissingFileError: no such directory.
        NotADatasetError: a directory that holds something else.
        TruncatedError: a file that is not as long as the manifest says.
        CorruptError: a file whose content is not the one that was written.
        StorageError: the storage behind a URL refuses to give a file.
        ConfigError: a cache that is too small.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: bool | Literal["auto"] = "auto",
        cache_size: int | str = CACHE_SIZE,
    ) -> None:
        self.place = str(path)
        self.remote: RemoteTokens | None = None
        if is_url(path):
            self.path, self.core, self.remote = open_remote(self.place, cache_size)
        else:
            self.path = Path(path)
            self.core = _core.TokenStore.open(str(path), None if verify == "auto" else verify)
        self.manifest = Manifest.from_json(self.core.manifest or "{}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids."""
        tokenizer = load_tokenizer(self.path / "tokenizer.json")
        tokenizer.check_matches(self.manifest, self.place)
        return tokenizer

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self.core.num_documents

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the EOS of every document included."""
        return self.core.num_tokens

    def token_counts(self) -> NDArray[np.uint64]:
        """Count the occurrences of each id, [V]."""
        return self.core.token_counts()

    def document(self, index: int) -> NDArray[np.int64]:
        """Get the ids of one document, its EOS included.

        Raises:
            ConfigError: there is no such document.
        """
        return self.core.document(index)


class TokenArrays:
    """Documents of token ids in memory; takes the place of a :class:`Dataset`.

    Args:
        documents: ids of each document; an EOS is not added.
        vocab_size: number of ids, the mask id included.
        bos_id: first token of every row.
        eos_id: ends documents.
        mask_id: the noise.

    Raises:
        TokenOutOfRangeError: an id outside ``[0, vocab_size)``.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        bos_id: int,
        eos_id: int,
        mask_id: int,
    ) -> None:
        lengths = np.array([len(d) for d in documents], dtype=np.uint64)
        ids = np.concatenate([np.asarray(d, dtype=np.int32) for d in documents])
        self.remote = None
        self.core = _core.TokenStore.from_arrays(
            ids, lengths, (vocab_size, bos_id, eos_id, mask_id)
        )

    def token_counts(self) -> NDArray[np.uint64]:
        """Count the occurrences of each id, [V]."""
        return self.core.token_counts()
