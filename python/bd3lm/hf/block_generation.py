"""Generation by block diffusion for models of the transformers package.

This file is copied into the folder of exported weights, so it imports nothing but PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class BlockDiffusionOutput:
    """Result of ``generate(..., return_dict_in_generate=True)``.

    Attributes:
        sequences: prompt and new tokens [B, T]; after an end-of-text token there is padding.
        tokens_per_forward: new tokens of a row by forwards of the model.
        forwards: forwards of the model, the one that encodes the prompt included.
    """

    sequences: Tensor
    tokens_per_forward: float
    forwards: int


class BlockDiffusionGeneration:
    """Mixin with ``generate``: block after block through an exact key/value cache.

    A model provides ``config`` (``block_size``, ``mask_token_id``, ``eos_token_id``) and
    ``block_logits(ids, past_key_values, block_size)``.
    """

    config: Any

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        block_size: int | None = None,
        canvas_length: int | None = None,
        max_denoising_steps: int | None = None,
        denoising_steps: int | None = None,
        confidence_threshold: float | None = None,
        order: str = "confidence",
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        return_dict_in_generate: bool = False,
    ) -> Tensor | BlockDiffusionOutput:
        """Continue prompts.

        Blocks lie at absolute positions k·S, so the tail of a prompt shares its block with the
        first new tokens. Each forward reveals the most confident masked positions of a block.

        Args:
            input_ids: prompts of one length [B, P]; None: the beginning-of-text token alone.
            attention_mask: all ones [B, P]; padding is refused.
            max_new_tokens: new tokens; None: up to ``max_length``.
            max_length: tokens in all; None: ``max_position_embeddings``.
            block_size: S; None: that of the configuration.
            canvas_length: another name of ``block_size``.
            max_denoising_steps: most forwards of a block; None: S.
            denoising_steps: another name of ``max_denoising_steps``.
            confidence_threshold: a forward reveals every position whose token is more probable
                than this (before temperature, top-k and top-p), and at least the surest; None: the
                surest alone.
            order: ``confidence``, or ``random``: masked positions in a random order, which with
                one token a forward samples from the model itself.
            do_sample: draw tokens; None: where ``temperature`` or ``order="random"`` is given.
            temperature: of the draws; None: 1.
            top_k: draw from the k most probable tokens; None: from all.
            top_p: nucleus, in (0, 1].
            eos_token_id: ends a row; None: that of the configuration.
            pad_token_id: follows it; None: that of the configuration, else the first EOS.
            generator: source of randomness; None: PyTorch's own.
            streamer: receives finished blocks by ``put``, and unfinished ones by ``put_draft``
                where it has that method.
            return_dict_in_generate: return a :class:`BlockDiffusionOutput`.

        Returns:
            Token ids [B, T], or the output with its counts.

        Raises:
            ValueError: a setting out of range, or prompts with padding.
        """
        cfg = self.config
        size = _one_of("block_size", block_size, "canvas_length", canvas_length) or cfg.block_size
        steps = _one_of(
            "max_denoising_steps", max_denoising_steps, "denoising_steps", denoising_steps
        )
        tokens, prompt = self._canvas(input_ids, attention_mask, max_new_tokens, max_length, size)
        sample = do_sample if do_sample is not None else bool(temperature) or order == "random"
        draw = _Draw(
            temperature=(1.0 if temperature is None else temperature) if sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            threshold=confidence_threshold,
            steps=steps,
            order=order,
            generator=generator,
        )
        ends = _ids(cfg.eos_token_id if eos_token_id is None else eos_token_id)
        pad = cfg.pad_token_id if pad_token_id is None else pad_token_id
        run = _Run(self, tokens, prompt, size, draw, streamer)
        length = run.fill(ends)
        sequences = _ended(tokens[:, :length], prompt, ends, pad)
        if streamer is not None:
            streamer.end()
        if not return_dict_in_generate:
            return sequences
        rate = (length - prompt) / max(run.forwards, 1)
        return BlockDiffusionOutput(sequences, rate, run.forwards)

    def _canvas(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        new: int | None,
        length: int | None,
        size: int,
    ) -> tuple[Tensor, int]:
        """Prompts and masks [B, T], and the prompts' length; T is where generation ends."""
        cfg = self.config
        if size < 1:
            raise ValueError(f"block_size = {size}: must be at least 1")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError(
                "attention_mask has zeros: prompts of a batch must have one length, since padding "
                "would move them across block boundaries"
            )
        if input_ids is None:
            if cfg.bos_token_id is None:
                raise ValueError("input_ids = None: must be given, for there is no bos_token_id")
            input_ids = torch.tensor([[cfg.bos_token_id]], device=self.device)  # type: ignore[attr-defined]
        longest = cfg.max_position_embeddings
        total = input_ids.shape[1] + new if new is not None else (length or longest)
        if not input_ids.shape[1] < total <= longest:
            raise ValueError(
                f"max_length = {total}: must be greater than the prompt's {input_ids.shape[1]} "
                f"tokens and at most max_position_embeddings = {longest}"
            )
        canvas = input_ids.new_full((len(input_ids), total), cfg.mask_token_id)
        canvas[:, : input_ids.shape[1]] = input_ids
        return canvas, input_ids.shape[1]


