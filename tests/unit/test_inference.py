"""A model prepared for decoding is the same function, and rows in it do not see each other."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bd3lm._core import attention_isas
from bd3lm.config import ModelConfig
from bd3lm.device import has_bf16
from bd3lm.errors import ConfigError
from bd3lm.model import KVCache, Transformer, for_inference, fused, inference, layers
from bd3lm.sample import Sampler
from bd3lm.systems import BlockDiffusion
from tests.conftest import MASK_ID, fake_gpu, random_ids, tiny_model
from tests.unit.test_sampler import config, sampler

SHAPES = [
    {},
    {"cond_width": 8},
    {"cond_width": 8, "norm": "rmsnorm", "mlp": "swiglu", "mlp_bias": False, "kv_heads": 1},
    {"cond_width": 8, "time_conditioning": True, "tied_embeddings": True, "qk_norm": True},
    {"mlp": "relu2", "qk_norm": True, "kv_heads": 1, "norm": "rmsnorm"},
    {"cond_width": 8, "embed_norm": True, "softmax_cutoffs": (3, 9)},
    {"previous_tokens": 3},
]


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_features_and_logits_are_the_models(changes):
    model, ids = tiny_model(**changes), random_ids(3, 12)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ready = for_inference(model)
    sigma = torch.full((3, 3), 0.7) if model.cfg.time_conditioning else None
    expected = model.logits(model.encode(ids, 4, sigma=sigma))
    found = ready.logits(ready.encode(ids, 4, sigma=sigma))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    # A model without conditioning on the level has no input for one.
    assert (ready.time is None) == (not model.cfg.time_conditioning)


@pytest.mark.parametrize("changes", SHAPES)
@torch.no_grad()
def test_through_the_cache_too(changes):
    """A prompt, a block, and a block with the one before it: features, keys and values."""
    model, ids = tiny_model(**changes), random_ids(3, 16)
    ready, nothing = for_inference(model), torch.empty(0, dtype=torch.int64)
    caches = [KVCache(m.cfg, 3, 20, torch.device("cpu")) for m in (model, ready)]
    calls = [(ids[:, :8], nothing, 8), (ids[:, 8:12], None, 0), (ids[:, 8:], torch.tensor([5]), 4)]
    for rows, select, commit in calls:
        expected, found = (
            m.encode(rows, 4, select=select, cache=cache, commit=commit)
            for m, cache in zip((model, ready), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    one, other = caches
    assert one.length == other.length == 12
    for a, b in zip((*one.k, *one.v), (*other.k, *other.v), strict=True):
        torch.testing.assert_close(b[:, :, :16], a[:, :, :16], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_one_level_for_all_positions():
    """One position of one row, as SEDD samples: the gate is a single vector there."""
    model, ids = tiny_model(cond_width=8, time_conditioning=True), random_ids(1, 12)
    sigma = torch.full((1, 1), 0.7)
    ready = for_inference(model)
    one = torch.tensor([3])
    expected = model.logits(model.encode(ids, 12, sigma=sigma, select=one))
    found = ready.logits(ready.encode(ids, 12, sigma=sigma, select=one))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_bf16_matrices_give_float32_logits_near_the_models():
    if "avx512bf16" not in attention_isas():
        with pytest.raises(ConfigError, match="no bf16 products"):
            for_inference(tiny_model(), torch.bfloat16)
        return
    model, ids = tiny_model(), random_ids(3, 12)
    ready = for_inference(model, torch.bfloat16)
    found, expected = ready.logits(ready.encode(ids, 4)), model.logits(model.encode(ids, 4))
    assert found.dtype == torch.float32
    error = (found - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.03


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        for_inference(tiny_model(), torch.float16)


@torch.inference_mode()
def test_a_row_alone_and_among_fifteen_has_the_same_bits():
    """Through the cache, in both dtypes where the processor has them."""
    dtypes = [torch.float32] + [torch.bfloat16] * has_bf16(torch.device("cpu"))
    ids = random_ids(16, 12)
    for dtype in dtypes:
        model = for_inference(tiny_model(width=64, heads=4, cond_width=8), dtype)

        def logits(rows, model=model):
            cache = KVCache(model.cfg, len(rows), 12, torch.device("cpu"))
            nothing = torch.empty(0, dtype=torch.int64)
            model.encode(rows[:, :8], 4, select=nothing, cache=cache, commit=8)
            return model.logits(model.encode(rows[:, 8:], 4, cache=cache))

        together = logits(ids)
        for row in range(16):
            assert torch.equal(logits(ids[row : row + 1])[0], together[row])


def test_samples_of_the_prepared_model_are_the_models_alone_and_in_a_batch():
    model = tiny_model(cond_width=8)
    ready = for_inference(model)
    cfg = config(length=37, top_p=0.9)
    plain = sampler(model).generate(cfg, [[]] * 16)
    found = sampler(ready).generate(cfg, [[]] * 16)
    assert [x.ids for x in found] == [x.ids for x in plain]
    for index in (0, 7, 15):
        alone = sampler(ready).generate(cfg, [[]], first=index)[0]
        assert (alone.ids, alone.log_prob) == (found[index].ids, found[index].log_prob)


class Syncs(TorchDispatchMode):
    """Counts operations after which the host waits for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        reads_mask = name == "index" and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        self.count += name in self.WAITS or reads_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"steps": 3}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_nothing_is_read_back_inside_a_block(changes):
    """float64 logits, as they are composed on other devices: the CPU's kernel reads them anyway."""

    class Wide(BlockDiffusion):
        def logits(self, model, features):
            return super().logits(model, features).double()

    s = Sampler(tiny_model(), Wide(4, MASK_ID), window=16, bos_id=0, eos_id=99)
    steps = s.stream(config(length=16, **changes), [[], [3, 4]], every_step=False)
    inside = []
    fill = s._fill_block

    def counted(state, *rest):
        with Syncs() as syncs:
            yield from fill(state, *rest)
        inside.append(syncs.count)

    s._fill_block = counted
    for _ in steps:
        pass
    assert inside == [0] * 4


