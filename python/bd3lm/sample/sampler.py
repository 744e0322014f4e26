"""First-hitting sampling, block by block through an exact key/value cache (MATH §8)."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import SampleConfig, check
from bd3lm.model import KVCache, Transformer
from bd3lm.sample.draw import draw
from bd3lm.sample.stopping import DEGENERATE_WINDOW, is_degenerate


@dataclass(frozen=True)
class Sample:
    """One finished row.

    Attributes:
        ids: tokens after BOS, prompt included, closing EOS left out.
        stop: ``eos``, ``length`` or ``degenerate`` (the last 256 tokens held under 4 nats of
            entropy; they are cut, as the paper's code does).
        nfe: forwards of the denoiser that this row took part in.
        nfe_paper: the same without forwards that only fill the cache.
        seconds: wall-clock until the row ended, shared with the rows beside it.
    """

    ids: list[int]
    stop: str
    nfe: int
    nfe_paper: int
    seconds: float


class Sampler:
    """Draws rows from a block-diffusion model.

    Each block starts fully masked (but for prompt tokens) and takes one forward a masked token:
    a uniformly chosen masked position is given a token drawn from its own distribution. The keys
    and values of the finished block are written by the first forward of the next one, so that a
    row of n tokens takes n forwards.

    Cached keys are those a full forward would compute: the clean stream is block-causal and its
    positions do not move. When a row outgrows ``window`` positions, its last half is encoded anew
    behind a BOS, just as training rows begin in the middle of documents; what is drawn then is
    exact for that shorter context. Where windows begin depends on the position alone, so a row
    comes out the same whatever its batch, its prompt or its length limit.

    Args:
        model: in evaluation mode.
        block_size: S, which may differ from the trained one.
        window: L, positions the model was trained on.
        mask_id: never drawn.
        bos_id: stands at position 0.
        eos_id: ends a row when it is drawn.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        block_size: int,
        window: int,
        mask_id: int,
        bos_id: int,
        eos_id: int,
    ) -> None:
        check(
            window % block_size == 0,
            "block-size",
            block_size,
            f"a divisor of the trained length {window}",
        )
        self.model, self.block_size, self.window = model, block_size, window
        self.mask_id, self.bos_id, self.eos_id = mask_id, bos_id, eos_id
        self.device = next(model.parameters()).device

    @classmethod
    def from_checkpoint(cls, loaded: Checkpoint, block_size: int | None = None) -> Sampler:
        """The sampler of a trained model, with its own blocks or with others.

        Raises:
            ConfigError: a block size that does not divide the trained length.
        """
        return cls(
            loaded.model,
            block_size=block_size or loaded.config.block_size,
            window=loaded.config.seq_len,
            mask_id=loaded.tokenizer.mask_id,
            bos_id=loaded.tokenizer.bos_id,
            eos_id=loaded.tokenizer.eos_id,
        )

    @torch.inference_mode()
    def generate(
        self,
        cfg: SampleConfig,
        prompts: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
        first: int = 0,
    ) -> list[Sample]:
        """One sample a prompt, in order; a row never depends on the rows beside it.

        Args:
            cfg: length, nucleus, temperature and seed (``num`` is the number of prompts).
            prompts: token ids without BOS, each shorter than ``cfg.length - 1``; may be empty.
            progress: told after each block how many positions are done.
            first: number of the first row; a row's randomness is (seed, its number) alone.

        Raises:
            ConfigError: a prompt that holds the mask token, an unknown id or leaves no room, or
                a length that one block of S = L cannot hold.
        """
        self._check(cfg, prompts)
        batch = self._start(cfg, prompts, first)
        started = time.perf_counter()
        samples: dict[int, Sample] = {}
        while batch.rows:
            self._fill_block(batch, cfg)
            ended = self._ended(batch, cfg)
            seconds = time.perf_counter() - started
            for place, (stop, ids) in ended.items():
                row = batch.rows[place]
                samples[row.index] = Sample(ids, stop, row.nfe, row.nfe - row.fills, seconds)
            batch.drop(ended)
            if progress is not None:
                progress(min(batch.start, cfg.length))
        return [samples[index] for index in range(len(prompts))]

    def _start(self, cfg: SampleConfig, prompts: Sequence[Sequence[int]], first: int) -> _Rows:
        """Lay out prompts and masks; blocks that every prompt covers are encoded at once."""
        size = self.block_size
        tokens = torch.full((len(prompts), -(-cfg.length // size) * size), self.mask_id)
        tokens[:, 0] = self.bos_id
        rows = []
        for index, prompt in enumerate(prompts):
            tokens[index, 1 : 1 + len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
            rows.append(_Row(index, first + index, len(prompt)))
        tokens = tokens.to(self.device)
        cache = KVCache(self.model.cfg, len(rows), self.window, self.device)
        start = min(len(prompt) + 1 for prompt in prompts) // size * size
        batch = _Rows(tokens, rows, cache, base=self._base(start), committed=0, start=start)
        if start > 0:
            self._encode_context(batch)
        return batch

    def _base(self, start: int) -> int:
        """First position of the window that the block at ``start`` is drawn in."""
        beyond = start + self.block_size - self.window
        if beyond <= 0:
            return 0
        shift = max(self.window // 2 // self.block_size, 1) * self.block_size
        return -(-beyond // shift) * shift

    def _encode_context(self, batch: _Rows) -> None:
        """Fill the cache with the clean tokens before the current block, in one forward."""
        batch.base = self._base(batch.start)
        context = batch.tokens[:, batch.base : batch.start].clone()
        context[:, 0] = self.bos_id
        batch.cache.length = 0
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self.model.encode(
            context, self.block_size, select=nothing, cache=batch.cache, commit=context.shape[1]
        )
        batch.committed = batch.start
        for row in batch.rows:
            row.nfe += 1
            row.fills += 1

    def _fill_block(self, batch: _Rows, cfg: SampleConfig) -> None:
        """First hitting: give every masked position of the current block its token, one a forward.

        Positions and tokens are decided by two uniforms a step, drawn for the whole block before
        it starts; nothing is read back from the device inside the block.
        """
        size, start = self.block_size, batch.start
        if self._base(start) != batch.base:
            self._encode_context(batch)
        waiting = batch.start - batch.committed
        stop = start + size
        masked = batch.tokens[:, start:stop] == self.mask_id  # [B, S]
        draws = [block_uniforms(cfg.seed, row.number, start // size, size) for row in batch.rows]
        uniform = torch.from_numpy(np.stack(draws)).to(self.device)  # float64 [B, S, 2]
        left = masked.sum(1)
        counts = left.tolist()
        row_index = torch.arange(len(batch.rows), device=self.device)
        for step in range(max(counts)):
            ids = batch.tokens[:, stop - size - waiting : stop]
            # The j-th masked position of each row, j uniform: first hitting's order.
            rank = (uniform[:, step, 0] * left).long() + 1
            chosen = ((masked.cumsum(1) == rank[:, None]) & masked).int().argmax(1)
            features = self.model.encode(
                ids,
                size,
                select=row_index * ids.shape[1] + waiting + chosen,
                cache=batch.cache,
                commit=waiting,
            )
            batch.committed += waiting
            waiting = 0
            logits = self.model.logits(features)
            logits[:, self.mask_id] = -torch.inf
            token = draw(logits, uniform[:, step, 1], cfg.temperature, cfg.top_p)
            live = left > 0
            where = row_index, start + chosen
            batch.tokens[where] = torch.where(live, token, batch.tokens[where])
            masked[row_index, chosen] &= ~live
            left = left - live.long()
        for row, count in zip(batch.rows, counts, strict=True):
            row.nfe += count
        batch.start = stop

    def _ended(self, batch: _Rows, cfg: SampleConfig) -> dict[int, tuple[str, list[int]]]:
        """Rows that end with the block just filled: place -> (reason, ids after BOS)."""
        ended: dict[int, tuple[str, list[int]]] = {}
        upto = min(batch.start, cfg.length)
        for place, ids in enumerate(batch.tokens[:, 1:upto].tolist()):
            prompt = batch.rows[place].prompt
            fresh = ids[max(prompt, batch.start - self.block_size - 1) :]
            if self.eos_id in fresh:
                ended[place] = ("eos", ids[: len(ids) - len(fresh) + fresh.index(self.eos_id)])
            elif len(ids) - prompt >= DEGENERATE_WINDOW and is_degenerate(ids):
                ended[place] = ("degenerate", ids[:-DEGENERATE_WINDOW])
            elif upto == cfg.length:
                ended[place] = ("length", ids)
        return ended

    def _check(self, cfg: SampleConfig, prompts: Sequence[Sequence[int]]) -> None:
        check(len(prompts) >= 1, "num", len(prompts), "at least 1")
        check(
            self.block_size < self.window or cfg.length <= self.window,
            "length",
            cfg.length,
            f"at most {self.window} where one block is the whole row",
        )
        vocab_size = self.model.vocab_size
        for prompt in prompts:
            check(
                len(prompt) + 2 <= cfg.length,
                "prompt",
                f"{len(prompt)} tokens",
                f"at most length - 2 = {cfg.length - 2} tokens, to leave room for one more",
            )
            for token in prompt:
                check(
                    0 <= token < vocab_size and token != self.mask_id,
                    "prompt",
                    token,
                    f"ids in [0, {vocab_size}) other than the mask token {self.mask_id}",
                )


def block_uniforms(seed: int, row: int, block: int, size: int) -> NDArray[np.float64]:
    """All randomness of one block of one row: a uniform for each step's position and token.

    Returns:
        float64 [S, 2], in [0, 1); a function of its arguments alone.
    """
    bits = np.random.Philox(key=[seed, row], counter=[0, 0, 0, block])
    return np.random.Generator(bits).random((size, 2))


@dataclass
class _Row:
    """What one row knows about itself."""

    index: int
    """Place in the batch that was asked for."""
    number: int
    """Names its randomness, whatever the batch."""
    prompt: int
    """Tokens of the prompt."""
    nfe: int = 0
    fills: int = 0


@dataclass
class _Rows:
    """The rows still running, in lockstep by blocks."""

    tokens: Tensor
    rows: list[_Row]
    cache: KVCache
    base: int
    """Position of ``tokens`` that the first cached one stands for."""
    committed: int
    """Positions of ``tokens`` whose keys and values are cached."""
    start: int
    """First position of the current block."""

    def drop(self, ended: Container[int]) -> None:
        keep = [place for place in range(len(self.rows)) if place not in ended]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[place] for place in keep]
            alive = torch.tensor(keep, dtype=torch.int64, device=self.tokens.device)
            self.tokens = self.tokens.index_select(0, alive)
            self.cache.keep(alive)
