"""Texts of the experiments: tokenized once, identified by a digest of their content."""

from __future__ import annotations

import json
from functools import cache, cached_property
from pathlib import Path

from bd3lm.data import Dataset
from bd3lm.data.resolve import Splits, open_data, open_splits
from bd3lm_paper.scale import TRAINING_ROLES, ZERO_SHOT_ROLES, Corpora
from bd3lm_paper.spec import digest

DETOKENIZERS = {"zero_lm1b": "lm1b", "lambada": "lambada", "wikitext": "wikitext"}
"""Detokenizer of each zero-shot text. Its documents are concatenated without EOS, as the original
implementation does. A prepared directory is used unchanged."""


class Texts:
    """The text behind each role.

    Args:
        corpora: where it is, and the tokenizers.
        work: directory for text that has to be tokenized.
    """

    def __init__(self, corpora: Corpora, work: Path) -> None:
        self.corpora, self.work = corpora, work
        self.splits = cache(self._splits)
        self.held_out = cache(self._held_out)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Digest of the tokenized text of each role; equal on every machine."""
        found = {}
        for role in TRAINING_ROLES:
            splits = self.splits(role)
            found[role] = digest([_content(splits.train), _content(splits.valid)])
        for role in ZERO_SHOT_ROLES:
            data = self.held_out(role)
            found[role] = "none" if data is None else _content(data)
        return found

    def _splits(self, role: str) -> Splits:
        path, tokenizer = self.corpora.paths.get(role), self.corpora.tokenizer(role)
        return open_splits(path, None, tokenizer, self._place(path, tokenizer), lambda _: None)

    def _held_out(self, role: str) -> Dataset | None:
        """Text of a zero-shot role; None if none was given."""
        path = self.corpora.paths.get(role)
        if path is None:
            return None
        tokenizer, detokenizer = self.corpora.tokenizer(role), DETOKENIZERS[role]
        return open_data(
            Path(path),
            tokenizer,
            self._place(path, tokenizer, detokenizer),
            lambda _: None,
            lines=True,  # of a .txt: one of LM1B holds a sentence a line
            detokenizer=detokenizer,
            eos=False,
        )

    def _place(self, path: str | None, *how: str) -> Path:
        """Directory of the tokenized text, one for each text, tokenizer and rule."""
        name = "shipped" if path is None else Path(path.replace(":", "-")).stem
        return self.work / f"{name}-{digest([_stamp(part) for part in (path, *how)])}"


def _stamp(name: str | None) -> list[object]:
    """The name; of a file, also its size and modification time."""
    if name is None or not Path(name).is_file():
        return [name]
    facts = Path(name).stat()
    return [name, facts.st_size, facts.st_mtime_ns]


def _content(data: Dataset) -> str:
    manifest = json.loads((data.path / "manifest.json").read_text(encoding="utf-8"))
    return digest([manifest["tokenizer_sha256"], manifest["files"]])
