"""Values, memory, barriers, copies and products, as :mod:`emulator` needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Hazard(Exception):
    """A fault of the protocol: a race, a deadlock, an address out of bounds."""


class Value(np.ndarray):
    """Array with the methods of a Gluon tensor; int32 that overflows is a fault."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        with np.errstate(all="ignore"):
            found = np.asarray(getattr(ufunc, method)(*plain, **options))
        if found.dtype == np.int32 and ufunc in (np.add, np.subtract, np.multiply):
            exact = ufunc(*(np.asarray(x).astype(np.int64) for x in plain))
            if (exact != found).any():
                raise Hazard("a 32-bit number overflows")
        return found.view(Value)

    def to(self, dtype: str) -> Value:
        """The same numbers in another dtype; 16-bit floats stay float32, rounded."""
        return convert(self, dtype)


def value(x: Any) -> Value:
    """``x`` as a :class:`Value`."""
    return np.asarray(x).view(Value)


def convert(x: np.ndarray, dtype: str) -> Value:
    """Round to nearest even, as the device does."""
    kinds = {"int32": np.int32, "int64": np.int64, "float32": np.float32}
    plain = np.asarray(x)
    if dtype in kinds:
        return value(plain.astype(kinds[dtype]))
    half = torch.from_numpy(np.array(plain, np.float32)).to(getattr(torch, dtype))
    return value(half.float().numpy())


class Pointer:
    """Address inside the memory of a tensor."""

    def __init__(self, tensor: torch.Tensor, offset: Any = None) -> None:
        self.tensor = tensor
        self.offset = np.int64(tensor.storage_offset()) if offset is None else offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, np.asarray(self.offset + np.asarray(offset, np.int64)))

    def cells(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """The memory as one row, the indices into it, and where they are wanted."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        memory = self.tensor.detach().as_strided((size,), (1,), 0)
        wanted = np.broadcast_to(True if mask is None else np.asarray(mask), self.offset.shape)
        index = np.where(wanted, self.offset, 0)
        if index.min() < 0 or index.max() >= size:
            raise Hazard("an address out of bounds")
        return memory, torch.from_numpy(np.atleast_1d(index)), wanted


# --- shared memory ------------------------------------------------------------------------------


class Buffer:
    """State of one buffer of shared memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.filled = False
        self.fills = 0
        self.readers = 0


class Shared:
    """Shared memory: an array, and the state of each entry of its first axis."""

    def __init__(self, data: np.ndarray, buffers: list[Buffer]) -> None:
        self.data, self.buffers = data, buffers

    @property
    def buffer(self) -> Buffer:
        """The buffer that this is."""
        (found,) = self.buffers
        return found

    def index(self, i: Any) -> Shared:
        """One entry of the first axis."""
        return Shared(self.data[int(i)], [self.buffers[int(i)]])

    def reshape(self, shape: Sequence[int]) -> Shared:
        """The same memory in another shape."""
        view = self.data.view()
        view.shape = tuple(shape)
        return Shared(view, self.buffers)

    def permute(self, order: Sequence[int]) -> Shared:
        """The same memory with its axes in another order."""
        return Shared(self.data.transpose(order), self.buffers)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes are there."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phases = 0

    def advance(self) -> None:
        """End the phase if it is complete."""
        if self.count == 0:
            raise Hazard("a barrier is used before it is made")
        if self.pending < 0:
            raise Hazard("more arrivals than a barrier counts")
        if self.pending == 0 and self.bytes == 0:
            self.phases += 1
            self.pending = self.count


class Barriers:
    """A row of barriers."""

    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        """One of them."""
        return self.all[int(i)]


class Copy:
    """A TMA copy under way; calling it lets it land."""

    def __init__(self, barrier: Barrier, to: Shared, tile: np.ndarray, size: int) -> None:
        self.barrier, self.to, self.tile, self.size = barrier, to, tile, size
        self.fills = to.buffer.fills

    def __call__(self) -> None:
        """Land.

        Raises:
            Hazard: another copy was begun into the same buffer.
        """
        if self.to.buffer.fills != self.fills:
            raise Hazard(f"two copies into {self.to.buffer.name} at once")
        self.to.data[...] = self.tile
        self.to.buffer.filled = True
        self.barrier.bytes -= self.size
        self.barrier.advance()


class Product:
    """A WGMMA under way; nobody may look at its result before it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.operands = [x for x in (a, b) if isinstance(x, Shared)]
        for x in self.operands:
            if not x.buffer.filled:
                raise Hazard(f"a product reads {x.buffer.name} before it is filled")
            x.buffer.readers += 1
        self.seen = [x.buffer.fills for x in self.operands]
        left = a.data if isinstance(a, Shared) else np.asarray(a)
        if left.shape[1] != b.data.shape[0]:
            raise Hazard(f"a product of {left.shape} and {b.data.shape}")
        self.left, self.right = left, b.data
        self.acc = None if acc is None else np.asarray(acc)
        self.result: Value | None = None

    def finish(self) -> None:
        """Read the operands, as late as the device may."""
        if self.result is not None:
            return
        for x, fills in zip(self.operands, self.seen, strict=True):
            x.buffer.readers -= 1
            if x.buffer.fills != fills or not x.buffer.filled:
                raise Hazard(f"{x.buffer.name} changes under a product")
        found = self.left.astype(np.float32) @ self.right.astype(np.float32)
        self.result = value(found if self.acc is None else found + self.acc)


def no_layout(*args: Any, **options: Any) -> None:
    return None


def where(condition: Any, a: Any, b: Any) -> Value:
    return value(np.where(np.asarray(condition), *(_weak(x) for x in (a, b))))


def _weak(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    return np.float32(x) if isinstance(x, float) else np.int32(x)


def load(pointer: Pointer, mask: Any = None) -> Value:
    memory, index, _ = pointer.cells(mask)
    found = memory[index].reshape(np.shape(pointer.offset))
    return value(found.float().numpy() if found.is_floating_point() else found.numpy())


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    shape = np.broadcast_shapes(np.shape(pointer.offset), np.shape(x))
    pointer = Pointer(pointer.tensor, np.broadcast_to(pointer.offset, shape))
    memory, index, wanted = pointer.cells(None if mask is None else np.broadcast_to(mask, shape))
    source = torch.from_numpy(np.array(np.broadcast_to(x, shape), np.float32)).to(memory.dtype)
    memory[index[torch.from_numpy(wanted.copy())]] = source[torch.from_numpy(wanted.copy())]


class Descriptor:
    """A TMA descriptor: what lies outside of its axes is read as zero."""

    def __init__(self, real: Any) -> None:
        self.base, self.shape, self.strides = real.base, list(real.shape), list(real.strides)
        self.block, self.layout = list(real.block_shape), real.layout
        self.dtype = str(real.base.dtype).removeprefix("torch.")

    def tile(self, start: Sequence[int]) -> np.ndarray:
        """The block that begins at these coordinates."""
        offset = np.zeros(self.block, np.int64) + self.base.storage_offset()
        inside = np.ones(self.block, bool)
        for axis, (first, size) in enumerate(zip(start, self.block, strict=True)):
            shape = [-1 if i == axis else 1 for i in range(len(self.block))]
            place = (first + np.arange(size)).reshape(shape)
            inside = inside & (place >= 0) & (place < self.shape[axis])
            offset = offset + place * int(self.strides[axis])
        memory, index, wanted = Pointer(self.base, offset).cells(inside)
        return np.where(wanted, memory[index].float().numpy(), 0.0).astype(np.float32)
