"""Lossless self-speculation: the noised stream drafts, the causal clean stream verifies.

Every forward runs, for each row, the last known token and the S - 1 tokens drafted after it through
the clean stream, which gives the autoregressive distribution p of each next token. The same forward
runs S noised blocks, one for each number of drafts that may be accepted, which give the
distributions q of the next drafts.

A draft x is accepted with probability min(1, p(x)/q(x)). The first refused one is replaced by a
draw from (p - q)₊; after the last accepted one the next token is drawn from p. So each token
follows p, and the text has the law of drawing token by token (docs/math.md §8). A block of drafts
begins where the known text ends; it need not lie on a block boundary of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bd3lm.config import SampleConfig
from bd3lm.model import KVCache, Transformer
from bd3lm.model.attention import Intervals, RangeMask
from bd3lm.model.previous import NOTHING, tokens_before
from bd3lm.sample.draw import Distribution, distribution, draw, invert
from bd3lm.sample.state import window_start
from bd3lm.systems import System


@dataclass
class Acceptance:
    """Counts by place of a draft, from the first to the (S-1)-th after the known text.

    Attributes:
        tried: drafts whose predecessors were all accepted, int64 [S-1].
        accepted: those of them that were accepted, int64 [S-1].
        overlap: sum over the tried ones of Σ min(p, q), the probability to accept, float64 [S-1].
        forwards: of all rows together.
        tokens: drawn by them.
    """

    tried: np.ndarray
    accepted: np.ndarray
    overlap: np.ndarray
    forwards: int = 0
    tokens: int = 0

    @classmethod
    def none(cls, drafts: int) -> Acceptance:
        """No drafts yet."""
        return cls(np.zeros(drafts, int), np.zeros(drafts, int), np.zeros(drafts))

    @property
    def ceiling(self) -> float:
        """Tokens a forward that the measured overlaps allow: 1 + Σ_j Π_{i≤j} overlap of place i."""
        share = self.overlap / np.maximum(self.tried, 1)
        return 1.0 + float(np.cumprod(share).sum())


@dataclass
class SpeculativeRow:
    """One text.

    Attributes:
        number: key of its randomness, next to the seed.
        ids: known tokens, BOS first.
        limit: largest number of them.
        given: how many the prompt gave, BOS included.
        drafts: tokens drafted after ``ids``.
        drafted_from: the distributions they were drawn from.
        window: position of ``ids`` at which the cached window begins; None before the first.
        nfe: forwards, those that only fill the cache included.
        fills: those that only fill the cache.
        log_prob: Σ log p of the drawn tokens under the model itself, nats.
        uniforms: its random numbers.
    """

    number: int
    ids: list[int]
    limit: int
    uniforms: np.random.Generator
    drafts: list[int] = field(default_factory=list)
    drafted_from: Distribution | None = None
    window: int | None = None
    nfe: int = 0
    fills: int = 0
    log_prob: float = 0.0

    def __post_init__(self) -> None:
        self.given = len(self.ids)


class Speculation:
    """Draws several rows, each at its own pace.

    Args:
        model: with a causal clean stream, in evaluation mode.
        system: block diffusion; its S is the size of the drafted blocks.
        cfg: the sampling settings.
        prompts: token ids of each row, BOS first.
        first: number of the first row.
        limit: largest number of tokens of a row, BOS included.
        window: L, positions of a training row.
        bos_id: token at the beginning of every window.
        eos_id: token after which a row has no more.
    """

    def __init__(
        self,
        model: Transformer,
        system: System,
        cfg: SampleConfig,
        prompts: Sequence[Sequence[int]],
        *,
        first: int,
        limit: int,
        window: int,
        bos_id: int,
        eos_id: int,
    ) -> None:
        self.model, self.system, self.cfg = model, system, cfg
        self.size, self.window = system.block_size, window
        self.bos_id, self.eos_id = bos_id, eos_id
        self.device = next(model.parameters()).device
        self.rows = [
            SpeculativeRow(first + i, list(prompt), limit, _uniforms(cfg.seed, first + i))
            for i, prompt in enumerate(prompts)
        ]
        self.acceptance = Acceptance.none(self.size - 1)
        # The drafted blocks of a forward lie in front of the cached text.
        self.scratch = self.size * self.size
        capacity = self.scratch + window + self.size
        self.cache = KVCache(model.cfg, len(self.rows), capacity, self.device)
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.zero_()  # keys that nobody sees may hold no NaN

    def keep(self, alive: Sequence[int]) -> None:
        """Go on with the given rows alone."""
        self.rows = [self.rows[i] for i in alive]
        self.cache.keep(torch.tensor(alive, dtype=torch.int64, device=self.device))

    def step(self) -> list[list[int]]:
        """Run one forward; returns the new tokens of every row, at least one each."""
        for index, row in enumerate(self.rows):
            start = window_start(len(row.ids), 1, self.window)
            if row.window != start:
                self._fill(index, row, start)
        features = self._forward()
        clean, noised = features.split([self.size, self.scratch], dim=1)
        logits = self._logits(clean)
        probs = distribution(logits, self.cfg)
        log_z = torch.logsumexp(logits, -1)
        new = []
        for index, row in enumerate(self.rows):
            own = slice(index * self.size, (index + 1) * self.size)
            tokens = self._accept(row, logits[own], Distribution(*(x[own] for x in probs)))
            place = torch.arange(len(tokens), device=self.device)
            picked = logits[own][place, torch.tensor(tokens, device=self.device)]
            row.log_prob += float((picked.double() - log_z[own][: len(tokens)].double()).sum())
            new.append(tokens)
        self._draft(noised, [len(tokens) - 1 for tokens in new])
        return new

    def _fill(self, index: int, row: SpeculativeRow, start: int) -> None:
        """Fill the cache of a row with its known tokens of the window but the last."""
        row.window = start
        context = self._context(row)
        if not context:
            return
        ids = torch.tensor([context], device=self.device)
        filled = KVCache(self.model.cfg, 1, len(context), self.device, self.cache.k[0].dtype)
        self.model.encode(ids, 1, select=ids.new_empty(0), cache=filled, commit=len(context))
        here = slice(self.scratch, self.scratch + len(context))
        for mine, new in zip((*self.cache.k, *self.cache.v), (*filled.k, *filled.v), strict=True):
            mine[index, :, here] = new[0]
        row.nfe += 1
        row.fills += 1

    def _context(self, row: SpeculativeRow) -> list[int]:
        """Known tokens of the row's window but the last."""
        assert row.window is not None
        return [self.bos_id, *row.ids[row.window + 1 : -1]][: len(row.ids) - 1 - row.window]

    def _forward(self) -> Tensor:
        """Features [B, S + S², D]: the clean tokens, then the noised blocks."""
        size, mask_id = self.size, self.system.mask_id
        ids, known = [], []
        for row in self.rows:
            assert row.window is not None
            last = self.bos_id if len(row.ids) - 1 == row.window else row.ids[-1]
            tokens = [last, *row.drafts]
            ids.append(tokens + [mask_id] * (size - len(tokens) + self.scratch))
            known.append(len(row.ids) - row.window)
            row.nfe += 1
        given = torch.tensor(ids, device=self.device)
        n = torch.tensor(known, dtype=torch.int64, device=self.device)[:, None]
        index = torch.arange(size, device=self.device)
        at_clean = n - 1 + index  # [B, S]
        copy = index.repeat_interleave(size)  # drafts accepted before each noised block
        at_noised = n + copy + index.repeat(size)  # [B, S²]
        slots = torch.arange(self.scratch, device=self.device).expand(len(ids), -1)
        noised_lo = (copy * size).expand(len(ids), -1)
        nothing = torch.zeros_like(at_clean)
        intervals = (
            torch.cat([nothing, torch.zeros_like(at_noised)], 1),
            torch.cat([at_clean + 1, n + copy], 1),
            torch.cat([nothing, noised_lo], 1),
            torch.cat([nothing, noised_lo + size], 1),
        )
        mask = RangeMask(Intervals(*(bound.int() for bound in intervals)), self.scratch)
        return self.model.encode_ranges(
            given,
            torch.cat([at_clean, at_noised], 1),
            torch.cat([self.scratch + at_clean, slots], 1),
            mask,
            self.cache,
            partial(self._tokens_before, given[:, :size]),
        )

    def _tokens_before(self, tokens: Tensor, count: int) -> Tensor:
        """The N tokens before each of a forward, [B, S + S², N].

        Args:
            tokens: the last known token and the drafts of every row [B, S].
            count: N.
        """
        earlier = torch.full((len(self.rows), count), NOTHING)
        for index, row in enumerate(self.rows):
            context = self._context(row)[-count:]
            if context:
                earlier[index, -len(context) :] = torch.tensor(context)
        line = torch.cat([earlier.to(self.device), tokens], dim=1)
        masks = line.new_full((len(line), self.size), self.system.mask_id)
        runs = [line] + [
            torch.cat([line[:, : count + 1 + accepted], masks], dim=1)
            for accepted in range(self.size)
        ]
        return torch.cat([tokens_before(run, count)[:, -self.size :] for run in runs], dim=1)

    def _logits(self, features: Tensor) -> Tensor:
        return self.system.logits(self.model, features.flatten(0, -2))

    def _most(self, row: SpeculativeRow) -> int:
        """Drafts that may be accepted: the token after them is in the same window and the text."""
        most = min(len(row.drafts), row.limit - len(row.ids) - 1)
        while most and window_start(len(row.ids) + most, 1, self.window) != row.window:
            most -= 1
        return most

    def _accept(self, row: SpeculativeRow, logits: Tensor, probs: Distribution) -> list[int]:
        """Verify the drafts of a row in order, and draw the token after the accepted ones."""
        found, accepted = self.acceptance, 0
        rest = None
        for place, token in enumerate(row.drafts[: self._most(row)]):
            assert row.drafted_from is not None
            p, q = probs.row(place), row.drafted_from.row(place)
            found.tried[place] += 1
            found.overlap[place] += float(torch.minimum(p, q).sum())
            if row.uniforms.random() * float(q[token]) >= float(p[token]):
                rest = (p - q).clamp(min=0)
                break
            found.accepted[place] += 1
            accepted += 1
        uniform = torch.tensor([row.uniforms.random()], dtype=torch.float64, device=self.device)
        if rest is not None and bool(rest.any()):
            last = invert(rest[None], uniform)
        else:
            last, _ = draw(logits[accepted : accepted + 1], uniform, self.cfg)
        tokens = [*row.drafts[:accepted], int(last)]
        if self.eos_id in tokens:  # an autoregressive model draws nothing after it
            tokens = tokens[: tokens.index(self.eos_id) + 1]
        row.ids += tokens
        found.forwards += 1
        found.tokens += len(tokens)
        return tokens

    def _draft(self, noised: Tensor, accepted: list[int]) -> None:
        """Draw the next drafts of every row from the block behind its accepted ones."""
        drafts = self.size - 1
        if drafts == 0:
            return
        blocks = noised.unflatten(1, (self.size, self.size))
        every = torch.arange(len(accepted), device=self.device)
        chosen = blocks[every, torch.tensor(accepted, device=self.device), 1:]  # [B, S-1, D]
        logits = self._logits(chosen)
        probs = distribution(logits, self.cfg)
        uniforms = np.concatenate([row.uniforms.random(drafts) for row in self.rows])
        drawn, _ = draw(logits, torch.from_numpy(uniforms).to(self.device), self.cfg)
        tokens = drawn.view(-1, drafts).tolist()
        for index, row in enumerate(self.rows):
            own = slice(index * drafts, (index + 1) * drafts)
            row.drafts = tokens[index]
            row.drafted_from = Distribution(*(x[own] for x in probs))


def _uniforms(seed: int, row: int) -> np.random.Generator:
    """Random numbers of a row, a function of (seed, row number) alone."""
    bits = np.random.Philox(key=[seed % (1 << 64), row], counter=[0, 0, 2, 0])
    return np.random.Generator(bits)
