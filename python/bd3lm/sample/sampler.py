"""Sampling block by block through an exact key/value cache (MATH §8), for every system."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import SampleConfig, check
from bd3lm.model import DecodeStep, KVCache, Transformer, for_inference
from bd3lm.sample.draw import discourage, draw
from bd3lm.sample.plan import block_uniforms, plan_block
from bd3lm.sample.state import RowState, Running
from bd3lm.sample.stopping import DEGENERATE_WINDOW, is_degenerate
from bd3lm.systems import System, sigma_of

Prompt = Sequence[int | None]
"""Token ids after BOS; None is a hole to fill, and so is everything behind the last of them."""


@dataclass(frozen=True)
class Sample:
    """One finished row.

    Attributes:
        ids: tokens after BOS, prompt included, closing EOS left out.
        stop: ``eos``, ``length`` or ``degenerate`` (the last 256 tokens held under 4 nats of
            entropy; they are cut, as the paper's code does).
        nfe: forwards of the denoiser that this row took part in.
        nfe_paper: the same without forwards that only fill the cache.
        log_prob: Σ log p of every token drawn, those that were cut included, given what stood
            around it when it was drawn: under the model itself, before temperature, nucleus and
            penalties. Nats.
        seconds: wall-clock until the row ended, shared with the rows beside it.
    """

    ids: list[int]
    stop: str
    nfe: int
    nfe_paper: int
    log_prob: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """What :meth:`Sampler.stream` yields: a denoising step, or a finished block.

    Attributes:
        start: first position of the block.
        blocks: its tokens by row number, the mask id where one is still hidden.
        complete: whether the block is finished.
        ended: samples that ended with it, by row number.
    """

    start: int
    blocks: dict[int, list[int]]
    complete: bool
    ended: dict[int, Sample]


class Sampler:
    """Draws rows from a model of any system.

    A block starts masked (but for prompt tokens). First hitting, the default, gives one masked
    position its token a forward. The keys and values of a finished block are written by the first
    forward of the next one, so that a row of n tokens takes n forwards.

    Cached keys are those a full forward would compute: the clean stream is block-causal and its
    positions do not move. When a row outgrows ``window`` positions, its last half is encoded anew
    behind a BOS, just as training rows begin in the middle of documents; what is drawn then is
    exact for that shorter context. Where windows begin depends on the position alone, so a row
    comes out the same whatever its batch, its prompt or its length limit.

    Args:
        model: in evaluation mode.
        system: what the model is; its block size may differ from the trained one.
        window: L, positions the model was trained on.
        bos_id: stands at position 0.
        eos_id: ends a row when it is drawn.
        replay: run forwards of fixed shapes, which CUDA records once and replays
            (:class:`bd3lm.model.DecodeStep`); None: on CUDA.
    """

    def __init__(
        self,
        model: Transformer,
        system: System,
        *,
        window: int,
        bos_id: int,
        eos_id: int,
        replay: bool | None = None,
    ) -> None:
        size = system.block_size
        check(window % size == 0, "block-size", size, f"a divisor of the trained length {window}")
        self.model, self.system, self.block_size, self.window = model, system, size, window
        self.mask_id, self.bos_id, self.eos_id = system.mask_id, bos_id, eos_id
        self.device = next(model.parameters()).device
        self.replay = self.device.type == "cuda" if replay is None else replay

    @classmethod
    def from_checkpoint(
        cls,
        loaded: Checkpoint,
        block_size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Sampler:
        """The sampler of a trained model, with its own blocks or with others.

        Args:
            loaded: is copied, and left as it is.
            block_size: None: the trained one.
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
        )

    def generate(
        self,
        cfg: SampleConfig,
        prompts: Sequence[Prompt],
        progress: Callable[[int], None] | None = None,
        first: int = 0,
    ) -> list[Sample]:
        """One sample a prompt, in order; a row never depends on the rows beside it.

        Args:
            cfg: how to sample (``num`` is the number of prompts).
            prompts: token ids without BOS, None where a token is to be filled in; may be empty.
            progress: told after each block how many positions are done.
            first: number of the first row; a row's randomness is (seed, its number) alone.

        Raises:
            ConfigError: a prompt that holds the mask token, an unknown id or leaves no room, a
                length that one block of S = L cannot hold, or a way of sampling that the system
                does not have.
        """
        samples: dict[int, Sample] = {}
        for event in self.stream(cfg, prompts, first=first):
            samples |= event.ended
            if progress is not None:
                progress(min(event.start + self.block_size, self.length(cfg)))
        return [samples[first + index] for index in range(len(prompts))]

    @torch.inference_mode()
    def stream(
        self,
        cfg: SampleConfig,
        prompts: Sequence[Prompt],
        *,
        first: int = 0,
        every_step: bool = False,
    ) -> Iterator[Progress]:
        """Blocks as they are finished and, with ``every_step``, each forward in between.

        Arguments and errors as of :meth:`generate`.
        """
        self._check(cfg, prompts)
        batch = self._start(cfg, prompts, first)
        started = time.perf_counter()
        while batch.rows:
            for _ in self._fill_block(batch, cfg):
                if every_step:
                    yield Progress(batch.start, self._blocks(batch), False, {})
            blocks, start = self._blocks(batch), batch.start
            batch.start += self.block_size
            ended = self._ended(batch, cfg)
            seconds = time.perf_counter() - started
            samples = {}
            for place, (stop, ids) in ended.items():
                row = batch.rows[place]
                log_prob = float(batch.log_prob[place])
                paper = row.nfe - row.fills
                samples[row.number] = Sample(ids, stop, row.nfe, paper, log_prob, seconds)
            if batch.drop(ended):
                batch.step = self._step(batch.cache)
            yield Progress(start, blocks, True, samples)

    def length(self, cfg: SampleConfig) -> int:
        """Largest number of tokens of a row, BOS included."""
        return cfg.length or self.window

    # --- rows -------------------------------------------------------------------------------

    def _start(self, cfg: SampleConfig, prompts: Sequence[Prompt], first: int) -> Running:
        """Lay out prompts and masks; blocks that every prompt covers are encoded at once."""
        size = self.block_size
        length = -(-self.length(cfg) // size) * size
        tokens = torch.full((len(prompts), length), self.mask_id)
        tokens[:, 0] = self.bos_id
        for index, prompt in enumerate(prompts):
            given = [self.mask_id if t is None else t for t in prompt]
            tokens[index, 1 : 1 + len(prompt)] = torch.tensor(given, dtype=torch.int64)
        masked = (tokens == self.mask_id).numpy()
        start = int(masked.argmax(axis=1).min()) // size * size  # every row has a hole
        cache = KVCache(self.model.cfg, len(prompts), self.window, self.device)
        batch = Running(
            tokens=tokens.to(self.device),
            masked=masked,
            log_prob=torch.zeros(len(prompts), dtype=torch.float64, device=self.device),
            rows=[RowState(first + index) for index in range(len(prompts))],
            cache=cache,
            step=self._step(cache),
            base=self._base(start),
            committed=0,
            start=start,
        )
        if start > 0:
            self._encode_context(batch)
        return batch

    def _step(self, cache: KVCache) -> DecodeStep | None:
        if not self.replay:
            return None
        scores = partial(self.system.logits, self.model)
        return DecodeStep(self.model, cache, self.block_size, scores)

    def _base(self, start: int) -> int:
        """First position of the window that the block at ``start`` is drawn in."""
        beyond = start + self.block_size - self.window
        if beyond <= 0:
            return 0
        shift = max(self.window // 2 // self.block_size, 1) * self.block_size
        return -(-beyond // shift) * shift

    def _encode_context(self, batch: Running) -> None:
        """Fill the cache with the clean tokens before the current block, in one forward.

        A system that predicts a token from the one before keeps that one for the next forward.
        """
        batch.base = self._base(batch.start)
        end = batch.start - self.system.looks_back
        batch.cache.length = 0
        batch.committed = batch.base
        if end <= batch.base:
            return
        context = batch.tokens[:, batch.base : end].clone()
        context[:, 0] = self.bos_id
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self.model.encode(
            context, self.block_size, select=nothing, cache=batch.cache, commit=context.shape[1]
        )
        batch.committed = end
        for row in batch.rows:
            row.nfe += 1
            row.fills += 1

    # --- one block --------------------------------------------------------------------------

    def _fill_block(self, batch: Running, cfg: SampleConfig) -> Iterator[None]:
        """Fill the masked positions of the current block; yields after each forward."""
        size, start = self.block_size, batch.start
        if self._base(start) != batch.base:
            self._encode_context(batch)
        masked = batch.masked[:, start : start + size]
        draws = [block_uniforms(cfg.seed, row.number, start // size, size) for row in batch.rows]
        uniform = np.stack(draws)  # [B, S, 2]
        if self.system.has_mass:
            yield from self._analytic(batch, cfg, masked, uniform)
        elif cfg.adaptive:
            yield from self._adaptive(batch, cfg, masked, uniform)
        else:
            yield from self._planned(batch, cfg, masked, uniform)
        batch.masked[:, start : start + size] = False

    def _planned(
        self, batch: Running, cfg: SampleConfig, masked: np.ndarray, uniform: np.ndarray
    ) -> Iterator[None]:
        """First hitting, or ancestral sampling on a grid.

        The host knows every forward beforehand, and nothing is read back inside the block.
        """
        grid = None if cfg.steps is None else self.system.level_grid(cfg.steps)
        one_each = grid is None and cfg.tokens_per_forward == 1
        for forward in plan_block(uniform[..., 0], masked, cfg, grid):
            chosen = forward.rows, forward.spots
            rows, spots, numbers = self._send(*chosen, uniform[(*chosen, 1)])
            logits = self._logits(batch, rows, spots, forward.level, one_each)
            self._reveal(batch, cfg, logits, rows, spots, numbers)
            batch.took_part(forward.rows)
            yield

    def _adaptive(
        self, batch: Running, cfg: SampleConfig, masked: np.ndarray, uniform: np.ndarray
    ) -> Iterator[None]:
        """Parallel decoding: first hitting's position, and others of which the model is sure.

        How many are left has to be read from the device after each forward.
        """
        left = masked.copy()
        while left.any():
            rows, spots = left.nonzero()
            hidden = np.where(left, uniform[..., 0], -1.0)
            places, where, numbers = self._send(rows, spots, uniform[rows, spots, 1])
            logits = self._logits(batch, places, where, hidden.max(axis=1).astype(np.float32))
            chosen = spots == hidden.argmax(axis=1)[rows]
            chosen |= self._sure(cfg, logits, rows, chosen)
            keep = torch.from_numpy(chosen).to(self.device)
            self._reveal(batch, cfg, logits[keep], places[keep], where[keep], numbers[keep])
            batch.took_part(rows)
            left[rows[chosen], spots[chosen]] = False
            yield

    def _sure(
        self, cfg: SampleConfig, logits: Tensor, rows: np.ndarray, first: np.ndarray
    ) -> np.ndarray:
        """Positions of which the model is sure enough, bool [M]; ``first`` are revealed anyway."""
        log_p = logits.double().log_softmax(-1)
        if cfg.threshold is not None:
            return (log_p.amax(-1).exp() >= cfg.threshold).cpu().numpy()
        assert cfg.entropy_bound is not None
        entropy = torch.special.entr(log_p.exp()).sum(-1).cpu().numpy()
        # Within a row: first hitting's own position, then the surest; all but the least sure of
        # those taken so far count against the bound.
        order = np.lexsort((entropy, ~first, rows))
        sure = np.zeros(len(rows), dtype=bool)
        spent = largest = 0.0
        for index, at in enumerate(order):
            if index == 0 or rows[at] != rows[order[index - 1]]:
                spent = largest = 0.0
            spent += entropy[at]
            largest = max(largest, entropy[at])
            sure[at] = spent - largest <= cfg.entropy_bound
        return sure

    def _analytic(
        self, batch: Running, cfg: SampleConfig, masked: np.ndarray, uniform: np.ndarray
    ) -> Iterator[None]:
        """Analytic (Tweedie) steps of a system whose scores need not sum to one (MATH §5).

        A last forward reveals what is left: at most N + 1 forwards.
        """
        left, hidden = masked.copy(), np.ones(masked.shape)
        steps = cfg.steps or self.window
        grid = np.maximum(self.system.level_grid(steps), LOWEST)
        for index in range(steps + 1):
            rows, spots = left.nonzero()
            if len(rows) == 0:
                return
            places, where, numbers = self._send(rows, spots, uniform[rows, spots, 1])
            told = np.full(len(batch.rows), grid[index], dtype=np.float32)
            logits = self._logits(batch, places, where, told)
            if index < steps:
                # Revealed once the probability of being still hidden falls below its number.
                share = (grid[index] - grid[index + 1]) / grid[index]
                mass = self.system.reveal_mass(logits).cpu().numpy()
                hidden[rows, spots] *= np.maximum(1.0 - mass * share, 0.0)
                now = hidden[rows, spots] <= uniform[rows, spots, 0]
            else:
                now = np.ones(len(rows), dtype=bool)
            keep = torch.from_numpy(now).to(self.device)
            self._reveal(batch, cfg, logits[keep], places[keep], where[keep], numbers[keep])
            batch.took_part(rows)
            left[rows[now], spots[now]] = False
            yield

    def _logits(
        self, batch: Running, rows: Tensor, spots: Tensor, level: np.ndarray, one_each: bool = False
    ) -> Tensor:
        """Logits [M, V] of positions of the current block; commits the blocks before it.

        Args:
            batch: the rows.
            rows: places in the batch [M].
            spots: positions in the block [M].
            level: noise level of each row [B].
            one_each: no row is asked about more than one position.
        """
        start, stop = batch.start, batch.start + self.block_size
        waiting = start - batch.committed
        back = self.system.looks_back
        ids = batch.tokens[:, batch.committed : stop - back]
        if batch.committed == batch.base > 0:
            ids = ids.clone()
            ids[:, 0] = self.bos_id
        sigma = self._sigma(level, waiting) if self.model.cfg.time_conditioning else None
        batch.committed = start
        length, first = ids.shape[1], waiting - back
        if batch.step is None:
            features = self.model.encode(
                ids,
                self.block_size,
                select=rows * length + first + spots,
                cache=batch.cache,
                commit=waiting,
                sigma=sigma,
            )
            return self.system.logits(self.model, features)
        # What is recorded asks about as many positions every time, whatever is still masked.
        place = torch.arange(len(batch.rows), device=self.device)
        if one_each:
            asked = torch.zeros_like(place).index_copy(0, rows, spots)
            select, answers = place * length + first + asked, rows
        else:
            every = torch.arange(self.block_size, device=self.device)
            select = (place[:, None] * length + first + every).flatten()
            answers = rows * self.block_size + spots
        return batch.step(ids, select, commit=waiting, sigma=sigma)[answers]

    def _send(self, *arrays: np.ndarray) -> list[Tensor]:
        """Arrays of the host as tensors of the device, without waiting for the copies."""
        return [torch.from_numpy(x).to(self.device, non_blocking=True) for x in arrays]

    def _sigma(self, level: np.ndarray, waiting: int) -> Tensor:
        """Levels told of every block of the forward, [B, blocks]: finished ones are clean."""
        told = np.zeros((len(level), waiting // self.block_size + 1), dtype=np.float32)
        told[:, -1] = level
        return sigma_of(torch.from_numpy(told)).to(self.device)

    def _reveal(
        self,
        batch: Running,
        cfg: SampleConfig,
        logits: Tensor,
        rows: Tensor,
        spots: Tensor,
        uniform: Tensor,
    ) -> None:
        shaped = None
        if cfg.repetition_penalty != 1:
            seen = torch.zeros(len(batch.rows), logits.shape[1], dtype=torch.bool).to(self.device)
            seen.scatter_(1, batch.tokens[:, 1 : batch.start + self.block_size], True)
            shaped = discourage(logits, seen[rows], cfg.repetition_penalty)
        token, log_p = draw(logits, uniform, cfg, shaped)
        batch.tokens[rows, batch.start + spots] = token
        batch.log_prob.index_add_(0, rows, log_p)

    # --- ends -------------------------------------------------------------------------------

    def _blocks(self, batch: Running) -> dict[int, list[int]]:
        tokens = batch.tokens[:, batch.start : batch.start + self.block_size].tolist()
        return {row.number: ids for row, ids in zip(batch.rows, tokens, strict=True)}

    def _ended(self, batch: Running, cfg: SampleConfig) -> dict[int, tuple[str, list[int]]]:
        """Rows that end with the block just filled: place -> (reason, ids after BOS)."""
        ended: dict[int, tuple[str, list[int]]] = {}
        size, upto = self.block_size, min(batch.start, self.length(cfg))
        fresh = batch.given[:, batch.start - size : upto]
        block = batch.tokens[:, batch.start - size : upto].cpu().numpy()
        closes = (block == self.eos_id) & ~fresh
        for place, row in enumerate(batch.rows):
            row.drawn += int((~fresh[place]).sum())
            if closes[place].any():
                end = batch.start - size + int(closes[place].argmax())
                ended[place] = ("eos", batch.ids(place, end))
            elif row.drawn >= DEGENERATE_WINDOW and is_degenerate(
                batch.tokens[place, upto - DEGENERATE_WINDOW : upto].tolist()
            ):
                ended[place] = ("degenerate", batch.ids(place, upto - DEGENERATE_WINDOW))
            elif upto == self.length(cfg):
                ended[place] = ("length", batch.ids(place, upto))
        return ended

    def _check(self, cfg: SampleConfig, prompts: Sequence[Prompt]) -> None:
        check(len(prompts) >= 1, "num", len(prompts), "at least 1")
        length = self.length(cfg)
        check(
            self.block_size < self.window or length <= self.window,
            "length",
            length,
            f"at most {self.window} where one block is the whole row",
        )
        vocab_size = self.model.vocab_size
        ids = f"ids in [0, {vocab_size}) other than the mask token {self.mask_id}"
        for token in cfg.forbidden:
            check(0 <= token < vocab_size and token != self.mask_id, "forbidden", token, ids)
        check(
            not (self.system.has_mass and (cfg.adaptive or cfg.tokens_per_forward > 1)),
            "threshold, entropy-bound, tokens-per-forward",
            "set",
            f"left out for {self.system.name}, whose scores are no probabilities; use steps",
        )
        for prompt in prompts:
            check(
                len(prompt) + 2 <= length or (len(prompt) < length and None in prompt),
                "prompt",
                f"{len(prompt)} tokens",
                f"at most length - 2 = {length - 2} tokens, to leave room for one more",
            )
            for token in prompt:
                fits = token is None or (0 <= token < vocab_size and token != self.mask_id)
                check(fits, "prompt", token, ids)


LOWEST = 1e-5
"""Level at which the analytic sampler stops, and its last forward begins."""