def test_a_read_would_be_seen():
    with Syncs() as syncs:
        bool((torch.ones(3) > 0).all())
        torch.ones(3)[torch.tensor([True, False, True])]
    assert syncs.count == 2


def test_the_decode_step_is_one_graph():
    model = tiny_model(cond_width=8).eval()
    cache = KVCache(model.cfg, 2, 16, torch.device("cpu"))
    ids, select = random_ids(2, 8), torch.tensor([5, 14])

    def step(ids, select):
        return model.logits(model.encode(ids, 4, select=select, cache=cache))

    with torch.no_grad():
        expected = step(ids, select)
        found = torch.compile(step, backend="eager", fullgraph=True)(ids, select)
    torch.testing.assert_close(found, expected)


def test_autocast_around_it_changes_nothing():
    """Shifts and gates go into weights: rounded to bf16 they would spoil all of them."""
    model, ids = tiny_model(cond_width=8), random_ids(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = for_inference(model)
    outside = for_inference(model)
    with torch.no_grad():
        assert torch.equal(inside.encode(ids, 4), outside.encode(ids, 4))


@torch.no_grad()
def test_both_streams_run_too():
    model, ids = tiny_model(kv_heads=1), random_ids(2, 8)
    xt, select = torch.full_like(ids, MASK_ID), torch.tensor([1, 9])
    expected = model.denoise(xt, ids, 4, select)
    found = for_inference(model).denoise(xt, ids, 4, select)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"cond_width": 8}, {"tied_embeddings": True}])
def test_rounded_matrices_compute_what_autocast_does(changes, monkeypatch):
    """Bit for bit, on the code path of a GPU."""
    for module in (fused, layers):
        monkeypatch.setattr(module, "on_cpu", lambda *tensors: False)
    monkeypatch.setattr(inference, "_pack", lambda *_: None)
    monkeypatch.setattr(inference, "PackedBlock", lambda block: block)
    plain = for_inference(tiny_model(**changes))
    rounded = copy.deepcopy(plain)
    inference.round_matrices(rounded)
    ids = random_ids(3, 16, seed=0)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = rounded.logits(rounded.encode(ids, 4))
        wanted = plain.logits(plain.encode(ids, 4))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    assert rounded.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert rounded.embed.weight.dtype == torch.float32


@fake_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_fake_gpu_matrices_have_the_dtype_of_the_run(dtype, monkeypatch):
    monkeypatch.setattr(inference.copy, "deepcopy", lambda model: model)  # fakes have no copies
    with FakeTensorMode(), torch.device("cuda"):
        ready = for_inference(Transformer(ModelConfig(width=16, depth=1, heads=2), 16), dtype)
    assert ready.blocks[0].mlp.up.weight.dtype == dtype
    assert ready.head.weight.dtype == dtype
