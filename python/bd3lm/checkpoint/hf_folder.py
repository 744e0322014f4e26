"""Files of a transformers folder besides the weights: tokenizer, Python sources, model card."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers as hf

from bd3lm.config import TrainConfig, check
from bd3lm.data import Tokenizer
from bd3lm.data.tokenizer_files import CHAT_TEMPLATE
from bd3lm.data.tokenizer_json import KEY
from bd3lm.files import write_json, write_text

MASK = "<|mask|>"


def write_tokenizer(folder: Path, definition: str, tokenizer: Tokenizer, length: int) -> None:
    """Write ``tokenizer.json``, which puts BOS before a text, and its configuration.

    That is ``tokenizer_config.json`` and, if there is a chat template, ``chat_template.jinja``.

    Args:
        folder: where they go.
        definition: content of a ``tokenizer.json``.
        tokenizer: the same, loaded.
        length: longest text in tokens.
    """
    inner = hf.Tokenizer.from_str(definition)
    name = {key: inner.id_to_token(getattr(tokenizer, f"{key}_id")) for key in ("bos", "eos")}
    begins = hf.processors.TemplateProcessing(
        single=f"{name['bos']} $A",
        pair=f"{name['bos']} $A $B",
        special_tokens=[(name["bos"], tokenizer.bos_id)],
    )
    parsed = json.loads(definition)
    empty = hf.Tokenizer(hf.models.BPE())
    empty.post_processor = begins
    template = json.loads(empty.to_str())["post_processor"]
    if (parsed.get("post_processor") or {}).get("type") == "ByteLevel":
        # It trims offsets and adds no token.
        processors = [parsed["post_processor"], template]
        template = {"type": "Sequence", "processors": processors}
    parsed["post_processor"] = template
    write_text(folder / "tokenizer.json", json.dumps(parsed, ensure_ascii=False))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name["bos"],
        "eos_token": name["eos"],
        "pad_token": name["eos"],
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    mask = inner.id_to_token(tokenizer.mask_id)
    if mask is not None:
        settings["mask_token"] = mask
    write_json(folder / "tokenizer_config.json", settings)
    if tokenizer.chat_template is not None:
        write_text(folder / CHAT_TEMPLATE, tokenizer.chat_template)


def mask_at(tokenizer: Tokenizer, mask_id: int) -> tuple[str, Tokenizer]:
    """A tokenizer whose mask is the token <|mask|> with the given id; all other ids stay.

    Args:
        tokenizer: its present mask, where it has one with another id, becomes an unused token.
        mask_id: an id that no other token has.

    Returns:
        Content of its ``tokenizer.json``, and the same, loaded.

    Raises:
        ConfigError: another token has the id, or the tokenizer's kind allows no gap before it.
    """
    parsed = json.loads(tokenizer.json)
    inner = hf.Tokenizer.from_str(tokenizer.json)
    own = inner.id_to_token(tokenizer.mask_id)
    taken = inner.id_to_token(mask_id)
    if own is not None and tokenizer.mask_id == mask_id:
        return tokenizer.json, tokenizer
    allowed = f"keep for {tokenizer.name}, whose id {mask_id} is {taken}"
    check(taken is None, "vocab", "engines", allowed)
    entries = parsed.setdefault("added_tokens", [])
    for entry in entries:
        if "mask" in entry.get(KEY, []):
            entry[KEY].remove("mask")
    vocab = parsed["model"].get("vocab")
    if own is not None:
        _rename(parsed, own, f"<|unused_{tokenizer.mask_id}|>")
    if isinstance(vocab, dict):
        vocab[MASK] = mask_id
    entry = {"id": mask_id, "content": MASK, "single_word": False, "lstrip": False}
    entries.append(entry | {"rstrip": False, "normalized": False, "special": True})
    text = json.dumps(parsed, ensure_ascii=False)
    moved = Tokenizer(text, tokenizer.name)
    allowed = f"keep for {tokenizer.name}: the ids of its kind have no gaps"
    check(moved.mask_id == mask_id, "vocab", "engines", allowed)
    return text, moved


def _rename(parsed: dict[str, Any], old: str, new: str) -> None:
    for entry in parsed["added_tokens"]:
        if entry["content"] == old:
            entry["content"] = new
    vocab = parsed["model"].get("vocab")
    if isinstance(vocab, dict) and old in vocab:
        vocab[new] = vocab.pop(old)


def copy_sources(folder: Path, *names: str) -> None:
    """Copy files of :mod:`bd3lm.hf` next to the weights, for ``trust_remote_code=True``."""
    for name in names:
        source = files("bd3lm").joinpath("hf", name).read_text(encoding="utf-8")
        write_text(folder / name, source)


def write_card(folder: Path, config: TrainConfig, auto: str, extra: str) -> None:
    """Write ``README.md``, the model card.

    Args:
        folder: where it goes.
        config: settings of the run.
        auto: Auto class that loads the folder.
        extra: more sentences about the layout.
    """
    shape = config.model
    kind = {"bd3lm": "block diffusion", "mdlm": "masked diffusion", "sedd": "score entropy"}
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {config.system}
- diffusion-language-model
---

# Language model trained by {kind.get(config.system, "autoregression")}

| setting | value |
| --- | --- |
| system | {config.system} |
| tokens of a block | {config.block} |
| tokens of a row | {config.seq_len} |
| width × depth × heads | {shape.width} × {shape.depth} × {shape.heads} |
| training data | {config.data or "the English text shipped with bd3lm"} |

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
```

{extra}
"""
    write_text(folder / "README.md", text)
