"""Run a Gluon kernel's own text on a CPU, and find faults of its protocol.

The functions of a module that ``gluon.jit`` decorates are executed with a Gluon of NumPy arrays.
Partitions of a program are threads of which one runs at a time; at every operation on a barrier, a
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
from gluon_parts import (
    Barrier,
    Barriers,
    Buffer,
    Copy,
    Descriptor,
    Hazard,
    Pointer,
    Product,
    Shared,
    load,
    no_layout,
    store,
    value,
    where,
)

SCHEDULES = ("early copies", "late copies", "first consumer ahead", "last consumer ahead", "random")


class Task:
    """A partition: a thread that runs while it holds the baton."""

    def __init__(self, program: Program, index: int, run: Callable[..., None], args: tuple) -> None:
        self.index = index
        self.baton = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.barrier: Barrier | None = None
        self.done = False
        self.products: list[Product] = []
        self.thread = threading.Thread(target=self.body, args=(program, run, args), daemon=True)

    def body(self, program: Program, run: Callable[..., None], args: tuple) -> None:
        """Run to the end, or to a fault."""
        program.local.task = self
        self.baton.acquire()
        try:
            if program.fault is None:
                run(*args)
                if any(product.result is None for product in self.products):
                    raise Hazard("a partition ends while a product is under way")
        except BaseException as error:
            program.fault = program.fault or error
        self.done = True
        program.back.release()


class Program:
    """One program of the grid, under one schedule."""

    def __init__(self, index: int, schedule: str) -> None:
        self.index, self.schedule = index, schedule
        self.random = random.Random(index)
        self.local = threading.local()
        self.back = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.tasks: list[Task] = []
        self.copies: list[Copy] = []
        self.buffers = 0
        self.fenced = True

    def pause(
        self, ready: Callable[[], bool] = lambda: True, barrier: Barrier | None = None
    ) -> None:
        """Let others run until ``ready()``, which depends on ``barrier``."""
        task = self.local.task
        task.ready, task.barrier = ready, barrier
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
            try:
                task = self.choose()
            except Hazard as fault:
                self.fault, task = fault, None
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
            raise Hazard("the program ends while a copy is under way")

    def choose(self) -> Task | None:
        """The partition that runs next; None: a copy landed instead."""
        able = [task for task in self.tasks if not task.done and task.ready()]
        if not able and not self.copies:
            raise Hazard("deadlock")
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
            # One that somebody waits for, and no other.
            waited = [task.barrier for task in self.tasks if not task.done]
            wanted = [i for i, land in enumerate(self.copies) if land.barrier in waited]
            self.copies.pop(wanted[0] if wanted else 0)()
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
            program_id=lambda axis: value(np.int32(self.index)),
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
        self.pause(lambda: barrier.phases & 1 != parity, barrier)

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
        to.data[...] = np.nan
        self.copies.append(Copy(barrier, to, tile, tile.size * desc.base.element_size()))

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


class Kernel:
    """A kernel of a module, launched as Triton launches it."""

    def __init__(
        self,
        paths: Sequence[Path],
        name: str,
        schedule: str,
        mutation: tuple[str, str] | None = None,
    ) -> None:
        text = "\n".join(path.read_text() for path in paths)
        # Imports of the future come first, and none is executed.
        text = text.replace("from __future__ import annotations\n", "")
        if mutation is not None:
            if mutation[0] not in text:
                raise SystemExit(f"the kernels no longer hold {mutation[0]!r}")
            text = text.replace(*mutation)
        tree = ast.parse(text)
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        for function in tree.body:
            function.decorator_list = []
            for node in ast.walk(function):  # annotations are the compiler's
                if isinstance(node, ast.arg):
                    node.annotation = None
        self.code = compile(tree, str(paths[-1]), "exec")
        self.name, self.schedule = name, schedule

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            assert (num_warps, maxnreg) == (4, 168)
            for index in range(grid[0]):
                names = Program(index, self.schedule).namespace()
                exec(self.code, names)
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
