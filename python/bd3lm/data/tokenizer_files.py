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
CHAT_TEMPLATE = "chat_template.jinja"
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
        chat_template: in Jinja; None where the place has none.
    """

    text: str
    name: str
    special: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


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
        return _in_place(path, name, path.with_name)
    return _on_hub(name)


def _in_folder(path: Path) -> Definition:
    for inside in INSIDE:
        if (path / inside).is_file():
            return _in_place(path / inside, str(path / inside), lambda file: path / file)
    models = sorted(path.glob("*.model"))
    if models:
        raise TokenizerError(_sentencepiece(models[0]))
    raise TokenizerError(f"tokenizer {path}: the folder holds no {', '.join(INSIDE[:-1])}")


def _in_place(definition: Path, name: str, place: Callable[[str], Path]) -> Definition:
    """A definition and the files of its configuration, which are in the same place."""
    text, found = _read(definition), {config: _json(place(config)) for config in CONFIGS}
    names: dict[str, str] = {}
    for values in reversed(found.values()):  # the first has the last word
        names |= _names(values)
    file = place(CHAT_TEMPLATE)
    if file.is_file():
        return Definition(text, name, names, read_template(file))
    return Definition(text, name, names, _default_template(found[CONFIGS[0]]))


def read_template(file: Path) -> str:
    """Read a chat template.

    Raises:
        TokenizerError: the file is not there, or no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it must be UTF-8"
        raise TokenizerError(f"chat template {file}: {reason}") from None


def _default_template(values: Any) -> str | None:
    """The template of ``tokenizer_config.json``: its only one, or the one named default."""
    templates = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(templates, list):
        named = [t for t in templates if isinstance(t, dict) and t.get("name") == "default"]
        templates = named[0].get("template") if named else None
    return templates if isinstance(templates, str) else None


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise TokenizerError(f"tokenizer {path}: it must be JSON ({error})") from None


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
        found = {file: hub.download(name, file) for file in (*CONFIGS, CHAT_TEMPLATE)}
    except hub.HubError as error:
        raise TokenizerError(
            f"tokenizer {name}: no such file, and the Hugging Face hub does not give it ({error})"
        ) from None
    nowhere = Path(name) / "nowhere"
    return _in_place(definition, name, lambda file: found[file] or nowhere)
