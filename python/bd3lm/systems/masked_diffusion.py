"""Masked diffusion over the whole row: block diffusion with one block (MATH §5)."""

from __future__ import annotations

from bd3lm.systems.block_diffusion import BlockDiffusion


class MaskedDiffusion(BlockDiffusion):
    """MDLM: S = L, so there is no clean stream and attention is full.

    That is all that tells it from a BD3-LM of the same block size: weights, loss, likelihood and
    samples are the same functions.
    """

    name = "mdlm"
