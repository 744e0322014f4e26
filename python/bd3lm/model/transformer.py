"""The one Transformer: a denoiser over an xt and an x0 stream, a scorer, and a cached decoder.

Shapes: B batch, T rows of the residual stream, L sequence, S block, D width, H heads,
Dh head width, M selected positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bd3lm.config import ModelConfig, check
from bd3lm.model.adaptive import adaptive_logits, new_clusters, ranges
from bd3lm.model.attention import BlockMask, CachedMask, RangeMask, attend
from bd3lm.model.attention.mask import before_last
from bd3lm.model.block import Block, one_modulation, pick
from bd3lm.model.layers import CacheAt, CacheSlots, KVCache, Norm, TimeEmbedding
from bd3lm.model.previous import PreviousTokens, tokens_before
from bd3lm.model.rotary import Rotary
from bd3lm.model.streams import at_starts, noised_rows, several_views, two_streams

COMPILER = "inductor"
"""Backend of ``torch.compile`` for the blocks of a training step."""


def _forward(compiled: Callable[..., Tensor], block: Block, *args: Any, **options: Any) -> Tensor:
    """Run a block, compiled in training steps."""
    if not (block.training and torch.is_grad_enabled()):
        return Block.forward(block, *args, **options)
    if options.get("select") is not None:
        torch._dynamo.maybe_mark_dynamic(options["select"], 0)
    return compiled(block, *args, **options)


def wants_last_clean(device: torch.device) -> bool:
    """Return whether the last clean block is computed, although no query sees it.

    GPU kernels need streams of equal length.
    """
    return device.type != "cpu"


def _padded_vocab(cfg: ModelConfig, ids: int) -> int:
    """V, padded where the settings say so."""
    if cfg.vocab_size is None:
        return ids
    allowed = f"at least {ids}, the tokenizer's ids with the mask token"
    check(cfg.vocab_size >= ids, "model.vocab-size", cfg.vocab_size, allowed)
    return cfg.vocab_size


class Transformer(nn.Module):
    """Transformer over token ids, bidirectional within a block and causal over blocks.

    It runs in three ways with the same weights. :meth:`denoise` runs the noised and the clean
    stream together, for training. :meth:`encode` runs one block-causal stream, optionally through
    a KV cache, for full attention, prefill and decoding. :meth:`denoise_cached` scores many noised
    versions of the same clean rows. Each returns normalised features, which :meth:`logits` maps to
    scores; :meth:`forward` does both.

    With ``cfg.token_shift`` the methods that take a noised stream give for a position the features
    of the position before it, from which its token is predicted.

    Args:
        cfg: the shape.
        vocab_size: ids in use, the mask token included; V where ``cfg.vocab_size`` is None.

    Raises:
        ConfigError: more ids than ``cfg.vocab_size``.
    """

    def __init__(self, cfg: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        vocab_size = _padded_vocab(cfg, vocab_size)
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.recompute = False  # activation checkpointing in denoise and encode
        self.compiles_blocks = False
        """Whether training steps run compiled blocks."""
        self.embed = nn.Embedding(vocab_size, cfg.width)
        self.previous = None
        if cfg.previous_tokens:
            self.previous = PreviousTokens(cfg.previous_tokens, cfg.width)
        self.embed_norm = Norm(cfg.width, cfg.norm, cfg.norm_eps) if cfg.embed_norm else None
        self.time = TimeEmbedding(cfg.cond_width) if cfg.cond_width else None
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.depth))
        self.norm = Norm(cfg.width, cfg.norm, cfg.norm_eps)
        if cfg.cond_width:
            self.ada = nn.Linear(cfg.cond_width, 2 * cfg.width)
        self.head = nn.Linear(cfg.width, vocab_size, bias=cfg.head_bias)
        if cfg.tied_embeddings:
            self.head.weight = self.embed.weight
        self.cutoffs = tuple(c for c in cfg.softmax_cutoffs if c < vocab_size)
        self.clusters = None
        if self.cutoffs:
            self.clusters = new_clusters(cfg.width, self.cutoffs, vocab_size)
        self.rotary = Rotary(cfg.head_width, cfg.rope_theta, cfg.rope_scaling)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise embedding and head so that the prediction is uniform."""
        nn.init.normal_(self.embed.weight, std=0.02)
        if not self.cfg.tied_embeddings:
            nn.init.zeros_(self.head.weight)
        if self.cfg.head_bias:
            nn.init.zeros_(self.head.bias)
        if self.cfg.cond_width:
            nn.init.zeros_(self.ada.weight)
            nn.init.zeros_(self.ada.bias)

    @torch.no_grad()
    def start_from_counts(self, counts: Tensor) -> None:
        """Set the head's bias so that each token's probability is its frequency.

        One occurrence is added to each, so that no probability is zero.

        Args:
            counts: occurrences in the training text of each of the tokenizer's ids, at most V.
        """
        share = torch.ones(self.vocab_size, dtype=torch.float64)
        share[: len(counts)] += counts
        share *= (self.vocab_size - 1) / share.sum()  # a uniform distribution has biases of zero
        self.head.bias.copy_(share.log())
        if self.clusters is not None:
            spans = ranges(self.cutoffs, self.vocab_size)
            sums = torch.stack([share[low:high].sum() for low, high in spans])
            self.clusters.bias.copy_(sums.log())

    def use_attention(self, backend: str) -> Transformer:
        """Select the attention backend by name; ``auto`` takes the best available one."""
        for module in self.modules():
            if isinstance(module, Block):
                module.attention = backend
        return self

    def forward(
        self,
        ids: Tensor,
        block_size: int,
        *,
        x0: Tensor | None = None,
        select: Tensor | None = None,
        doc_ids: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Logits of a batch.

        Args:
            ids: [B, L], the mask id where a token is hidden.
            block_size: S. 1 is causal attention, L is full attention.
            x0: clean ids [B, L]; with them the blocks of ``ids`` see the clean blocks before them,
                as in training. None: they see the earlier blocks of ``ids``.
            select: flat indices b*L+i of the positions to predict [M]; None: all, in order.
            doc_ids: int32 [B, L]; attention stays inside a document.
            sigma: -log(alpha) of every block [B, K], for time-conditioned models.

        Without ``x0``, the logits of a position of a token-shifted model predict the next token.

        Returns:
            Unnormalised log-probabilities [B, L, V], or [M, V] with ``select``; the mask token has
            one like any other.
        """
        if x0 is None:
            features = self.encode(ids, block_size, select=select, doc_ids=doc_ids, sigma=sigma)
            return self.logits(features)
        every = torch.arange(ids.numel(), device=ids.device)
        chosen = every if select is None else select
        features = self.denoise(ids, x0, block_size, chosen, doc_ids=doc_ids, sigma=sigma)
        logits = self.logits(features)
        return logits.unflatten(0, ids.shape) if select is None else logits

    def denoise(
        self,
        xt: Tensor,
        x0: Tensor,
        block_size: int,
        select: Tensor,
        *,
        doc_ids: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Features of noised positions given the clean blocks before them (docs/math.md §7).

        Args:
            xt: noised ids [B, L]; or [n·B, L], n views of the rows one after the other, which share
                one clean stream.
            x0: clean ids [B, L].
            block_size: S.
            select: flat indices b*L+i of the positions of ``xt`` to predict [M].
            doc_ids: int32 [B, L]; attention stays inside a document.
            sigma: -log(alpha) of every block of ``xt`` [B, K], or [n·B, K]; for time-conditioned
                models.

        Returns:
            Normalised features [M, D].

        Raises:
            ValueError: the rows of ``xt`` are no multiple of those of ``x0``.
        """
        mask = self._training_mask(x0, block_size, doc_ids)
        if not wants_last_clean(x0.device):
            mask = mask.without_last_clean()
        if len(xt) != len(x0):
            return several_views(self, xt, x0, mask, sigma, select)
        if self.cfg.token_shift:
            return two_streams(self, xt, x0, mask, sigma, noised_rows(select, mask, shifted=True))
        return two_streams(self, xt, x0, mask, sigma, select, queries=x0.shape[1])

    def denoise_and_predict(
        self,
        xt: Tensor,
        x0: Tensor,
        block_size: int,
        select: Tensor,
        predict: Tensor,
        *,
        doc_ids: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Run :meth:`denoise`, and give features of clean positions too.

        With a causal clean stream those are what an autoregressive model predicts the next token
        from.

        Args:
            xt: noised ids [B, L], or [n·B, L] as for :meth:`denoise`.
            x0: clean ids [B, L].
            block_size: S.
            select: flat indices b*L+i of noised positions [M].
            predict: flat indices b*L+i of clean positions [N].
            doc_ids: as for :meth:`denoise`.
            sigma: as for :meth:`denoise`.

        Returns:
            Normalised features [M + N, D], those of noised positions first.

        Raises:
            ValueError: as for :meth:`denoise`.
        """
        seq_len = x0.shape[1]
        mask = self._training_mask(x0, block_size, doc_ids)
        if len(xt) != len(x0):
            return several_views(self, xt, x0, mask, sigma, select, predict)
        clean = predict + (predict.div(seq_len, rounding_mode="floor") + 1) * seq_len
        rows = torch.cat([noised_rows(select, mask, shifted=self.cfg.token_shift), clean])
        return two_streams(self, xt, x0, mask, sigma, rows)

    def _training_mask(self, x0: Tensor, block_size: int, doc_ids: Tensor | None) -> BlockMask:
        seq_len = x0.shape[1]
        causal_end = seq_len if self.cfg.causal_clean else 0
        return BlockMask.training(seq_len, block_size, doc_ids, causal_end=causal_end)

    def embedded(self, ids: Tensor, before: Callable[[int], Tensor]) -> Tensor:
        """Residual stream [..., D] before the first block.

        Args:
            ids: [...].
            before: from N to the ids of the N tokens before each [..., N]; called for models that
                read them.
        """
        h = self.embed(ids)
        if self.previous is not None:
            h = self.previous(h, self.embed, before(self.cfg.previous_tokens))
        return h if self.embed_norm is None else self.embed_norm(h)

    def encode(
        self,
        ids: Tensor,
        block_size: int,
        *,
        select: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        commit: int = 0,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Block-causal features of one stream; with a cache, of the positions after it.

        ``block_size=L`` is full attention, ``block_size=1`` causal. The call writes the keys and
        values of ``ids`` to the cache; the first ``commit`` positions stay there.

        Args:
            ids: [B, T].
            block_size: S; with a cache, its length is a multiple of S.
            select: flat indices b*T+i [M]; None keeps every position; an empty tensor with a
                cache only fills the cache.
            doc_ids: int32 [B, T]; attention stays inside a document (not with a cache).
            cache: keys and values of earlier positions.
            commit: number of the T positions to keep in the cache. They are clean, so with a
                causal clean stream they attend causally. Without a cache all blocks but the last
                are taken for clean.
            sigma: -log(alpha) of every block of ``ids``, for time-conditioned models; None: clean
                (sigma 0).

        Returns:
            Normalised features [B, T, D], or [M, D] with ``select``.
        """
        length = ids.shape[1]
        first = cache.length if cache is not None else 0
        cos, sin = self.rotary.table(first + length, ids.device)
        rope = (cos[first:], sin[first:])
        causal_end = 0
        if self.cfg.causal_clean:
            causal_end = before_last(length, block_size) if cache is None else first + commit
        mask = BlockMask.clean(
            first + length, block_size, doc_ids, first=first, causal_end=causal_end
        )
        cond = self.condition(sigma, block_size)
        fill = cache is not None and select is not None and select.numel() == 0
        if cache is None:
            h = self.embedded(ids, lambda count: tokens_before(ids, count, doc_ids))
        else:
            h = self.embedded(ids, partial(cache.tokens_before, ids, doc_ids=doc_ids))
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            h = self.run_block(
                block,
                h,
                mask,
                rope,
                cond,
                queries=0 if fill and last else None,
                select=select if last and not fill else None,
                cache=cache,
                layer=0 if cache is None else layer,  # a number is a constant of compiled code
            )
        if cache is not None:
            cache.length += commit
        return h if fill else self.normalised(h, cond, None, select)

    def encode_at(
        self,
        ids: Tensor,
        start: Tensor,
        block_size: int,
        select: Tensor,
        cache: KVCache,
        *,
        commit: int = 0,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Run :meth:`encode` with a cache whose length is held on the device.

        No shape, address or host value depends on that length, so a CUDA graph of the call can be
        replayed. ``cache.length`` is not read.

        Args:
            ids: [B, T].
            start: int64 [], the number of cached positions, a multiple of S.
            block_size: S.
            select: flat indices b*T+i [M].
            cache: receives the keys and values of ``ids`` after those of earlier positions.
            commit: number of leading positions of ``ids`` that are clean.
            sigma: as for :meth:`encode`.

        Returns:
            Normalised features [M, D].
        """
        length = ids.shape[1]
        index = torch.arange(length, device=ids.device)
        position = start + index
        last = ((position // block_size + 1) * block_size).minimum(start + length)
        if self.cfg.causal_clean:
            last = torch.where(index < commit, position + 1, last)
        mask = CachedMask(last.int()[None])
        table = self.rotary.table(cache.capacity, ids.device)
        rope = (table[0][position], table[1][position])
        cond = self.condition(sigma, block_size)
        here = CacheAt(cache, position)
        h = self.embedded(ids, partial(here.tokens_before, ids))
        for layer, block in enumerate(self.blocks):
            last_one = layer == len(self.blocks) - 1
            chosen = select if last_one else None
            h = block(h, mask, rope, cond, select=chosen, cache=here, layer=layer)
        return self.normalised(h, cond, None, select)

    def encode_ranges(
        self,
        ids: Tensor,
        position: Tensor,
        slot: Tensor,
        mask: RangeMask,
        cache: KVCache,
        before: Callable[[int], Tensor],
    ) -> Tensor:
        """Run rows whose positions, cache slots and visible slots differ from row to row.

        Args:
            ids: [B, T].
            position: of each token in its row, int64 [B, T].
            slot: of the cache, where its keys and values go, int64 [B, T].
            mask: slots that each token sees; the call writes its own first.
            cache: read as a whole; ``cache.length`` is not used.
            before: from N to the ids of the N tokens before each, the nearest first and -1 where
                there is none [B, T, N]; called for models that read them.

        Returns:
            Normalised features [B, T, D].
        """
        cos, sin = self.rotary.table(cache.capacity, ids.device)
        flat = position.flatten()
        rope = (cos[flat], sin[flat])
        cond = self.condition(None, 1)
        slots = CacheSlots(cache, slot)
        h = self.embedded(ids.flatten()[None], lambda count: before(count).flatten(0, 1)[None])
        for layer, block in enumerate(self.blocks):
            h = block(h, mask, rope, cond, cache=slots, layer=layer)
        return self.normalised(h, cond, None, None).view(*ids.shape, -1)

    def denoise_cached(
        self,
        xt: Tensor,
        clean: KVCache,
        block_size: int,
        select: Tensor,
        *,
        before: Tensor | None = None,
        doc_ids: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Run :meth:`denoise` with the keys and values of the clean stream read from a cache.

        Args:
            xt: noised ids [B, L].
            clean: cache filled by :meth:`encode` with all L positions of the clean rows.
            block_size: S.
            select: flat indices b*L+i [M].
            before: with ``cfg.token_shift``, features of the clean position before each block
                [B*K, D]; those before the first block are not read.
            doc_ids: int32 [B, L].
            sigma: [B, K], for time-conditioned models.

        Returns:
            Normalised features [M, D].
        """
        seq_len = xt.shape[1]
        rope = self.rotary.table(seq_len, xt.device)
        mask = BlockMask.denoise(seq_len, block_size, doc_ids)
        cond = self.condition(sigma, block_size)
        rows = (select - 1).clamp(min=0) if self.cfg.token_shift else select
        h = self.embedded(
            xt,
            lambda count: tokens_before(
                xt, count, doc_ids, clean=clean.read_tokens(seq_len), block_size=block_size
            ),
        )
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            past = clean.read(layer, seq_len)
            h = block(h, mask, rope, cond, select=rows if last else None, past=past)
        features = self.normalised(h, cond, None, rows)
        if before is None:
            return features
        return at_starts(features, before, select, block_size)

    def compile_blocks(self, on: bool = True) -> None:
        """Run the blocks of training steps through ``torch.compile``, or stop doing so.

        All blocks share one compiled function, and each shape is compiled once; the number of
        selected positions is symbolic, since it changes with every batch. Attention is left out:
        FlexAttention compiles itself, and the other backends are single operators. So are the hooks
        by which FSDP gathers a block before its forward.
        """
        self.compiles_blocks = on
        compiled = torch.compile(Block.forward, dynamic=False, backend=COMPILER) if on else None
        for block in self.blocks:
            assert isinstance(block, Block)
            for name in ("attend", "forward"):
                block.__dict__.pop(name, None)
            if compiled is not None:
                outside: Any = torch.compiler.disable(attend)
                block.attend = outside
                block.forward = partial(_forward, compiled, block)

    def run_block(self, block: nn.Module, *args: Any, **options: Any) -> Any:
        """Run one block, as :meth:`Block.forward`; checkpointed in training, if that is on."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, **options)
        return block(*args, **options)

    def logits(self, features: Tensor, without: int | None = None) -> Tensor:
        """Scores [..., V] of features [..., D].

        Args:
            features: normalised.
            without: id of the mask token, whose score is -inf. None: it has one like any other.
        """
        scores = self.head(features)
        if without is not None:
            scores[..., without] = -torch.inf
        if self.clusters is None:
            return scores
        return adaptive_logits(scores, self.clusters(features), self.cutoffs)

    def normalised(
        self, h: Tensor, cond: Tensor | None, queries: int | None, select: Tensor | None
    ) -> Tensor:
        """Normalise the output of the last block, of which only some rows may be left.

        Args:
            h: residual stream [B, T, D], or [M, D] with ``select``.
            cond: as given to the blocks.
            queries: as given to the last block.
            select: as given to the last block.
        """
        if cond is None:
            return self.norm(h)
        modulation = one_modulation(self.ada, cond).chunk(2, dim=-1)
        shift, scale = (pick(m, queries, select) for m in modulation)
        return self.norm(h, shift, scale)

    def condition(self, sigma: Tensor | None, block_size: int, *, clean: int = 0) -> Tensor | None:
        """Conditioning of every row: [1, 1, C] if it is constant, else [B, T, C].

        Args:
            sigma: -log(alpha) of every block [B, K]; None: clean.
            block_size: S.
            clean: number of rows of a clean stream after those of the blocks; their sigma is 0.
        """
        if self.time is None:
            return None
        if sigma is None or not self.cfg.time_conditioning:
            zero = torch.zeros(1, 1, device=self.embed.weight.device)
            with torch.autocast(zero.device.type, enabled=False):
                return F.silu(self.time(zero))
        sigma = sigma.repeat_interleave(block_size, dim=1)
        if clean:
            sigma = torch.cat([sigma, sigma.new_zeros(len(sigma), clean)], dim=1)
        return F.silu(self.time(sigma))
