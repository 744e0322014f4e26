"""Identities of the Transformer: they hold for any weights."""

import pytest
import torch

from bd3lm.config import ModelConfig
from bd3lm.model import KVCache, Transformer
from tests.conftest import MASK_ID, VOCAB_SIZE, random_ids, tiny_model

SHAPES = [
    {},
    {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "kv_heads": 1, "mlp_bias": False},
    {"cond_width": 8, "mlp": "relu2"},
    {"cond_width": 8, "time_conditioning": True, "tied_embeddings": True},
    {"clean_stream": "causal", "qk_norm": True, "embed_norm": True},
    {"clean_stream": "causal", "previous_tokens": 2},
    {"previous_tokens": 5},
]
MODELS = pytest.mark.parametrize("changes", SHAPES)


def everywhere(ids):
    return torch.arange(ids.numel())


def noised(x0, seed=3):
    mask = torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[:, 0] = False
    return torch.where(mask, MASK_ID, x0)


@MODELS
@pytest.mark.parametrize("block_size", [1, 2, 4, 6])
def test_denoise_is_encode_of_clean_blocks_and_one_noised(changes, block_size):
    """Block b of denoise = the last block of encode([x0 of blocks < b, xt of block b])."""
    model, length = tiny_model(**changes), 12
    x0 = random_ids(2, length)
    xt = noised(x0)
    together = model.denoise(xt, x0, block_size, everywhere(x0)).view(2, length, -1)
    for start in range(0, length, block_size):
        stop = start + block_size
        ids = torch.cat([x0[:, :start], xt[:, start:stop]], dim=1)
        alone = model.encode(ids, block_size)[:, start:]
        torch.testing.assert_close(together[:, start:stop], alone, rtol=1e-5, atol=1e-5)


@MODELS
def test_one_block_is_full_attention_without_a_clean_stream(changes):
    model = tiny_model(**changes)
    x0 = random_ids(2, 8)
    xt = noised(x0)
    with_clean = model.denoise(xt, x0, 8, everywhere(x0)).view(2, 8, -1)
    torch.testing.assert_close(with_clean, model.encode(xt, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [*SHAPES, {"token_shift": True, "clean_stream": "causal"}])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_views_that_share_a_clean_stream_are_rows_of_their_own(changes, documents, recompute):
    """Features and gradients, those of clean positions included."""
    model, length = tiny_model(**changes).train(), 12
    model.recompute = recompute
    x0 = random_ids(2, length)
    xt = torch.cat([noised(x0, seed) for seed in (1, 2, 3)])
    doc_ids = None
    if documents:
        doc_ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 10 + [-1] * 2], dtype=torch.int32)
    select, predict = torch.tensor([1, 6, 13, 30, 37, 50, 71]), torch.tensor([0, 5, 20])
    repeated = None if doc_ids is None else doc_ids.repeat(3, 1)
    sigma = torch.rand(6, 3) if model.time else None
    found = []
    for clean, docs in ((x0, doc_ids), (x0.repeat(3, 1), repeated)):
        model.zero_grad()
        features = model.denoise(xt, clean, 4, select, doc_ids=docs, sigma=sigma)
        both = model.denoise_and_predict(xt, clean, 4, select, predict, doc_ids=docs, sigma=sigma)
        weight = torch.linspace(-1, 1, both.numel()).view_as(both)
        ((both * weight).sum() + features.square().sum()).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((features, both, *grads))
    for shared, own in zip(*found, strict=True):
        torch.testing.assert_close(shared, own, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="multiple of the 2 of x0"):
        model.denoise(xt[:5], x0, 4, select[:4])


@MODELS
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_cached_equals_uncached(changes, block_size):
    model, length = tiny_model(**changes), 12
    ids = random_ids(3, length)
    whole = model.encode(ids, block_size)
    cache = KVCache(model.cfg, 3, length, ids.device)
    parts = []
    # Two blocks a call where they fit, and a first pass that is thrown away.
    for start in range(0, length, 2 * block_size):
        part = ids[:, start : start + 2 * block_size]
        model.encode(part.flip(1), block_size, cache=cache)
        # Without a cache the last block is not clean; with a causal clean stream that differs.
        last = start + 2 * block_size >= length
        left = block_size if model.cfg.causal_clean and last else 0
        parts.append(model.encode(part, block_size, cache=cache, commit=part.shape[1] - left))
    assert cache.length == length - left
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@MODELS
@pytest.mark.parametrize("block_size", [1, 4])
def test_scoring_through_the_clean_cache_equals_denoise(changes, block_size):
    model = tiny_model(**changes)
    x0 = random_ids(2, 8)
    nothing = torch.empty(0, dtype=torch.int64)
    clean = KVCache(model.cfg, 2, 8, x0.device)
    model.encode(x0, block_size, select=nothing, cache=clean, commit=8)
    for seed in (1, 2):
        xt = noised(x0, seed)
        expected = model.denoise(xt, x0, block_size, everywhere(x0))
        got = model.denoise_cached(xt, clean, block_size, everywhere(x0))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@MODELS
