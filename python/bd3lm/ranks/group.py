"""One process or many: the few exchanges between ranks that training and scoring need.

The transport is ``torch.distributed``: gloo between hosts, NCCL between GPUs. A :class:`Ranks` of
one process does nothing and imports nothing, so the same code serves one process and many.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from bd3lm.errors import Bd3lmError, ConfigError, LostRankError
from bd3lm.ranks.place import Place, find_place

if TYPE_CHECKING:
    from bd3lm.ranks.watch import Watch

T = TypeVar("T")

POLL = 0.02
"""Seconds between two looks at the store while rank 0 works alone, which may take hours."""
FOREVER = timedelta(days=30)
"""Timeout of PyTorch's collectives: :mod:`bd3lm.ranks.watch` finds and names a rank that hangs."""


class Ranks:
    """The processes of a job; made by :func:`joined`.

    Every method is called by all ranks in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local: its number on its machine.
        group: of ``torch.distributed``; None: that of the whole job.
    """

    def __init__(self, place: Place | None = None, store: Any = None, group: Any = None) -> None:
        place = place or Place()
        self.rank, self.size, self.local = place.rank, place.size, place.local
        self.watch: Watch | None = None
        self.group = group
        self._place, self._store = place, store
        self._works = 0
        self._for_thread: Ranks | None = None

    @property
    def first(self) -> bool:
        """Return whether this is rank 0, which writes files and reports."""
        return self.rank == 0

    def for_thread(self) -> Ranks:
        """The same processes with connections of their own, for a thread besides the main one.

        All ranks call this in the main thread; later calls return the same. It has no watch: the
        main thread waits for the other in the end.
        """
        if self.size == 1:
            return self
        if self._for_thread is None:
            import torch.distributed as dist

            group = dist.new_group(backend="gloo", timeout=FOREVER)
            self._for_thread = Ranks(self._place, _prefixed("thread", self._store), group)
        return self._for_thread

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place; on a GPU the host does not wait."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, *numbers: int) -> list[int]:
        """Take the largest of each number over the ranks; the hosts wait for each other."""
        if self.size == 1:
            return list(numbers)
        import torch.distributed as dist

        values = torch.tensor(numbers)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values.tolist()

    def gather(self, value: T) -> list[T]:
        """Collect one picklable value of each rank, in their order, on all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def shared(self, values: Sequence[tuple[int, T]]) -> list[T]:
        """Merge numbered values of all ranks, in the order of their numbers."""
        found = [pair for part in self.gather(list(values)) for pair in part]
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def mine(self, index: int) -> bool:
        """Return whether this rank works on the part with this number: they go around."""
        return index % self.size == self.rank

    def every(self, work: Callable[[], T]) -> T:
        """Work on all ranks at once; an error of one is raised on all of them.

        Raises:
            Bd3lmError: the error of the lowest rank that failed.
        """
        if self.size == 1:
            return work()
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        for rank, theirs in enumerate(self.gather(_portable(failure))):
            if theirs is not None:
                raise _as_seen(theirs, failure, rank == self.rank)
        return result

    def by_first(self, work: Callable[[], T]) -> T:
        """Work on rank 0 alone, for as long as it takes; all get its result, or its error.

        Raises:
            Bd3lmError: the error of rank 0.
        """
        if self.size == 1:
            return work()
        self._works += 1
        key = f"work/{self._works}"
        failure: Exception | None = None
        value: Any = None
        if self.first:
            try:
                value = work()
            except Exception as error:
                failure = error
            self._store.set(key, pickle.dumps((_portable(failure), value)))
        else:
            while not self._store.check([key]):
                time.sleep(POLL)
            failure, value = pickle.loads(self._store.get(key))
        self.largest(0)  # rank 0, which may keep the store, does not leave before all have read it
        if failure is not None:
            raise _as_seen(failure, failure, self.first)
        return value

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Work on rank 0, then on the others, which find its files.

        Raises:
            Bd3lmError: the error of the lowest rank that failed.
        """
        if self.size == 1:
            return work()
        result: list[T] = []

        def keep() -> None:
            result.append(work())

        self.by_first(keep)
        return self.every(lambda: result[0] if self.first else work())

    def beat(self, position: str) -> None:
        """Note progress, for the others to see if this rank hangs later."""
        if self.watch is not None:
            self.watch.beat(position)

    def rest(self) -> None:
        """Allow any time until the next note: for work on one rank while the others wait."""
        if self.watch is not None:
            self.watch.rest()


ALONE = Ranks()
"""One process."""


@contextmanager
def joined(device: str = "cpu", minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` or Slurm started, for the length of the block.

    Args:
        device: of the run; unless it is ``cpu``, GPUs exchange tensors by NCCL where there are any.
        minutes: time without progress after which a rank that hangs is named.

    Raises:
        ConfigError: an environment that is not complete, or the number of a GPU where each rank
            takes that of its local rank.
        LostRankError: a rank ended or hangs.
    """
    place = find_place()
    if place.size == 1:
        yield ALONE
        return
    if device.startswith("cuda:"):
        raise ConfigError("device", device, "auto, cpu or cuda: each rank takes a GPU of its own")
    import torch.distributed as dist

    from bd3lm.ranks.watch import Watch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    with lost_ranks():
        store = _store(place)
        if on_gpu:
            torch.cuda.set_device(place.local % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=_prefixed("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=FOREVER,
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
        )
    ranks = Ranks(place, store)
    ranks.watch = Watch(place, _store(place, again=True), 60 * minutes)
    try:
        with lost_ranks():
            yield ranks
            ranks.largest(0)  # the store lives in rank 0: nobody leaves before the others
    finally:
        ranks.watch.close()
    dist.destroy_process_group()


def _store(place: Place, *, again: bool = False) -> Any:
    """Connect to the store of rank 0, or to that of ``torchrun``'s agent, which it keeps."""
    import torch.distributed as dist

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        place.address,
        place.port,
        place.size,
        is_master=place.rank == 0 and not agent and not again,
        timeout=timedelta(minutes=30),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return _prefixed(f"bd3lm-{attempt}", store)


def _prefixed(name: str, store: Any) -> Any:
    """A part of a store, whose keys begin with a name."""
    import torch.distributed as dist

    return dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Raise :class:`LostRankError` where an exchange fails because a rank is gone."""
    try:
        yield
    except Bd3lmError:
        raise
    except RuntimeError as error:
        import torch.distributed as dist

        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and "gloo" not in text:
            raise
        raise LostRankError(
            "another rank has ended or cannot be reached, so this one ends too; the message of "
            f"the other says why ({text[:120]})"
        ) from error


def _portable(error: Exception | None) -> Any:
    """An error that survives the way to another process."""
    if error is None or isinstance(error, (Bd3lmError, OSError, MemoryError)):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _as_seen(error: Exception, own: Exception | None, mine: bool) -> Exception:
    """An error as this rank raises it; that of another rank is marked, and printed there."""
    if mine and own is not None:
        return own
    error.elsewhere = True  # type: ignore[attr-defined]
    return error
