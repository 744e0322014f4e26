"""Every backend of attention that this machine has, against the dense oracle."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bd3lm.errors import ConfigError
from bd3lm.model.attention import (
    AUTO,
    BACKENDS,
    BlockMask,
    CachedMask,
    attend,
    choose,
    flash,
    flex,
)
from bd3lm.model.attention.dynamo import MARK, fixed_while_compiling
from bd3lm.model.attention.flex import TILE, tile_coverage
from bd3lm.model.attention.triton.ranges import queries_of_keys

DOCUMENTS = torch.tensor(
    [[0] * 11 + [1] * 19 + [-1] * 3, [7] * 33, [-1] * 2 + [3] * 30 + [4]], dtype=torch.int32
)
MASKS = {
    "training": BlockMask.training(33, 5),
    "training, S=L": BlockMask.training(33, 33),
    "training, S>L": BlockMask.training(33, 40),
    "training, documents": BlockMask.training(33, 4, DOCUMENTS),
    "training, no last block": BlockMask.training(33, 4).without_last_clean(),
    "training, no last block, documents": BlockMask.training(33, 5, DOCUMENTS).without_last_clean(),
    "training, causal": BlockMask.training(33, 5, causal_end=33),
    "training, causal, documents": BlockMask.training(33, 5, DOCUMENTS, causal_end=33),
    "denoise": BlockMask.denoise(33, 4),
    "denoise, no last block": BlockMask.denoise(33, 16).without_last_clean(),
    "denoise, documents": BlockMask.denoise(33, 1, DOCUMENTS),
    "clean, S=1": BlockMask.clean(33, 1),
    "clean, S=L": BlockMask.clean(33, 33),
    "clean, documents": BlockMask.clean(33, 6, DOCUMENTS),
    "clean, cached": BlockMask.clean(33, 4, first=28),
    "clean, causal but the last block": BlockMask.clean(32, 4, first=24, causal_end=28),
    "long": BlockMask.training(300, 16),
}


def inputs(mask: BlockMask, grad: bool) -> list[Tensor]:
    torch.manual_seed(mask.seq_len + mask.block_size)
    batch = 1 if mask.doc_ids is None else mask.doc_ids.shape[0]
    shapes = [(4, mask.num_queries), (2, mask.num_keys), (2, mask.num_keys)]
    return [torch.randn(batch, h, t, 24, requires_grad=grad) for h, t in shapes]


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"dense"}))
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("name", MASKS)
def test_equals_dense(name: str, grad: bool, backend: str) -> None:
    mask = MASKS[name]
    mine = inputs(mask, grad)
    found = BACKENDS[backend]
    if not found.available():
        pytest.skip(f"{backend} {found.needs}")
    if not found.supports(*mine, mask):
        pytest.skip(f"{backend} {found.limits}")
    theirs = inputs(mask, grad)
    # The mask is under test, not the compiler, which would take a minute a shape.
    with torch.compiler.set_stance("force_eager"):
        out = attend(*mine, mask, backend=backend)
    wanted = attend(*theirs, mask, backend="dense")
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=2e-6)
    if grad:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        for a, b in zip(
            torch.autograd.grad(out, mine, dout),
            torch.autograd.grad(wanted, theirs, dout),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@st.composite
def masks(draw: st.DrawFn) -> BlockMask:
    length = draw(st.integers(1, 40))
    block = draw(st.integers(1, 45))
    doc_ids = None
    if draw(st.booleans()):
        marks = draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))
        doc_ids = torch.tensor(marks, dtype=torch.int32).view(2, length).cumsum(1).int()
        padding = draw(st.integers(0, length))
        doc_ids[0, length - padding :] = -1
    form = draw(st.sampled_from(["training", "denoise", "clean"]))
    if form == "clean":
        first, causal = draw(st.integers(0, length - 1)), draw(st.integers(0, length))
        return BlockMask.clean(length, block, doc_ids, first=first, causal_end=causal)
    if form == "training":
        causal = draw(st.sampled_from([0, length]))
        return BlockMask.training(length, block, doc_ids, causal_end=causal)
    return BlockMask.denoise(length, block, doc_ids)


@given(masks())
@settings(max_examples=200, deadline=None)
def test_queries_of_keys_are_the_transposed_mask(mask: BlockMask) -> None:
    clean_lo, clean_hi, noised_lo, noised_hi = (
        bound[..., None] for bound in queries_of_keys(mask, "cpu")
    )
    query = torch.arange(mask.num_queries)
    clean = query - (mask.seq_len if mask.noised else 0)
    seen = (clean >= clean_lo) & (clean < clean_hi)
    if mask.noised:
        seen = seen & (clean >= 0)
        seen |= (query < mask.seq_len) & (query >= noised_lo) & (query < noised_hi)
    assert torch.equal(seen, mask.dense().mT)


@pytest.mark.parametrize("name", MASKS)
def test_tiles_of_flex_cover_the_mask(name: str) -> None:
    mask = MASKS[name]
    some, every = tile_coverage(mask, mask.intervals())
    dense = mask.dense()
    rows, columns = (-size % TILE for size in dense.shape[1:])
    ones = torch.nn.functional.pad(dense, (0, columns, 0, rows), value=True)
    zeros = torch.nn.functional.pad(dense, (0, columns, 0, rows), value=False)
    full = ones.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).all(dim=4).all(dim=2)
    live = zeros.unflatten(1, (-1, TILE)).unflatten(3, (-1, TILE)).any(dim=4).any(dim=2)
    assert not (live & ~some).any(), "a tile with something in it is skipped"
    assert not (every & ~full).any(), "a tile is called full that is not"
    assert every.sum() == (full & live).sum(), "full tiles go unrecognised"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training, documents", "long"])
def test_flex_compiled_equals_dense(name: str) -> None:
    mask = MASKS[name]
    mine = inputs(mask, False)
    found, wanted = (attend(*mine, mask, backend=backend) for backend in ("flex", "dense"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_flex_refuses_to_be_traced_into_another_graph() -> None:
    mask = MASKS["training"]
    mine = inputs(mask, False)

    @torch.compile(backend="eager", fullgraph=True)
    def traced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + 1 if BACKENDS["flex"].supports(q, k, v, mask) else q

    assert BACKENDS["flex"].supports(*mine, mask)
    assert torch.equal(traced(*mine), mine[0])


def test_a_backend_that_is_not_there_says_so_in_one_sentence() -> None:
    if BACKENDS["triton"].available():
        pytest.skip("this machine has a GPU")
    mask = MASKS["training"]
    with pytest.raises(ConfigError) as caught:
        attend(*inputs(mask, False), mask, backend="triton")
    assert str(caught.value) == (
        "attention = triton: must be one that runs here: triton needs an NVIDIA GPU of compute"
        " capability 8.0 or newer and the triton package"
    )
    with pytest.raises(ConfigError, match="one of auto, "):
        attend(*inputs(mask, False), mask, backend="cudnn")


def test_nothing_is_needed_that_is_not_used() -> None:
    script = """
