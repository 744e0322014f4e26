"""Cases for the kernels without a GPU, and the float64 attention to compare with."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bd3lm.model.attention.mask import BlockMask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest error over largest value; gradients pass through one more product than the output.
FORWARD_LIMIT = {"fp32": 2e-6, "bf16": 1e-2, "fp16": 1.5e-3}
BACKWARD_LIMIT = {"fp32": 5e-6, "bf16": 1e-2, "fp16": 1.5e-3}


@dataclass(frozen=True)
class Case:
    """One shape; ``form`` names the constructor of the mask."""

    form: Literal["training", "denoise", "clean"]
    seq_len: int
    block_size: int
    width: int
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    first: int = 0
    documents: tuple[tuple[int, ...], ...] = ()
    """Lengths of the documents of each row; the rest of the row is padding."""
    causal_end: int = 0
    """Leading x0 positions that attend causally."""
    far: bool = False
    """Rows so far apart that their offsets need 64 bits."""

    def mask(self) -> BlockMask:
        """The mask of this case, on the CPU."""
        doc_ids = None
        if self.documents:
            doc_ids = torch.full((self.batch, self.seq_len), -1, dtype=torch.int32)
            for row, lengths in enumerate(self.documents):
                ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
                doc_ids[row, : len(ids)] = ids.int()
        shape, causal = (self.seq_len, self.block_size, doc_ids), self.causal_end
        if self.form == "clean":
            return BlockMask.clean(*shape, first=self.first, causal_end=causal)
        if self.form == "training":
            return BlockMask.training(*shape, causal_end=causal)
        return BlockMask.denoise(*shape)

    def inputs(self, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, each inside a buffer of NaN, or far apart."""
        place = spread if self.far else guarded
        generator = torch.Generator().manual_seed(self.seq_len * 1009 + self.block_size)
        shapes = [(self.heads, mask.num_queries), *[(self.kv_heads, mask.num_keys)] * 2]
        shapes.append(shapes[0])
        return tuple(  # type: ignore[return-value]
            place(
                torch.randn(self.batch, heads, rows, self.width, generator=generator),
                DTYPES[self.dtype],
            )
            for heads, rows in shapes
        )


def guarded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [B, H, T, D] as a view with NaN before and after every row, head and batch."""
    batch, heads, rows, width = x.shape
    buffer = torch.full((batch, heads, rows + 64, width + 16), float("nan"), dtype=dtype)
    view = buffer[:, :, 32 : 32 + rows, 8 : 8 + width]
    view.copy_(x)
    return view


NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux: the memory need not be there until it is touched."""
FAR = 1 << 25
"""Elements between rows of :func:`spread`: 64 of them are 2^31."""


def spread(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [1, 1, T, D] as a view whose rows lie :data:`FAR` apart, in memory mostly untouched."""
    rows, width = x.shape[2:]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, rows * FAR * dtype.itemsize, flags=flags)
    view = torch.frombuffer(memory, dtype=dtype).as_strided((1, 1, rows, width), (0, 0, FAR, 1))
    return view.copy_(x)


def reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of q, k, v in float64, straight from the definition.

    Args:
        q: [B, H, Tq, D].
        k: [B, Hkv, Tk, D].
        v: as ``k``.
        dout: as ``q``.
        allowed: bool [B or 1, Tq, Tk].
    """
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ keys.mT * q.shape[-1] ** -0.5
    hidden = ~allowed[:, None]
    # A row without keys has weights of zero, not of NaN.
    probs = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)
    out = probs @ values
    gradients = torch.autograd.grad(out, (q, k, v), dout.double())
    return (out.detach(), *gradients)


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; infinite where anything is not finite.

    Inputs are standard normal. Where all that is wanted is nearly zero (the gradient of a softmax
    over one key), the difference is measured against 0.1.
    """
    if not found.isfinite().all():
        return float("inf")
    scale = wanted.abs().max().clamp(min=0.1)
    return ((found.double() - wanted).abs().max() / scale).item()


TILES_NOTHING_DIVIDES = Case("training", 37, 5, 24, heads=2)
PACKED = Case("training", 50, 8, 16, batch=2, documents=((13, 21, 9), (50,)))

# More pairs of row and head than a section of the launch order holds.
BATCHED = Case("denoise", 37, 4, 16, batch=3)
FAR_ROWS = Case("clean", 66, 4, 16, far=True)

QUICK = (
    TILES_NOTHING_DIVIDES,
    PACKED,
    Case("training", 96, 4, 32),
    Case("training", 70, 70, 16),
    Case("training", 50, 8, 16, batch=2, causal_end=50, documents=((13, 21, 9), (50,))),
    Case("clean", 67, 6, 16, heads=2, first=54, causal_end=60),
    Case("denoise", 45, 7, 32, heads=2),
    Case("denoise", 40, 8, 16, batch=2, documents=((40,), (17, 3))),
    Case("clean", 45, 1, 16),
    Case("clean", 67, 6, 48, heads=2, first=42),
    Case("clean", 40, 4, 16, batch=2, documents=((7, 25), (19, 21))),
    Case("training", 40, 16, 64, "bf16", heads=2),
    Case("training", 33, 3, 40, "fp16"),
    BATCHED,
    FAR_ROWS,
)

EXHAUSTIVE = tuple(
    Case(form, length, block, width, dtype, heads=heads, kv_heads=kv)
    for form in ("training", "denoise", "clean")
    for length, block, width, heads, kv in (
        (64, 4, 32, 2, 1),
        (100, 7, 24, 2, 2),
        (37, 5, 64, 1, 1),
        (96, 96, 32, 1, 1),
        (128, 48, 64, 1, 1),
        (50, 1, 16, 4, 2),
        (96, 100, 32, 2, 2),
        (129, 16, 96, 1, 1),
        (65, 8, 128, 1, 1),
        (40, 4, 256, 1, 1),
        (1, 1, 16, 1, 1),
        (17, 3, 80, 3, 1),
    )
    for dtype in ("fp32", "bf16", "fp16")
) + tuple(
    Case(form, 120, block, 32, dtype, batch=3, documents=documents)
    for form in ("training", "denoise", "clean")
    for block in (1, 4, 13, 120)
    for dtype in ("fp32", "bf16")
    for documents in [((120,), (1, 50, 3, 40), (31, 1, 88)), ((5,), (60, 60), (119,))]
)