def test_selection_is_indexing(changes):
    model = tiny_model(**changes)
    x0 = random_ids(2, 8)
    xt, select = noised(x0), torch.tensor([1, 6, 9, 15])
    whole = model.denoise(xt, x0, 4, everywhere(x0))
    torch.testing.assert_close(model.denoise(xt, x0, 4, select), whole[select])
    whole = model.encode(x0, 4).flatten(0, 1)
    torch.testing.assert_close(model.encode(x0, 4, select=select), whole[select])


@pytest.mark.parametrize("previous", [0, 2])
def test_documents_do_not_see_each_other(previous):
    model = tiny_model(previous_tokens=previous)
    first, second = random_ids(1, 8, seed=1), random_ids(1, 8, seed=2)
    both = torch.cat([first, second], dim=1)
    doc_ids = torch.tensor([[0] * 8 + [1] * 8], dtype=torch.int32)
    xt = noised(both)
    joined = model.denoise(xt, both, 4, everywhere(both), doc_ids=doc_ids)
    # Rotary positions are relative, so the second document may start anywhere.
    for part, ids in enumerate((first, second)):
        span = slice(8 * part, 8 * part + 8)
        alone = model.denoise(xt[:, span], ids, 4, everywhere(ids))
        torch.testing.assert_close(joined[span], alone, rtol=1e-4, atol=1e-4)


def test_padding_is_never_a_key():
    model = tiny_model()
    x0 = random_ids(1, 8)
    xt = noised(x0)
    doc_ids = torch.tensor([[0] * 6 + [-1] * 2], dtype=torch.int32)
    live = torch.arange(6)
    before = model.denoise(xt, x0, 4, live, doc_ids=doc_ids)
    x0[:, 6:], xt[:, 6:] = 7, 9
    assert torch.equal(model.denoise(xt, x0, 4, live, doc_ids=doc_ids), before)
    assert before.isfinite().all()


@pytest.mark.parametrize("previous", [0, 2])
def test_the_future_is_unseen(previous):
    model = tiny_model(previous_tokens=previous)
    x0 = random_ids(1, 8)
    xt = noised(x0)
    early = model.denoise(xt, x0, 4, torch.arange(4))
    x0[:, 4:], xt[:, 4:] = 3, 3
    assert torch.equal(model.denoise(xt, x0, 4, torch.arange(4)), early)


def test_time_conditioning_matters_only_where_it_is_on():
    x0 = random_ids(1, 8)
    xt, sigma = noised(x0), torch.tensor([[0.3, 2.0]])
    on, off = tiny_model(cond_width=8, time_conditioning=True), tiny_model(cond_width=8)
    for model, changes in ((on, True), (off, False)):
        plain = model.denoise(xt, x0, 4, everywhere(x0))
        told = model.denoise(xt, x0, 4, everywhere(x0), sigma=sigma)
        assert torch.equal(plain, told) != changes


def test_presets_have_the_paper_shapes():
    """Parameters without embeddings and head, by the arithmetic of docs/protocol.md's shapes."""
    from bd3lm.config import preset

    for name, width, depth, cond in (("tiny", 256, 8, 64), ("small", 768, 12, 128)):
        cfg = preset(name).model
        model = Transformer(cfg, VOCAB_SIZE)
        layer = 4 * width**2 + 8 * width**2 + 5 * width + 2 * width + 6 * width * (cond + 1)
        time = 256 * cond + cond + cond * cond + cond
        ends = width + 2 * width * (cond + 1) + VOCAB_SIZE * (2 * width + 1)
        assert sum(p.numel() for p in model.parameters()) == depth * layer + time + ends


def test_fresh_model_is_uniform():
    model = Transformer(ModelConfig(width=16, depth=2, heads=2), VOCAB_SIZE)
    logits = model.logits(model.encode(random_ids(1, 8), 4))
    assert torch.equal(logits, torch.zeros_like(logits))


def test_sampling_first_does_not_spoil_training():
    model = tiny_model()
    x0 = random_ids(1, 8)
    with torch.inference_mode():
        model.denoise(x0, x0, 4, everywhere(x0))
    model.denoise(x0, x0, 4, everywhere(x0)).sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0
