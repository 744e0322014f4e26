"""Run a Gluon kernel's own text on a CPU, and find faults of its protocol.

The functions of a module that ``gluon.jit`` decorates are executed with a Gluon of NumPy arrays.
Partitions of a block are threads of which one runs at a time; at every operation on a barrier, a
copy or a product a schedule chooses who goes on, so a fault needs no luck to show twice. A TMA copy
lands when the schedule says so, and until then its buffer holds NaN. A product reads shared memory
when it starts and again when it is waited for. An mbarrier counts arrivals and bytes, and a waiter
sees the parity of its phase alone, as on the device.

Not seen: layouts, swizzles, registers, and fences but for the one after the barriers are made.
"""

from __future__ import annotations

import ast
import inspect
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SCHEDULES = ("early copies", "late copies", "first consumer ahead", "last consumer ahead", "random")


class Hazard(Exception):
    """A fault of the protocol: a race, a deadlock, an address out of bounds."""


# --- values -------------------------------------------------------------------------------------


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


# --- the block ----------------------------------------------------------------------------------


class Task:
    """A partition: a thread that runs while it holds the baton."""

    def __init__(self, block: Block, index: int, run: Callable[..., None], args: tuple) -> None:
        self.index = index
        self.baton = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done = False
        self.products: list[Product] = []
        self.thread = threading.Thread(target=self.body, args=(block, run, args), daemon=True)

    def body(self, block: Block, run: Callable[..., None], args: tuple) -> None:
        """Run to the end, or to a fault."""
        block.local.task = self
        self.baton.acquire()
        try:
            if block.fault is None:
                run(*args)
                if any(product.result is None for product in self.products):
                    raise Hazard("a partition ends while a product is under way")
        except BaseException as error:  # noqa: BLE001  (shown by the block, which is another thread)
            block.fault = block.fault or error
        self.done = True
        block.back.release()


