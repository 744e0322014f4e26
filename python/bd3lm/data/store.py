"""Prepared data sets: token files in the Megatron layout, with a manifest beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3lm import _core
from bd3lm.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory says of itself.

    Attributes:
        tokenizer_sha256: digest of the tokenizer's JSON.
        vocab_size: number of ids, the mask id included.
        bos_id: stands at position 0 of every row.
        eos_id: ends every document.
        mask_id: the noise; never in a text.
        num_documents: documents, empty ones left out.
        num_tokens: tokens, the EOS of every document included.
        num_bytes: UTF-8 bytes of the text.
        dtype: ``uint16`` or ``int32``.
        source: names of what was read.
    """

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

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """From the content of ``manifest.json``, which Rust has checked."""
        values = json.loads(text)
        return cls(**{f.name: values[f.name] for f in fields(cls)})


class Dataset:
    """Documents of token ids, memory-mapped.

    Args:
        path: a directory made by :func:`bd3lm.data.prepare`.
        verify: also check digests and the range of every id; sizes are always checked.

    Raises:
        MissingFileError: no such directory.
        NotADatasetError: a directory that holds something else.
        TruncatedError: a file that is not as long as the manifest says.
        CorruptError: a file whose content is not what was written.
    """

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.core = _core.TokenStore.open(str(path), verify)
        self.manifest = Manifest.from_json(self.core.manifest or "{}")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made it."""
        tokenizer = load_tokenizer(self.path / "tokenizer.json")
        tokenizer.check_matches(self.manifest, self.path)
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
        """How often each id occurs, [V]."""
        return self.core.token_counts()

    def document(self, index: int) -> NDArray[np.int64]:
        """Ids of one document, its EOS included.

        Raises:
            ConfigError: there is no such document.
        """
        return self.core.document(index)


class TokenArrays:
    """Documents of token ids in memory, where a :class:`Dataset` would be used.

    Args:
        documents: ids of each document; an EOS is not added.
        vocab_size: number of ids, the mask id included.
        bos_id: stands at position 0 of every row.
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
        self.core = _core.TokenStore.from_arrays(
            ids, lengths, (vocab_size, bos_id, eos_id, mask_id)
        )

    def token_counts(self) -> NDArray[np.uint64]:
        """How often each id occurs, [V]."""
        return self.core.token_counts()