@dataclass
class _Draw:
    """Rule for the positions that a forward reveals, and for their tokens."""

    temperature: float
    top_k: int | None
    top_p: float
    threshold: float | None
    steps: int | None
    order: str
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if self.order not in ("confidence", "random"):
            raise ValueError(f"order = {self.order}: must be confidence or random")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"max_denoising_steps = {self.steps}: must be at least 1")

    def reveal(self, block: Tensor, logits: Tensor, mask_id: int, step: int) -> Tensor:
        """Replace some masks of a block [B, S] given its logits [B, S, V]."""
        masked = block == mask_id
        logits = logits.float()
        logits[..., mask_id] = -torch.inf
        token, confidence = self._tokens(logits)
        if self.order == "random":
            device = block.device
            confidence = torch.rand(block.shape, generator=self.generator, device=device)
        confidence = confidence.masked_fill(~masked, -torch.inf)
        chosen = torch.zeros_like(masked)
        if self.threshold is not None:
            chosen = confidence > self.threshold
        left = masked.sum(1)
        least = torch.ones_like(left)
        if self.steps is not None:
            remaining = max(self.steps - step, 1)
            least = (left + remaining - 1) // remaining
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = (chosen | (rank < least[:, None])) & masked
        return torch.where(chosen, token, block)

    def _tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token for every position, and its probability in the model itself."""
        own = logits.softmax(-1)
        if self.temperature == 0:
            confidence, token = own.max(-1)
            return token, confidence
        logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, index = logits.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = (before >= self.top_p).scatter(-1, index, before >= self.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        p = logits.softmax(-1)
        flat = torch.multinomial(p.flatten(0, -2), 1, generator=self.generator)
        token = flat.view(p.shape[:-1])
        return token, own.gather(-1, token[..., None])[..., 0]


class _Run:
    """Blocks filled one after the other.

    The first forward of a block also commits the keys and values of the block before it.
    """

    def __init__(
        self, model: Any, tokens: Tensor, prompt: int, size: int, draw: _Draw, streamer: Any
    ) -> None:
        self.model, self.tokens, self.prompt = model, tokens, prompt
        self.size, self.draw, self.streamer = size, draw, streamer
        self.mask_id = model.config.mask_token_id
        self.forwards = 0
        self.cache = model.new_cache()
        self.committed = 0

    def fill(self, ends: list[int]) -> int:
        """Fill blocks until every row has ended; returns the length reached."""
        total = self.tokens.shape[1]
        self._put(self.tokens[:, : self.prompt])
        first = self.prompt // self.size * self.size
        ended = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        for start in range(first, total, self.size):
            self._fill_block(start)
            stop, fresh = min(start + self.size, total), max(start, self.prompt)
            new = self.tokens[:, fresh:stop]
            self._put(new)
            for end in ends:
                ended |= (new == end).any(1)
            if bool(ended.all()):
                return stop
        return total

    def _fill_block(self, start: int) -> None:
        # Positions behind the last requested one are masks of the block, and are dropped.
        rows = self.tokens.new_full((len(self.tokens), self.size), self.mask_id)
        known = self.tokens[:, start : start + self.size]
        rows[:, : known.shape[1]] = known
        step = 0
        while bool((rows == self.mask_id).any()):
            waiting = self.tokens[:, self.committed : start]
            ids = torch.cat([waiting, rows], 1)
            logits = self.model.block_logits(ids, self.cache, self.size)[:, waiting.shape[1] :]
            self.forwards += 1
            self.cache.crop(-self.size)  # the block itself is not final yet
            self.committed = start
            rows = self.draw.reveal(rows, logits, self.mask_id, step)
            step += 1
            self.tokens[:, start : start + self.size] = rows[:, : known.shape[1]]
            if self.streamer is not None and hasattr(self.streamer, "put_draft"):
                self.streamer.put_draft(rows[:, : known.shape[1]][0].cpu())

    def _put(self, ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(ids.cpu())


def _one_of(first: str, a: int | None, second: str, b: int | None) -> int | None:
    """The value of a setting with two names."""
    if a is not None and b is not None and a != b:
        raise ValueError(f"{first} = {a} and {second} = {b}: must be given under one name")
    return a if a is not None else b


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _ended(tokens: Tensor, prompt: int, ends: list[int], pad: int | None) -> Tensor:
    """Rows with padding after their first end-of-text token behind the prompt."""
    if not ends:
        return tokens
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    is_end[:, :prompt] = False
    after = is_end.cumsum(1) - is_end.long() > 0
    return tokens.masked_fill(after, ends[0] if pad is None else pad)