class Block:
    """One block of the grid, under one schedule."""

    def __init__(self, program: int, schedule: str, seed: int) -> None:
        self.program, self.schedule = program, schedule
        self.random = random.Random(seed)
        self.local = threading.local()
        self.back = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.tasks: list[Task] = []
        self.copies: list[Callable[[], None]] = []
        self.buffers = 0
        self.fenced = True

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run until ``ready()``."""
        task = self.local.task
        task.ready = ready
        self.back.release()
        task.baton.acquire()
        if self.fault is not None:
            raise SystemExit

    def specialize(self, parts: list[tuple], warps: list[int], registers: list[int]) -> None:
        """Run the partitions to their end."""
        if not self.fenced:
            raise Hazard("no fence after the barriers were made")
        if sum(registers) + registers[0] > 504 or len(warps) != len(parts) - 1:
            raise Hazard("the partitions do not fit into a multiprocessor")
        self.tasks = [Task(self, i, *part) for i, part in enumerate(parts)]
        for task in self.tasks:
            task.thread.start()
        while any(not task.done for task in self.tasks):
            task = self.choose()
            if task is not None:
                task.baton.release()
                self.back.acquire()
            if self.fault is not None:
                break
        for task in self.tasks:
            while not task.done:
                task.baton.release()
                self.back.acquire()
            task.thread.join()
        if self.fault is not None:
            raise self.fault
        if self.copies:
            raise Hazard("the block ends while a copy is under way")

    def choose(self) -> Task | None:
        """The partition that runs next; None: a copy landed instead."""
        able = [task for task in self.tasks if not task.done and task.ready()]
        if not able and not self.copies:
            self.fault = Hazard("deadlock")
            return None
        loaders_first = sorted(able, key=lambda task: -task.index)
        if self.schedule == "random":
            pick = self.random.randrange(len(able) + len(self.copies))
            if pick < len(able):
                return able[pick]
            self.copies.pop(pick - len(able))()
        elif self.schedule == "early copies":
            if not self.copies:
                return loaders_first[0]
            self.copies.pop(0)()
        elif self.schedule == "late copies":
            if able:
                return able[0]
            self.copies.pop()()
        else:  # one of the consumers runs only where nobody else can
            slow = 1 if self.schedule == "first consumer ahead" else 0
            fast = [task for task in loaders_first if task.index != slow]
            if fast:
                return fast[0]
            if not self.copies:
                return able[0]
            self.copies.pop(0)()
        return None

    # What the kernel calls.

    def namespace(self) -> dict[str, Any]:
        """The names that the kernel's text imports."""
        gl = SimpleNamespace(
            int32="int32", int64="int64", float32="float32",
            static_range=range, constexpr=None, warp_specialize=self.specialize,
            program_id=lambda axis: value(np.int32(self.program)),
            NVMMADistributedLayout=no_layout, DotOperandLayout=no_layout, SliceLayout=no_layout,
            BlockedLayout=no_layout, convert_layout=lambda x, layout: x,
            arange=lambda a, b, layout=None: value(np.arange(a, b, dtype=np.int32)),
            full=lambda shape, x, dtype, layout=None: value(np.full(shape, x, np.float32)),
            zeros=lambda shape, dtype, layout=None: value(np.zeros(shape, np.float32)),
            where=where, minimum=np.minimum, maximum=np.maximum,
            max=lambda x, axis: value(np.asarray(x).max(axis)),
            sum=lambda x, axis: value(np.asarray(x).sum(axis, dtype=np.float32)),
            exp2=np.exp2, log2=np.log2, load=load, store=store,
            allocate_shared_memory=self.allocate,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=no_layout, init=self.init, expect=self.expect, arrive=self.arrive,
            wait=self.wait,
        )  # fmt: skip
        return {
            "gl": gl, "mbarrier": mbarrier, "load": self.copy, "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_products,
        }  # fmt: skip

    def allocate(self, dtype: str, shape: Sequence[int], layout: Any) -> Any:
        if dtype == "int64":
            return Barriers(shape[0])
        self.buffers += 1
        buffers = [Buffer(f"buffer {self.buffers}.{i}") for i in range(shape[0])]
        return Shared(np.full(shape, np.nan, np.float32), buffers)

    def fence(self) -> None:
        self.fenced = True

    def init(self, barrier: Barrier, count: int) -> None:
        self.fenced = False
        barrier.count = barrier.pending = count

    def expect(self, barrier: Barrier, size: int, pred: bool = True) -> None:
        self.pause()
        barrier.bytes += size
        barrier.pending -= 1
        barrier.advance()

    def arrive(self, barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
        self.pause()
        barrier.pending -= count
        barrier.advance()

    def wait(self, barrier: Barrier, phase: Any) -> None:
        parity = int(phase)
        self.pause(lambda: barrier.phases & 1 != parity)

    def copy(self, desc: Descriptor, where_: Sequence[Any], barrier: Barrier, to: Shared) -> None:
        self.pause()
        buffer = to.buffer
        if buffer.readers:
            raise Hazard(f"{buffer.name} is overwritten while a product reads it")
        tile = desc.tile([int(x) for x in where_])
        if tile.shape != to.data.shape:
            raise Hazard(f"a copy of {tile.shape} into {to.data.shape}")
        buffer.filled = False
        buffer.fills += 1
        fills = buffer.fills
        to.data[...] = np.nan

        def land() -> None:
            if buffer.fills != fills:
                self.fault = self.fault or Hazard(f"two copies into {buffer.name} at once")
                return
            to.data[...] = tile
            buffer.filled = True
            barrier.bytes -= tile.size * desc.base.element_size()
            barrier.advance()

        self.copies.append(land)

    def multiply(
        self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Any:
        self.pause()
        product = Product(a, b, acc if use_acc else None)
        self.local.task.products.append(product)
        return product if is_async else self.wait_products(0, (product,))

    def wait_products(self, left: int, deps: tuple) -> Any:
        self.pause()
        under_way = [p for p in self.local.task.products if p.result is None]
        for product in under_way[: len(under_way) - left]:
            product.finish()
        if any(product.result is None for product in deps):
            raise Hazard("a product is read before it is waited for")
        found = tuple(product.result for product in deps)
        return found[0] if len(found) == 1 else found


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


# --- the kernel ---------------------------------------------------------------------------------


class Kernel:
    """A kernel of a module, launched as Triton launches it."""

    def __init__(
        self,
        path: Path,
        name: str,
        schedule: str = "random",
        mutation: tuple[str, str] | None = None,
    ) -> None:
        text = path.read_text()
        if mutation is not None:
            if mutation[0] not in text:
                raise SystemExit(f"{path.name} no longer holds {mutation[0]!r}")
            text = text.replace(*mutation)
        tree = ast.parse(text)
        tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        for function in tree.body:
            function.decorator_list = []
            for node in ast.walk(function):  # annotations are the compiler's
                if isinstance(node, ast.arg):
                    node.annotation = None
        self.code = compile(tree, str(path), "exec")
        self.name, self.schedule = name, schedule

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            assert (num_warps, maxnreg) == (4, 168)
            for program in range(grid[0]):
                block = Block(program, self.schedule, seed=program)
                names = block.namespace()
                exec(self.code, names)  # noqa: S102  (our own kernel)
                function = names[self.name]
                bound = inspect.signature(function).bind(*map(argument, args), **constants)
                function(*bound.args, **bound.kwargs)

        return launch


def argument(x: Any) -> Any:
    """An argument of a launch as a kernel sees it."""
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return value(np.float32(x) if isinstance(x, float) else np.int32(x))
