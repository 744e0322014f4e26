"""The texts of the experiments: prepared once, told apart by their content."""

from __future__ import annotations

import json
from functools import cache, cached_property
from pathlib import Path

from bd3lm.data import Dataset
from bd3lm.data.resolve import Splits, open_data, open_splits
from bd3lm.experiments.scale import TRAINING_ROLES, ZERO_SHOT_ROLES, Corpora
from bd3lm.experiments.spec import digest

DETOKENIZERS = {"zero_lm1b": "lm1b", "lambada": "lambada", "wikitext": "wikitext"}
"""Zero-shot texts are put back as they were written, and run together without EOS, as the paper's
code does; a directory that ``bd3lm-prepare`` made is taken as it is."""


class Texts:
    """The text behind each role.

    Args:
        corpora: where it is; the training roles fall back to the shipped text.
        tokenizer: of all of them: ``default``, a file, a folder or a hub name.
        work: directory for what has to be tokenized.
    """

    def __init__(self, corpora: Corpora, tokenizer: str, work: Path) -> None:
        self.corpora, self.tokenizer, self.work = corpora, tokenizer, work
        self.splits = cache(self._splits)
        self.held_out = cache(self._held_out)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """What each role's text is, by content: the same on every machine."""
        found = {}
        for role in TRAINING_ROLES:
            splits = self.splits(role)
            found[role] = digest([_content(splits.train), _content(splits.valid)])
        for role in ZERO_SHOT_ROLES:
            data = self.held_out(role)
            found[role] = "none" if data is None else _content(data)
        return found

    def _splits(self, role: str) -> Splits:
        path = self.corpora.paths.get(role)
        name = role if path is not None else "shipped"
        return open_splits(path, None, self.tokenizer, self.work / name, lambda _: None)

    def _held_out(self, role: str) -> Dataset | None:
        """The whole text of a zero-shot role; None where none was given."""
        path = self.corpora.paths.get(role)
        if path is None:
            return None
        return open_data(
            Path(path),
            self.tokenizer,
            self.work / role,
            lambda _: None,
            lines=True,  # of a .txt: one of LM1B holds a sentence a line
            detokenizer=DETOKENIZERS[role],
            eos=False,
        )


def _content(data: Dataset) -> str:
    manifest = json.loads((data.path / "manifest.json").read_text(encoding="utf-8"))
    return digest([manifest["tokenizer_sha256"], manifest["files"]])
