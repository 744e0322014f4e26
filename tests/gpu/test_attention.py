"""The oracle on a real GPU: every backend there against float64, forward and gradient.

Never run so far: no GPU was at hand when this was written (docs/gpu.md).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bd3lm.config import ModelConfig
from bd3lm.model import DecodeStep, KVCache, Transformer
from bd3lm.model.attention import BACKENDS, BlockMask, attend
from bd3lm.model.attention.triton import paged_attention, triton_attention

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and this machine has none"
)

DOCUMENTS = torch.tensor([[0] * 211 + [1] * 319 + [-1] * 107, [5] * 637], dtype=torch.int32)
MASKS = {
    "training": BlockMask.training(637, 5),
    "training, S=16": BlockMask.training(1024, 16),
    "training, S=L": BlockMask.training(300, 300),
    "training, documents": BlockMask.training(637, 4, DOCUMENTS),
    "denoise": BlockMask.denoise(637, 64),
    "denoise, S=L": BlockMask.denoise(256, 256),
    "clean, S=1": BlockMask.clean(637, 1),
    "clean, S=L": BlockMask.clean(637, 637),
    "clean, documents": BlockMask.clean(637, 6, DOCUMENTS),
    "clean, cached": BlockMask.clean(1100, 4, first=1096),
    "clean, fused commit": BlockMask.clean(1104, 8, first=1088),
}
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(mask: BlockMask, width: int, dtype: torch.dtype, grad: bool) -> list[Tensor]:
    torch.manual_seed(mask.seq_len + mask.block_size)
    batch = 1 if mask.doc_ids is None else mask.doc_ids.shape[0]
    shapes = [(4, mask.num_queries), (2, mask.num_keys), (2, mask.num_keys)]
    return [
        torch.randn(batch, h, t, width, device="cuda", dtype=dtype, requires_grad=grad)
        for h, t in shapes
    ]


def close(found: Tensor, wanted: Tensor, limit: float) -> None:
    assert found.isfinite().all()
    assert (found.double() - wanted).abs().max() <= limit * wanted.abs().max()


QUICK = [
    ("triton", torch.bfloat16, 64),
    ("hopper", torch.bfloat16, 64),
    ("flex", torch.bfloat16, 64),
    ("flex-fa4", torch.bfloat16, 64),
    ("dense", torch.float32, 64),
]
EVERY = [
    (backend, dtype, width)
    for backend, dtype, width in itertools.product(
        sorted(BACKENDS), LIMITS, (32, 40, 64, 80, 128, 192, 256)
    )
    if (backend, dtype, width) not in QUICK
]


@pytest.mark.parametrize(("backend", "dtype", "width"), QUICK, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_equals_float64(name: str, width: int, dtype: torch.dtype, backend: str) -> None:
    check_against_float64(name, width, dtype, backend)


@pytest.mark.slow  # each dtype and width compiles anew: spread them, e.g. by pytest-xdist
@pytest.mark.parametrize(("backend", "dtype", "width"), EVERY, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_width_equals_float64(
    name: str, width: int, dtype: torch.dtype, backend: str
) -> None:
    check_against_float64(name, width, dtype, backend)


def check_against_float64(name: str, width: int, dtype: torch.dtype, backend: str) -> None:
    """Output and gradients of one backend on one mask."""
    mask = MASKS[name]
    mine = inputs(mask, width, dtype, grad=True)
    found = BACKENDS[backend]
    if not found.available():
        pytest.skip(f"{backend} {found.needs}")
    if not found.supports(*mine, mask):
        pytest.skip(f"{backend} {found.limits}")
    theirs = [x.detach().double().requires_grad_() for x in mine]
    out = attend(*mine, mask, backend=backend)
    wanted = attend(*theirs, mask, backend="dense")
    close(out, wanted.detach(), LIMITS[dtype])
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, mine, dout)
    for a, b in zip(gradients, torch.autograd.grad(wanted, theirs, dout.double()), strict=True):
        close(a, b, 2 * LIMITS[dtype])


@pytest.mark.parametrize("name", ["clean, cached", "clean, fused commit"])
def test_split_decoding_equals_float64(name: str) -> None:
    mask = MASKS[name]
    mine = inputs(mask, 64, torch.bfloat16, grad=False)
    wanted = attend(*(x.double() for x in mine), mask, backend="dense")
    close(attend(*mine, mask, backend="triton"), wanted, 1e-2)


def test_paged_cache_equals_rows_on_their_own() -> None:
    torch.manual_seed(0)
    page, block, rows = 16, 8, 16
    lengths = torch.tensor([700, 32, 1024], dtype=torch.int32, device="cuda")
    pages = torch.randperm(3 * 64, device="cuda").int().view(3, 64)
    pool = [torch.randn(3 * 64, 2, page, 64, device="cuda").bfloat16() for _ in range(2)]
    q = torch.randn(3, 8, rows, 64, device="cuda").bfloat16()
    found = paged_attention(q, *pool, pages, lengths, block)
    for row, length in enumerate(lengths.tolist()):
        k, v = (
            x[pages[row].long()].transpose(0, 1).flatten(1, 2)[None, :, :length].double()
            for x in pool
        )
        mask = BlockMask.clean(length, block, first=length - rows)
        wanted = attend(q[row : row + 1].double(), k, v, mask, backend="dense")
        close(found[row : row + 1], wanted, 1e-2)


def test_same_bits_every_time() -> None:
    mask = MASKS["training, documents"]
    results = []
    for _ in range(3):
        q, k, v = inputs(mask, 64, torch.bfloat16, grad=True)
        out = triton_attention(q, k, v, mask)
        results.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_compiled_and_checkpointed_equal_eager() -> None:
    mask = MASKS["training"]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton_attention(q * 2, k, v, mask).float().square().mean()

    def gradients(run: object) -> list[Tensor]:
        mine = inputs(mask, 64, torch.bfloat16, grad=True)
        return list(torch.autograd.grad(run(*mine), mine))  # type: ignore[operator]

    wanted = gradients(loss)
    for run in (
        torch.compile(loss, fullgraph=True),
        lambda *qkv: checkpoint(loss, *qkv, use_reentrant=False),
    ):
        for a, b in zip(gradients(run), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


def test_a_decoding_step_is_captured_as_a_graph() -> None:
    torch.manual_seed(0)
    pages = torch.arange(64, device="cuda").int().view(1, 64)
    pool = [torch.randn(64, 2, 16, 64, device="cuda").bfloat16() for _ in range(2)]
    q = torch.randn(1, 8, 4, 64, device="cuda").bfloat16()
    lengths = torch.tensor([100], dtype=torch.int32, device="cuda")
    paged_attention(q, *pool, pages, lengths, 4)  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, *pool, pages, lengths, 4)
    lengths.fill_(900)
    graph.replay()
    assert torch.equal(out, paged_attention(q, *pool, pages, lengths, 4))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_forward_equals_encode(precision: str) -> None:
    block, rows, device = 4, 3, torch.device("cuda")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(width=128, depth=2, heads=2), 50).to(device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(50, (rows, 1024), device=device)
    every = torch.arange(rows * block, device=device)
    last = every // block * 2 * block + block + every % block
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), autocast:
        mine, theirs = (KVCache(model.cfg, rows, 1024, device) for _ in range(2))
        for cache in (mine, theirs):
            model.encode(ids[:, :600], block, select=every[:0], cache=cache, commit=600)
        step = DecodeStep(model, mine, block, model.logits)
        for _ in range(3):
            for length, select, commit in ((2 * block, last, block), (block, every, 0)):
                now = ids[:, mine.length : mine.length + length]
                found = step(now, select, commit=commit).clone()
                features = model.encode(now, block, select=select, cache=theirs, commit=commit)
                close(found, model.logits(features).double(), LIMITS[torch.bfloat16])


def test_more_pairs_of_row_and_head_than_a_grid_is_high() -> None:
    mask = BlockMask.clean(16, 4)
    q, k, v = (torch.randn(8200, 8, 16, 64, device="cuda").bfloat16() for _ in range(3))
    found = attend(q, k, v, mask, backend="triton")
    wanted = attend(q.float(), k.float(), v.float(), mask, backend="dense")
    close(found, wanted.double(), 1e-2)
