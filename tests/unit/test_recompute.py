"""Computing activations again in the backward pass changes no gradient, dropout included."""

import pytest
import torch

from bd3lm.config import NoiseConfig
from bd3lm.data import Loader, Rows
from bd3lm.systems.block_diffusion import BlockDiffusion
from tests.conftest import MASK_ID, tiny_model, token_arrays


@pytest.mark.parametrize("block_size", [4, 16])
def test_gradients_are_the_same(block_size):
    rows = Rows(token_arrays(500), seq_len=16, block_size=block_size)
    system = BlockDiffusion(block_size, MASK_ID, NoiseConfig())
    batch = Loader(rows, 3, 1).batch(0, system.noise(0))
    model = tiny_model(dropout=0.3, cond_width=8).train()
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        torch.manual_seed(5)
        loss = system.loss(model, batch)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