import sys
sys.modules.update({"triton": None, "flash_attn": None})
import torch
from bd3lm.model.attention import BlockMask, attend, choose
q, k, v = torch.ones(1, 1, 8, 16), torch.ones(1, 1, 8, 16), torch.ones(1, 1, 8, 16)
assert attend(q, k, v, BlockMask.training(4, 2)).shape == (1, 1, 8, 16)
assert not torch.cuda.is_initialized()
try:
    choose(q, k, v, BlockMask.training(4, 2), "flash")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        "attention = flash: must be one that runs here: flash needs an NVIDIA GPU and the"
    )


def test_inputs_that_a_backend_does_not_take_are_named() -> None:
    mask = MASKS["training"]
    with pytest.raises(ConfigError, match="on a CPU gives no gradient"):
        attend(*inputs(mask, True), mask, backend="flex")


def test_flash_attention_4_runs_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention gets its option, and no other backend does."""
    from torch.nn.attention import flex_attention as flexible

    options: list[dict[str, Any]] = []

    def record(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        options.append(given.get("kernel_options", {}))
        return q

    monkeypatch.setattr(flexible, "flex_attention", record)
    monkeypatch.setattr(torch, "compile", lambda run, **how: run)
    mask = MASKS["training"]
    with pytest.raises(ConfigError, match="flex-fa4 needs a Hopper GPU"):
        attend(*inputs(mask, False), mask, backend="flex-fa4")
    there = BACKENDS["flex-fa4"]._replace(available=lambda: True)
    monkeypatch.setitem(BACKENDS, "flex-fa4", there)
    with pytest.raises(ConfigError, match="takes fp16 or bf16 on CUDA with heads of 64"):
        attend(*inputs(mask, False), mask, backend="flex-fa4")
    monkeypatch.setitem(BACKENDS, "flex-fa4", there._replace(supports=BACKENDS["flex"].supports))
    flex._compiled.cache_clear()
    for backend in ("flex", "flex-fa4"):
        attend(*inputs(mask, False), mask, backend=backend)
    flex._compiled.cache_clear()
    assert options == [{}, {"BACKEND": "FLASH"}]


def test_auto_names_backends() -> None:
    assert all(name in BACKENDS for names in AUTO.values() for name in names)
    assert all(names[-1] == "dense" for names in AUTO.values())


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (BlockMask.clean(32, 1), True),
        (BlockMask.clean(32, 1, first=20), True),
        (BlockMask.clean(32, 32), False),
        (BlockMask.clean(32, 4, first=28), False),
        (BlockMask.clean(32, 4, first=24), None),
        (BlockMask.clean(32, 4), None),
        (BlockMask.clean(33, 1, DOCUMENTS), None),
        (BlockMask.training(32, 32), None),
        (BlockMask.denoise(32, 32), False),
        (BlockMask.denoise(32, 4), None),
    ],
)
def test_what_flash_is_asked_is_the_mask(mask: BlockMask, causal: bool | None) -> None:
    found = flash.is_causal(mask)
    assert found is causal
    if causal is None:
        return
    allowed = mask.dense()[0, :, : mask.seq_len]
    full = torch.ones_like(allowed)
    assert torch.equal(allowed, full.tril(mask.seq_len - mask.num_queries) if causal else full)
    if mask.noised:
        assert not mask.dense()[0, :, mask.seq_len :].any()


def stand_in(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """``flash_attn_func`` by its documentation: [B, T, H, D], causal aligned to the last key."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    "mask",
    [
        BlockMask.clean(33, 1),
        BlockMask.clean(33, 33),
        BlockMask.clean(33, 1, first=20),
        BlockMask.clean(33, 4, first=32),
        BlockMask.denoise(33, 33),
    ],
    ids=["causal", "full", "causal, cached", "decoding", "denoise, S=L"],
)
def test_flash_is_handed_what_dense_computes(
    mask: BlockMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("flash_attn")
    package.flash_attn_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = inputs(mask, False)
    found, wanted = flash.attention(q, k, v, mask), attend(q, k, v, mask, backend="dense")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.fixture
def triton_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = BACKENDS["triton"]._replace(available=lambda: True)
    monkeypatch.setitem(BACKENDS, "triton", there)


@pytest.mark.usefixtures("triton_there")
def test_on_a_gpu_auto_trains_with_flex_then_triton_then_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = MASKS["training"]
    with FakeTensorMode(), torch.device("cuda"):
        shape = 1, 2, mask.num_queries, 64
        qkv = [torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        for gone, expected in (("", "flex"), ("flex", "triton"), ("triton", "dense")):
            if gone:
                left = BACKENDS[gone]._replace(available=lambda: False)
                monkeypatch.setitem(BACKENDS, gone, left)
            assert choose(*qkv, mask) is BACKENDS[expected]
        assert AUTO["cpu"] == ("rust", "dense")


@pytest.mark.usefixtures("triton_there")
def test_on_a_gpu_auto_decodes_with_triton() -> None:
    """FlexAttention compiles for seconds for every shape, and decoding has a new one a block."""
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        q = torch.empty(1, 2, 4, 64, dtype=torch.bfloat16)
        k = torch.empty(1, 2, 28, 64, dtype=torch.bfloat16)
        prefix = torch.empty(1, 2, 28, 64, dtype=torch.bfloat16)
        end = torch.empty(1, 4, dtype=torch.int32)
        assert choose(q, k, k, BlockMask.clean(28, 4, first=24)) is BACKENDS["triton"]
        assert choose(prefix, k, k, BlockMask.clean(28, 4)) is BACKENDS["triton"]
        assert choose(q, k, k, CachedMask(end)) is BACKENDS["triton"]
        odd = torch.empty(1, 2, 56, 80, dtype=torch.bfloat16)
        assert choose(odd, odd, odd, BlockMask.training(28, 4)) is BACKENDS["triton"]


def test_flex_compiles_every_shape_once_and_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch runs a function uncompiled after eight recompilations, without a word."""
    compiled: list[tuple[bool, ...]] = []

    def count(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        sizes = [x for x in examples if not isinstance(x, Tensor)]
        compiled.append(tuple(isinstance(x, torch.SymInt) for x in sizes))
        return graph.forward

    monkeypatch.setattr(flex, "COMPILER", count)
    flex._compiled.cache_clear()
    masks = [BlockMask.training(n, s) for n in range(16, 28) for s in (1, 4)]
    masks += [BlockMask.training(33, 4, DOCUMENTS), BlockMask.training(33, 4, DOCUMENTS.clone())]
    shapes = {mask.shape[0]: None for mask in masks}
    for _ in range(2):
        for mask in masks:
            attend(*inputs(mask, grad=False), mask, backend="flex")
        assert len(compiled) == len(shapes)
    assert not any(map(any, compiled)), "shapes are static"
    flex._compiled.cache_clear()


def test_masks_made_in_inference_mode_serve_training() -> None:
    from bd3lm.model.attention.triton.ranges import ranges

    mask: Any = BlockMask.training(19, 3)
    with torch.inference_mode():
        made = ranges(mask, "cpu")
    assert not any(tensor.is_inference() for tensor in made)


def test_the_compiler_finds_what_is_fixed_by_the_mark_that_its_own_decorator_sets() -> None:
    @torch.compiler.assume_constant_result
    def marked_by_torch() -> None: ...

    @fixed_while_compiling
    def marked_by_us() -> None: ...

    assert vars(marked_by_us) == vars(marked_by_torch) == {MARK: True}
