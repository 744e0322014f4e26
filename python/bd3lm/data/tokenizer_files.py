"""Finds the definition of a tokenizer: in a file, a folder, or on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers as hf

from bd3lm import hub
from bd3lm.errors import TokenizerError

INSIDE = ("tokenizer.json", "vocab.txt", "merges.txt", "vocab.bpe")
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
SPECIAL = ("bos_token", "eos_token", "cls_token", "sep_token", "mask_token")

CONVERT = (
    'convert it once: python -c "from transformers import AutoTokenizer; '
    "AutoTokenizer.from_pretrained('FOLDER').save_pretrained('NEW')\", and give NEW"
)


@dataclass(frozen=True)
class Definition:
    """A tokenizer as it was found.

    Attributes:
        text: a ``tokenizer.json``.
        name: for messages.
        special: names of special tokens by their key in ``tokenizer_config.json``.
    """

    text: str
    name: str
    special: Mapping[str, str] = field(default_factory=dict)


def find_definition(name: str) -> Definition:
    """Find a tokenizer; see :func:`bd3lm.data.load_tokenizer`.

    Raises:
        TokenizerError: nothing of that name, or of a kind that is not read.
    """
    if name == "default":
        asset = files("bd3lm") / "assets" / "tokenizer.json"
        return Definition(asset.read_text(encoding="utf-8"), name)
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return Definition(_read(path), name, _special(lambda file: path.with_name(file)))
    return _on_hub(name)


def _in_folder(path: Path) -> Definition:
    for inside in INSIDE:
        if (path / inside).is_file():
            return Definition(
                _read(path / inside), str(path / inside), _special(lambda file: path / file)
            )
    models = sorted(path.glob("*.model"))
    if models:
        raise TokenizerError(_sentencepiece(models[0]))
    raise TokenizerError(f"tokenizer {path}: the folder holds no {', '.join(INSIDE[:-1])}")


def _special(place: Callable[[str], Path]) -> Mapping[str, str]:
    """The special tokens that configuration files in the same place name."""
    names: dict[str, str] = {}
    for config in reversed(CONFIGS):  # the first has the last word
        path = place(config)
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise TokenizerError(f"tokenizer {path}: it must be JSON ({error})") from None
        names |= _names(values)
    return names


def _names(values: Any) -> dict[str, str]:
    """The names of special tokens, which are strings or objects."""
    names: dict[str, str] = {}
    for key in SPECIAL:
        token = values.get(key) if isinstance(values, dict) else None
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content:
            names[key] = content
    return names


def _read(path: Path) -> str:
    """A ``tokenizer.json``, made from an older kind of file where necessary."""
    if path.suffix == ".model":
        raise TokenizerError(_sentencepiece(path))
    try:
        if path.suffix == ".txt" and not path.name.endswith("merges.txt"):
            return hf.BertWordPieceTokenizer(str(path), lowercase=True).to_str()
        if path.name.endswith(("merges.txt", "vocab.bpe")):
            return _byte_level(path)
        return path.read_text(encoding="utf-8")
    except TokenizerError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"tokenizer {path}: {error}") from error


def _sentencepiece(path: Path) -> str:
    return f"tokenizer {path}: SentencePiece models are not read; {CONVERT}"


def _byte_level(merges: Path) -> str:
    """A definition from GPT-2's two files; a prefix of their names is the same."""
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
    raise TokenizerError(
        f"tokenizer {merges}: its vocab.json or encoder.json must be in the same folder"
    )


def _on_hub(name: str) -> Definition:
    if name.startswith((".", "/", "~")) or name.endswith((".json", ".txt", ".bpe", ".model")):
        raise TokenizerError(f"tokenizer {name}: no such file or directory")
    try:
        definition = hub.download(name, "tokenizer.json")
        if definition is None:
            if hub.download(name, "tokenizer.model") is not None:
                raise TokenizerError(_sentencepiece(Path(name) / "tokenizer.model"))
            raise TokenizerError(f"tokenizer {name}: its repository holds no tokenizer.json")
        found = {config: hub.download(name, config) for config in CONFIGS}
    except hub.HubError as error:
        raise TokenizerError(
            f"tokenizer {name}: no such file, and the Hugging Face hub does not give it ({error})"
        ) from None
    nowhere = Path(name) / "nowhere"
    special = _special(lambda file: found[file] or nowhere)
    return Definition(_read(definition), name, special)
