"""Sampling block by block through an exact key/value cache (docs/math.md §8), for every system."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import SampleConfig, check
from bd3lm.data import Tokenizer
from bd3lm.model import DecodeStep, KVCache, Transformer, for_inference
from bd3lm.model.threads import adaptive_waiting
from bd3lm.sample.block import BlockDraw
from bd3lm.sample.events import BlockEvent, Sample
from bd3lm.sample.prompts import (
    Prompt,
    check_prompts,
    check_settings,
    encode_prompt,
    forbidden_ids,
)
from bd3lm.sample.speculative import Acceptance, Speculation, SpeculativeRow
from bd3lm.sample.state import RowState, SampleState, window_start
from bd3lm.sample.stopping import DEGENERATE_WINDOW, is_degenerate
from bd3lm.sample.strategies import Strategy, choose
from bd3lm.systems import System


class Sampler:
    """Draws rows from a model of any system.

    A block starts masked, except for prompt tokens. First hitting, the default, reveals one masked
    position a forward. The first forward of a block also commits the keys and values of the block
    before it, so a row of n tokens takes n forwards.

    The cache is exact: it holds the keys and values that a full forward would compute, because the
    clean stream is block-causal and its positions do not move. When a row outgrows ``window``
    positions, its last half is encoded again behind a BOS, just as training rows begin in the
    middle of documents. Later tokens are exact for that shorter context. A window begins at
    positions that depend on the block alone, so a row is the same in any batch and at any length
    limit.

    Args:
        model: in evaluation mode.
        system: of the model; its block size may differ from the trained one.
        window: L, positions of a training row.
        bos_id: token of position 0.
        eos_id: token that ends a row.
        tokenizer: encodes prompts given as text and decodes samples; None: ids only.
        replay: record forwards as CUDA graphs and replay them
            (:class:`bd3lm.model.DecodeStep`); None: on CUDA. A token-shifted model is not replayed.

    Raises:
        ConfigError: a block size that does not divide ``window``.
    """

    def __init__(
        self,
        model: Transformer,
        system: System,
        *,
        window: int,
        bos_id: int,
        eos_id: int,
        tokenizer: Tokenizer | None = None,
        replay: bool | None = None,
    ) -> None:
        size = system.block_size
        check(window % size == 0, "block-size", size, f"a divisor of the trained length {window}")
        self.model, self.system, self.block_size, self.window = model, system, size, window
        self.mask_id, self.bos_id, self.eos_id = system.mask_id, bos_id, eos_id
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        wanted = self.device.type == "cuda" if replay is None else replay
        self.replay = wanted and not system.shifts(model)
        self.acceptance: Acceptance | None = None

    @classmethod
    def from_checkpoint(
        cls,
        loaded: Checkpoint,
        block_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Sampler:
        """Build the sampler of a trained model.

        Args:
            loaded: the checkpoint; its model is copied.
            block_size: S; None: the trained one.
            dtype: of the matrices on a CPU, see :func:`bd3lm.model.for_inference`.

        Raises:
            ConfigError: a block size that does not divide the trained length, or that the
                system cannot have; a dtype that the processor does not multiply.
        """
        return cls(
            for_inference(loaded.model, dtype),
            loaded.system(block_size),
            window=loaded.config.seq_len,
            bos_id=loaded.tokenizer.bos_id,
            eos_id=loaded.tokenizer.eos_id,
            tokenizer=loaded.tokenizer,
        )

    def generate(
        self,
        cfg: SampleConfig,
        prompts: Sequence[Prompt] = ("",),
        progress: Callable[[int], None] | None = None,
        first: int = 0,
        strategy: Strategy | None = None,
    ) -> list[Sample]:
        """Draw ``cfg.num`` samples of each prompt, in order.

        A row does not depend on the other rows of the batch.

        Args:
            cfg: the sampling settings.
            prompts: see :data:`Prompt`; may be empty texts.
            progress: called after each block with the number of finished positions.
            first: number of the first row; a row's randomness is (seed, its number) alone.
            strategy: a decoding strategy; None: the one that ``cfg`` selects
                (:data:`bd3lm.sample.strategies.STRATEGIES`).

        Raises:
            ConfigError: a prompt that holds the mask token or an unknown id, or leaves no room; a
                length that one block of S = L cannot hold; settings that the system does not have.
        """
        samples: dict[int, Sample] = {}
        for event in self.stream(cfg, prompts, first=first, strategy=strategy):
            samples |= event.ended
            if progress is not None:
                progress(min(event.start + self.block_size, self.length(cfg)))
        return [samples[number] for number in sorted(samples)]

    @torch.inference_mode()
    def stream(
        self,
        cfg: SampleConfig,
        prompts: Sequence[Prompt] = ("",),
        *,
        first: int = 0,
        every_step: bool = False,
        strategy: Strategy | None = None,
    ) -> Iterator[BlockEvent]:
        """Yield each finished block and, with ``every_step``, each forward before it.

        Arguments and errors as of :meth:`generate`.
        """
        with adaptive_waiting():
            yield from self._stream(cfg, prompts, first, every_step, strategy)

    def _stream(
        self,
        cfg: SampleConfig,
        prompts: Sequence[Prompt],
        first: int,
        every_step: bool,
        strategy: Strategy | None,
    ) -> Iterator[BlockEvent]:
        rows = [ids for ids in map(self.encode, prompts) for _ in range(cfg.num)]
        cfg = self.resolve(cfg)
        self._check(cfg, rows)
        if cfg.speculate:
            check(strategy is None, "strategy", strategy, "None with speculate")
            yield from self._speculate(cfg, rows, first)
            return
        fill = strategy or choose(cfg, self.system)
        state = self._start(cfg, rows, first)
        started = time.perf_counter()
        while state.running:
            for _ in self._fill_block(state, cfg, fill):
                if every_step:
                    sums = zip(state.rows, state.log_prob.tolist(), strict=True)
                    log_prob = {row.number: total for row, total in sums}
                    yield BlockEvent(state.start, self._blocks(state), False, {}, log_prob)
            blocks, start = self._blocks(state), state.start
            state.start += self.block_size
            ended = self._ended(state, cfg)
            seconds = time.perf_counter() - started
            samples = {}
            for index, (stop, ids) in ended.items():
                row, log_prob = state.rows[index], float(state.log_prob[index])
                samples[row.number] = self._finished(row, ids, stop, log_prob, seconds)
            if state.end(ended) and state.rows:
                state.step = self._step(state.cache)
            yield BlockEvent(start, blocks, True, samples)

    def length(self, cfg: SampleConfig) -> int:
        """Largest number of tokens of a row, BOS included."""
        return cfg.length or self.window

    def _speculate(
        self, cfg: SampleConfig, prompts: Sequence[Sequence[int | None]], first: int
    ) -> Iterator[BlockEvent]:
        """Yield the new tokens of each forward of self-speculation."""
        limit, started = self.length(cfg), time.perf_counter()
        texts = [[self.bos_id, *(t for t in ids if t is not None)] for ids in prompts]
        run = Speculation(
            self.model,
            self.system,
            cfg,
            texts,
            first=first,
            limit=limit,
            window=self.window,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
        )
        self.acceptance = run.acceptance
        while run.rows:
            start = min(len(row.ids) for row in run.rows)
            new = run.step()
            blocks = {row.number: ids for row, ids in zip(run.rows, new, strict=True)}
            log_prob = {row.number: row.log_prob for row in run.rows}
            ended: dict[int, Sample] = {}
            alive = []
            for index, (row, tokens) in enumerate(zip(run.rows, new, strict=True)):
                stop, end = self._stop(row.ids, len(tokens), row.given, limit)
                if not stop:
                    alive.append(index)
                    continue
                ids, seconds = row.ids[1:end], time.perf_counter() - started
                ended[row.number] = self._finished(row, ids, stop, row.log_prob, seconds)
            if len(alive) < len(run.rows):
                run.keep(alive)
            yield BlockEvent(start, blocks, True, ended, log_prob)

    def _finished(
        self,
        row: RowState | SpeculativeRow,
        ids: list[int],
        stop: str,
        log_prob: float,
        seconds: float,
    ) -> Sample:
        text = None if self.tokenizer is None else self.tokenizer.decode(ids)
        return Sample(ids, stop, row.nfe, row.nfe - row.fills, log_prob, seconds, text)

    def _stop(self, ids: list[int], fresh: int, given: int, limit: int) -> tuple[str, int]:
        """Why a row ends with one of its ``fresh`` last tokens, and where; "" if it does not."""
        for end in range(len(ids) - fresh + 1, len(ids) + 1):
            if ids[end - 1] == self.eos_id:
                return "eos", end - 1
            window = ids[end - DEGENERATE_WINDOW : end]
            if end - given >= DEGENERATE_WINDOW and is_degenerate(window):
                return "degenerate", end - DEGENERATE_WINDOW
            if end == limit:
                return "length", end
        return "", 0

    # --- rows -------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int | None]:
        """Token ids of a prompt; None where a token is to be filled in.

        Raises:
            ConfigError: a text, and the sampler has no tokenizer.
        """
        return encode_prompt(prompt, self.tokenizer, self.mask_id)

    def resolve(self, cfg: SampleConfig) -> SampleConfig:
        """Check settings against the model, and give ``forbidden`` as token ids.

        A forbidden word is its token and its token with a space before it.

        Raises:
            ConfigError: see :meth:`generate`.
        """
        resolved = replace(cfg, forbidden=forbidden_ids(cfg.forbidden, self.tokenizer))
        self._check(resolved, [[]])
        return resolved

    def _start(
        self, cfg: SampleConfig, prompts: Sequence[Sequence[int | None]], first: int
    ) -> SampleState:
        """Lay out prompts and masks, and encode the blocks that every prompt covers."""
        size = self.block_size
        length = -(-self.length(cfg) // size) * size
        tokens = torch.full((len(prompts), length), self.mask_id)
        tokens[:, 0] = self.bos_id
        for index, prompt in enumerate(prompts):
            given = [self.mask_id if t is None else t for t in prompt]
            tokens[index, 1 : 1 + len(prompt)] = torch.tensor(given, dtype=torch.int64)
        masked = (tokens == self.mask_id).numpy()
        starts = masked.argmax(axis=1) // size * size  # every row has a hole
        start = int(starts.min())
        cache = KVCache(self.model.cfg, len(prompts), self.window, self.device)
        state = SampleState(
            tokens=tokens.to(self.device),
            masked=masked,
            log_prob=torch.zeros(len(prompts), dtype=torch.float64, device=self.device),
            rows=[RowState(first + i, int(own)) for i, own in enumerate(starts)],
            cache=cache,
            step=self._step(cache),
            window_start=self._window_start(start),
            committed=0,
            start=start,
        )
        if start > 0:
            self._encode_context(state)
        return state

    def _step(self, cache: KVCache) -> DecodeStep | None:
        if not self.replay:
            return None
        scores = partial(self.system.logits, self.model)
        return DecodeStep(self.model, cache, self.block_size, scores)

    def _window_start(self, start: int) -> int:
        return window_start(start, self.block_size, self.window)

    def _context(self, start: int) -> range:
        """Positions that the cache holds before the block at ``start`` is drawn.

        A system that predicts a token from the one before leaves that one to the next forward.
        """
        return range(self._window_start(start), start - self.system.prediction_offset)

    def _encode_context(self, state: SampleState) -> None:
        """Fill the cache with the clean tokens before the current block, in one forward."""
        positions = self._context(state.start)
        state.window_start = state.committed = positions.start
        state.cache.length = 0
        if not positions:
            return
        context = state.tokens[:, positions.start : positions.stop].clone()
        context[:, 0] = self.bos_id
        rows, length = context.shape
        read = torch.empty(0, dtype=torch.int64, device=self.device)
        shift = self.system.shifts(self.model)
        if shift:
            read = torch.arange(1, rows + 1, device=self.device) * length - 1
        features = self.model.encode(
            context, self.block_size, select=read, cache=state.cache, commit=length
        )
        state.before = features if shift else None
        state.committed = positions.stop
        for row in state.rows:
            if row.start < state.start:  # others count their own prefill when they begin
                state.count_fill(row)

    # --- one block --------------------------------------------------------------------------

    def _fill_block(self, state: SampleState, cfg: SampleConfig, fill: Strategy) -> Iterator[None]:
        """Fill the masked positions of the current block; yields after each forward."""
        start = state.start
        if self._window_start(start) != state.window_start:
            self._encode_context(state)
        if self._context(start):
            # A row with a prompt costs one prefill, whichever forward wrote its keys in this batch.
            for row in state.rows:
                if row.start == start:
                    state.count_fill(row)
        yield from fill(
            BlockDraw(
                self.model,
                self.system,
                cfg,
                state,
                bos_id=self.bos_id,
                trained_length=self.window,
            )
        )
        state.masked[:, start : start + self.block_size] = False

    # --- ends -------------------------------------------------------------------------------

    def _blocks(self, state: SampleState) -> dict[int, list[int]]:
        tokens = state.tokens[:, state.start : state.start + self.block_size].tolist()
        rows = zip(state.rows, tokens, strict=True)
        return {row.number: ids for row, ids in rows if not row.finished}

    def _ended(self, state: SampleState, cfg: SampleConfig) -> dict[int, tuple[str, list[int]]]:
        """Rows that end with the block just filled: row of the batch -> (reason, ids after BOS)."""
        ended: dict[int, tuple[str, list[int]]] = {}
        size, upto = self.block_size, min(state.start, self.length(cfg))
        fresh = state.given[:, state.start - size : upto]
        block = state.tokens[:, state.start - size : upto].cpu().numpy()
        closes = (block == self.eos_id) & ~fresh
        for index, row in enumerate(state.rows):
            if row.finished:
                continue
            row.drawn += int((~fresh[index]).sum())
            if closes[index].any():
                end = state.start - size + int(closes[index].argmax())
                ended[index] = ("eos", state.ids(index, end))
            elif row.drawn >= DEGENERATE_WINDOW and is_degenerate(
                state.tokens[index, upto - DEGENERATE_WINDOW : upto].tolist()
            ):
                ended[index] = ("degenerate", state.ids(index, upto - DEGENERATE_WINDOW))
            elif upto == self.length(cfg):
                ended[index] = ("length", state.ids(index, upto))
        return ended

    def _check(self, cfg: SampleConfig, prompts: Sequence[Sequence[int | None]]) -> None:
        check_settings(cfg, self.model, self.system, self.window)
        check_prompts(cfg, prompts, self.model.vocab_size, self.mask_id, self.length(cfg))
