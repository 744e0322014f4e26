"""Masked diffusion over the whole row: block diffusion with one block (docs/math.md §5)."""

from __future__ import annotations

from bd3lm.systems.block_diffusion import BlockDiffusion


class MaskedDiffusion(BlockDiffusion):
    """MDLM: S = L, so attention is full and there is no clean stream.

    Weights, loss, likelihood and samples are those of a BD3-LM with that block size.
    """

    name = "mdlm"
