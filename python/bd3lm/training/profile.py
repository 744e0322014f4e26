"""Profile of a training step by component, on the CPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")

WARM_UP, STEPS = 3, 5
"""Steps before those that are profiled, and how many of them."""

DATA, AVERAGE = "bd3lm::data", "bd3lm::average"
"""Labels that the trainer puts around its own work."""

_COMPONENTS = {
    "data": (DATA,),
    "weight average": (AVERAGE,),
    "optimizer": ("Optimizer.", "adamw", "clip_grad", "linalg_vector_norm"),
    "head and loss": ("_ChunkedLoss",),
    "attention": ("_attention", "BlockAttention", "scaled_dot_product"),
    "embedding": ("embedding",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    # A product inside one of these is a product, by the line above.
    "activations": ("ActivatedLinear", "gelu", "SquaredRelu", "silu"),
    "rotations": ("ProjectedHeads", "Rotated"),
    "norms": ("Normalised", "layer_norm", "rms_norm"),
    "dropout and sums": ("Dropout", "dropout"),
}
OTHER, PYTHON = "casts and others", "Python"


class Profile(NamedTuple):
    """Seconds a step, and of them those of each component, most first."""

    seconds: float
    components: dict[str, float]


def component_of(event: FunctionEvent) -> str:
    """The first component that the event, or an operation around it, belongs to.

    So a matrix product inside the head's loss or Muon is theirs.
    """
    around: list[str] = []
    at: FunctionEvent | None = event
    while at is not None:
        around.append(at.name)
        at = at.cpu_parent
    for component, names in _COMPONENTS.items():
        if any(name in operation for name in names for operation in around):
            return component
    return OTHER


class StepProfiler:
    """Runs a few steps of a run under PyTorch's profiler, the others as they are.

    Args:
        steps: that the run has left; a short run is profiled from its first step on.
    """

    def __init__(self, steps: int) -> None:
        self._wait = min(WARM_UP, max(steps - STEPS, 0))
        self._left = min(STEPS, steps)
        self._seconds: list[float] = []
        self._components: defaultdict[str, float] = defaultdict(float)

    def run(self, step: Callable[[], T]) -> T:
        """Run one step, and watch it if it is one of those."""
        if self._wait or not self._left:
            self._wait = max(self._wait - 1, 0)
            return step()
        self._left -= 1
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            begun = time.perf_counter()
            result = step()
            self._seconds.append(time.perf_counter() - begun)
        events: Any = watched.events()
        inside = 0.0
        for event in events:
            inside += event.self_cpu_time_total
            self._components[component_of(event)] += event.self_cpu_time_total / 1e6
        self._components[PYTHON] += max(self._seconds[-1] - inside / 1e6, 0.0)
        return result

    def result(self) -> Profile:
        """Means over the steps that were watched, of which there was at least one."""
        steps = len(self._seconds)
        most_first = sorted(self._components.items(), key=lambda item: -item[1])
        parts = {name: value / steps for name, value in most_first}
        return Profile(sum(self._seconds) / steps, parts)
