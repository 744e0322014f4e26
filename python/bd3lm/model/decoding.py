"""One forward of block decoding with fixed shapes and addresses, which a GPU can replay.

A forward of a few tokens is hundreds of small kernels, and a host launches them more slowly than a
GPU runs them. Here all inputs of a forward, its position included, lie in buffers on the device. On
CUDA the forward is recorded once as a graph and replayed by one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bd3lm.model.layers import KVCache
from bd3lm.model.transformer import Transformer


class DecodeStep:
    """``logits(model.encode(ids, ..., cache=cache))`` in a form that can be replayed.

    On CUDA a graph is recorded when a shape is first seen; elsewhere the same forward runs as it
    is. Recording has never been run on a GPU (docs/gpu.md).

    Args:
        model: in evaluation mode; its weights may change, but not move.
        cache: others may fill it between calls. :meth:`KVCache.keep` gives it new tensors, after
            which it needs a new step.
        block_size: S.
        logits: from features [M, D] to scores [M, V].
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        block_size: int,
        logits: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.cache, self.block_size, self.logits = model, cache, block_size, logits
        self._forwards: dict[tuple[int, ...], StaticForward] = {}
        # Graphs of one pool share the memory of intermediate values: only one replays at a time.
        self.pool = torch.cuda.graph_pool_handle() if cache.k[0].is_cuda else None

    def __call__(
        self, ids: Tensor, select: Tensor, *, commit: int = 0, sigma: Tensor | None = None
    ) -> Tensor:
        """Run one forward; nothing is read back from the device.

        Args:
            ids: [B, T], the positions after the cached ones.
            select: flat indices b*T+i of the positions to predict [M].
            commit: how many of the T positions to keep in the cache.
            sigma: -log(alpha) of every block of ``ids``, for time-conditioned models.

        Returns:
            [M, V]; the next call of these shapes may overwrite it.

        Raises:
            ValueError: positions past the cache's capacity. On a GPU they would be written out of
                bounds, which no later call of the process survives.
        """
        end = self.cache.length + ids.shape[1]
        if end > self.cache.capacity:
            raise ValueError(
                f"{ids.shape[1]} positions after {self.cache.length} cached ones need a capacity "
                f"of {end}; the cache's is {self.cache.capacity}"
            )
        shape = (*ids.shape, *select.shape, commit)
        if shape not in self._forwards:
            self._forwards[shape] = StaticForward(self, ids, select, sigma, commit)
        scores = self._forwards[shape].run(ids, select, sigma, self.cache.length)
        self.cache.length += commit
        return scores


class StaticForward:
    """The forward of one shape: buffers, and on CUDA the graph over them."""

    def __init__(
        self, step: DecodeStep, ids: Tensor, select: Tensor, sigma: Tensor | None, commit: int
    ) -> None:
        self.step, self.commit = step, commit
        self.ids, self.select = torch.empty_like(ids), torch.empty_like(select)
        self.sigma = None if sigma is None else torch.empty_like(sigma)
        self.start = torch.zeros((), dtype=torch.int64, device=ids.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.scores: Tensor | None = None

    def run(self, ids: Tensor, select: Tensor, sigma: Tensor | None, start: int) -> Tensor:
        """Fill the buffers and go; arguments as of :class:`DecodeStep`, ``start`` positions in."""
        self.ids.copy_(ids, non_blocking=True)
        self.select.copy_(select, non_blocking=True)
        self.start.fill_(start)
        if self.sigma is not None and sigma is not None:
            self.sigma.copy_(sigma, non_blocking=True)
        if not self.ids.is_cuda:
            return self.forward()
        if self.graph is None:
            self.graph = self._record()
        self.graph.replay()
        assert self.scores is not None
        return self.scores

    def forward(self) -> Tensor:
        """Scores [M, V], a function of the buffers, the weights and the cache alone."""
        step = self.step
        features = step.model.encode_at(
            self.ids,
            self.start,
            step.block_size,
            self.select,
            step.cache,
            commit=self.commit,
            sigma=self.sigma,
        )
        return step.logits(features)

    def _record(self) -> torch.cuda.CUDAGraph:
        """Run once on the side, since kernels compile when they are first used; then record."""
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        # Weights that autocast has cast and kept would be gone when the graph is replayed.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            side.wait_stream(main)
            with torch.cuda.stream(side):
                self.forward()
            main.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.step.pool):
                self.scores = self.forward()
        return graph
