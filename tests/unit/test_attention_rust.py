"""The Rust CPU attention against the dense oracle in float64, over masks, layouts and dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3lm.model.attention import BlockMask
from bd3lm.model.attention.dense import dense_attention

rust = pytest.importorskip("bd3lm.model.attention.rust")

FORMS = ["training", "denoise", "clean", "cached"]
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.bfloat16: (1e-2, 1e-2)}


@pytest.fixture(params=rust.available_isas())
def isa(request):
    """Each instruction set of this processor."""
    rust.force_isa(request.param)
    yield request.param
    rust.force_isa(None)


@pytest.fixture
def threads():
    """The number of threads is put back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_mask(form: str, seq_len: int, block_size: int, docs: Tensor | None) -> BlockMask:
    if form == "cached":
        first = min(seq_len // block_size // 2 * block_size, seq_len - 1)
        return BlockMask.clean(seq_len, block_size, docs, first=first)
    return getattr(BlockMask, form)(seq_len, block_size, docs)


def make_docs(batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """Documents of random lengths, with padding at the end of some rows."""
    starts = torch.rand(batch, seq_len, generator=generator) < 0.1
    docs = starts.int().cumsum(dim=1).int()
    padding = torch.randint(0, seq_len // 3 + 1, (batch, 1), generator=generator)
    return docs.masked_fill(torch.arange(seq_len) >= seq_len - padding, -1)


def make_inputs(
    mask: BlockMask,
    shape: tuple[int, int, int, int],
    layout: str,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> list[Tensor]:
    """q, k, v and an output gradient: heads-last views, slices of one tensor, or contiguous."""
    batch, heads, kv_heads, width = shape

    def draw(rows: int, count: int) -> Tensor:
        if layout == "contiguous":
            x = torch.randn(batch, count, rows, width, generator=generator)
        elif layout == "heads_last":
            x = torch.randn(batch, rows, count, width, generator=generator).transpose(1, 2)
        else:  # part of a wider projection, and of a longer cache
            x = torch.randn(batch, rows + 3, count + 2, width + 4, generator=generator)
            x = x[:, 1 : 1 + rows, 1 : 1 + count, 2 : 2 + width].transpose(1, 2)
        return x.to(dtype)  # keeps the strides of dense layouts

    q, d_out = draw(mask.num_queries, heads), draw(mask.num_queries, heads)
    return [q, draw(mask.num_keys, kv_heads), draw(mask.num_keys, kv_heads), d_out]


def compare(mask: BlockMask, inputs: list[Tensor]) -> None:
    q, k, v, d_out = (x.detach() for x in inputs)
    forward_limit, backward_limit = TOLERANCE[q.dtype]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = rust.rust_attention(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, d_out)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = dense_attention(*exact, mask)
    want_grads = torch.autograd.grad(want, exact, d_out.double())
    assert out.dtype == q.dtype and out.shape == want.shape
    assert_near(out, want, forward_limit)
    # The backward pass takes sum(out * d_out) from an output rounded to bf16, which is off by half
    # a unit in each term; scores, and through them q and k, inherit that.
    off = 2.0**-9 if q.dtype == torch.bfloat16 else 0.0
    sums = (want.abs() * d_out.double().abs()).sum(-1).max().item() * off / math.sqrt(q.shape[-1])
    limits = [backward_limit + sums * x.abs().max().item() for x in (k, q)] + [backward_limit]
    for got, expected, limit in zip(grads, want_grads, limits, strict=True):
        assert_near(got, expected, limit)
    with torch.no_grad():  # the direct call is the same computation
        assert torch.equal(rust.rust_attention(q, k, v, mask), out)


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value where that exceeds one."""
    return (got.double() - want).abs().max().item() / max(1.0, want.abs().max().item())


def assert_near(got: Tensor, want: Tensor, limit: float) -> None:
    assert distance(got, want) <= limit


cases = st.fixed_dictionaries(
    {
        "form": st.sampled_from(FORMS),
        "seq_len": st.integers(2, 90),
        "block": st.sampled_from(["one", "odd", "sixteen", "all"]),
        "documents": st.booleans(),
        "heads": st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
        "width": st.sampled_from([16, 24, 32, 40, 64, 128, 20]),
        "layout": st.sampled_from(["contiguous", "heads_last", "slice"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "batch": st.integers(1, 3),
        "seed": st.integers(0, 10_000),
    }
)


def build(case: dict) -> tuple[BlockMask, list[Tensor]]:
    generator = torch.Generator().manual_seed(case["seed"])
    seq_len = case["seq_len"]
    block = {"one": 1, "odd": 5, "sixteen": 16, "all": seq_len}[case["block"]]
    docs = make_docs(case["batch"], seq_len, generator) if case["documents"] else None
    mask = make_mask(case["form"], seq_len, min(block, seq_len), docs)
    shape = (case["batch"], *case["heads"], case["width"])
    return mask, make_inputs(mask, shape, case["layout"], case["dtype"], generator)


@settings(max_examples=120, deadline=None)
@given(case=cases)
def test_equals_the_float64_oracle(case: dict) -> None:
    mask, inputs = build(case)
    assert rust.supports(*inputs[:3], mask)
    compare(mask, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_every_instruction_set_equals_the_oracle(isa: str, form: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for seq_len, block, documents in [(70, 16, False), (129, 4, True), (37, 37, False)]:
        docs = make_docs(2, seq_len, generator) if documents else None
        mask = make_mask(form, seq_len, block, docs)
        compare(mask, make_inputs(mask, (2, 4, 2, 32), "heads_last", dtype, generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(threads: None, isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    mask = BlockMask.training(300, 16, make_docs(2, 300, generator))
    q, k, v, d_out = make_inputs(mask, (2, 4, 2, 32), "heads_last", dtype, generator)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = rust.rust_attention(*leaves, mask)
        results.append([out, *torch.autograd.grad(out, leaves, d_out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_queries_that_see_nothing_are_zero_and_have_zero_gradients() -> None:
    docs = torch.tensor([[0, 0, 1, -1, -1, -1], [-1] * 6], dtype=torch.int32)
    mask = BlockMask.training(6, 2, docs)
    leaves = [torch.randn(2, 2, 12, 16, requires_grad=True) for _ in range(3)]
    out = rust.rust_attention(*leaves, mask)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    blank = ~mask.dense().any(dim=-1)
    rows = blank[:, None, :, None].expand_as(out)
    assert not out[rows].any() and not grads[0][rows].any()
    assert all(g.isfinite().all() for g in grads)


def test_gradient_equals_finite_differences() -> None:
    torch.manual_seed(5)
    mask = BlockMask.training(9, 3)
    leaves = [torch.randn(1, 1, 18, 16, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, 1, 18, 16)
    grads = torch.autograd.grad((rust.rust_attention(*leaves, mask) * weight).sum(), leaves)
    for which, gradient in enumerate(grads):
        step = torch.randn_like(gradient)
        values = []
        for sign in (1, -1):
            moved = [x.detach().double() for x in leaves]
            moved[which] += sign * 1e-4 * step.double()
            moved = [x.float() for x in moved]
            out = rust.rust_attention(*moved, mask).double()
            values.append((out * weight).sum())
        slope = (values[0] - values[1]) / 2e-4
        assert slope == pytest.approx((gradient * step).sum().item(), rel=2e-2, abs=2e-2)


def test_float32_cache_with_bf16_queries() -> None:
    mask = BlockMask.clean(40, 4, first=36)
    q = torch.randn(2, 4, 4, 32, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 32)
    out = rust.rust_attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    assert_near(out, dense_attention(q.double(), k.double(), v.double(), mask), 2e-2)


def test_autocast_carries_bf16_through() -> None:
    mask = BlockMask.training(16, 4)
    project = torch.nn.Linear(32, 96, bias=False)
    x = torch.randn(2, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (z.unflatten(-1, (2, 16)).transpose(1, 2) for z in project(x).chunk(3, dim=-1))
        out = rust.rust_attention(q, k, v, mask)
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and project.weight.grad.isfinite().all()


@pytest.mark.parametrize("documents", [False, True])
def test_compiles_into_one_graph(documents: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    docs = make_docs(2, 24, generator) if documents else None
    mask = BlockMask.training(24, 4, docs)
    leaves = [torch.randn(2, 48, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3)]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rust.rust_attention(q * 1.5, k, v, mask).transpose(1, 2).flatten(2).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_operators_are_registered_soundly() -> None:
    mask = BlockMask.training(10, 4)
    leaves = [torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3)]
    args = (*leaves, *mask.intervals(), 10)
    torch.library.opcheck(rust.block_attention, args)
    torch.library.opcheck(rust.block_intervals, (leaves[0], None, *mask.shape))


def test_wrong_arguments_are_named() -> None:
    mask = BlockMask.training(8, 4)
    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(ValueError, match="k = "):
        rust.rust_attention(q, torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8), mask)
    with pytest.raises(ValueError, match="mask"):
        rust.rust_attention(q, q, q, BlockMask.training(4, 4))
    with pytest.raises(ValueError, match="isa"):
        rust.force_isa("sse1")
    assert not rust.supports(q.double(), q.double(), q.double(), mask)
    assert not rust.supports(q.to("meta"), q.to("meta"), q.to("meta"), mask)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "mask"),
    [(0, 16, 16, BlockMask.training(8, 4)), (2, 0, 8, BlockMask.clean(8, 4, first=8))],
    ids=["no rows", "no queries"],
)
def test_empty_inputs_give_empty_outputs_and_zero_gradients(
    batch: int, queries: int, keys: int, mask: BlockMask
) -> None:
    q = torch.randn(batch, 2, queries, 16, requires_grad=True)
    k, v = (torch.randn(batch, 2, keys, 16, requires_grad=True) for _ in range(2))
    out = rust.rust_attention(q, k, v, mask)
    assert out.shape == q.shape
    out.sum().backward()
    for leaf in (q, k, v):
        assert leaf.grad is not None
        assert leaf.grad.eq(0).all()
