"""Prompts as token ids, and the checks of a request before the first forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bd3lm.config import SampleConfig, check
from bd3lm.data import Tokenizer
from bd3lm.model import Transformer
from bd3lm.systems import System

Prompt = str | Sequence[int | str | None]
"""Text after BOS, or a sequence of token ids, texts and holes (None). Holes are filled, and so is
everything after the last token."""


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, mask_id: int) -> list[int | None]:
    """Token ids of a prompt; None where a token is to be filled in.

    Raises:
        ConfigError: a text without a tokenizer, or one that holds the mask token.
    """
    ids: list[int | None] = []
    for part in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(part, str):
            ids.append(part)
        elif part:
            added = _needed(tokenizer, "prompt", part).encode(part)
            check(
                mask_id not in added,
                "prompt",
                repr(part),
                "a text without the mask token; a token to be filled in is a hole",
            )
            ids += added
    return ids


def forbidden_ids(entries: Iterable[int | str], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Ids of forbidden tokens; a word is its token and its token with a space before it.

    Raises:
        ConfigError: a word without a tokenizer, or one of several tokens.
    """
    ids: set[int] = set()
    for entry in entries:
        if not isinstance(entry, str):
            ids.add(entry)
            continue
        known = _needed(tokenizer, "forbidden", entry)
        encoded = [known.encode(text) for text in (entry, f" {entry}")]
        single = {found[0] for found in encoded if len(found) == 1}
        check(bool(single), "forbidden", repr(entry), f"one token; it has {len(encoded[0])}")
        ids |= single
    return tuple(sorted(ids))


def _needed(tokenizer: Tokenizer | None, field: str, text: str) -> Tokenizer:
    has = tokenizer is not None
    check(has, field, repr(text), "token ids, for this sampler has no tokenizer")
    assert tokenizer is not None
    return tokenizer


def check_settings(cfg: SampleConfig, model: Transformer, system: System, window: int) -> None:
    """Check sampling settings against the model.

    Args:
        cfg: with ``forbidden`` as ids.
        model: draws the tokens.
        system: of the model.
        window: L, positions of a training row.

    Raises:
        ConfigError: a setting that the model or the system does not have.
    """
    length = cfg.length or window
    check(
        system.block_size < window or length <= window,
        "length",
        length,
        f"at most {window} where one block is the whole row",
    )
    if cfg.speculate:
        _check_speculation(model, system)
    for token in cfg.forbidden:
        assert isinstance(token, int)  # resolved
        _check_id("forbidden", token, model.vocab_size, system.mask_id)
    check(
        not (system.unnormalized_scores and (cfg.adaptive or cfg.tokens_per_forward > 1)),
        "threshold, entropy-bound, tokens-per-forward",
        "set",
        f"left out for {system.name}, whose scores are no probabilities; use steps",
    )


def _check_speculation(model: Transformer, system: System) -> None:
    shape = model.cfg
    check(
        shape.causal_clean and system.prediction_offset == 0,
        "speculate",
        True,
        "False unless the model has a causal clean stream, as preset joint has, and is "
        "sampled as bd3lm",
    )
    check(not shape.time_conditioning, "speculate", True, "False with time conditioning")
    check(not shape.token_shift, "speculate", True, "False with model.token-shift")


def check_prompts(
    cfg: SampleConfig,
    prompts: Sequence[Sequence[int | None]],
    vocab_size: int,
    mask_id: int,
    length: int,
) -> None:
    """Check that every prompt holds tokens and leaves room for one more.

    Raises:
        ConfigError: names the prompt's length or the token.
    """
    check(len(prompts) >= 1, "prompts", len(prompts), "at least 1")
    if cfg.speculate:
        whole = not any(token is None for prompt in prompts for token in prompt)
        check(whole, "prompt", "a text with holes", "without holes with speculate")
    for prompt in prompts:
        check(
            len(prompt) + 2 <= length or (len(prompt) < length and None in prompt),
            "prompt",
            f"{len(prompt)} tokens",
            f"at most length - 2 = {length - 2} tokens, to leave room for one more",
        )
        for token in prompt:
            if token is not None:
                _check_id("prompt", token, vocab_size, mask_id)


def _check_id(field: str, token: int, vocab_size: int, mask_id: int) -> None:
    allowed = f"ids in [0, {vocab_size}) other than the mask token {mask_id}"
    check(0 <= token < vocab_size and token != mask_id, field, token, allowed)
