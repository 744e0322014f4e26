"""Interleaved runs of ours and the peer, on a machine that others may use meanwhile."""

from __future__ import annotations

import itertools
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Step = Callable[[], Any]

OTHERS = 0.05
"""Share of the machine that other processes may take before a run is made again."""
TRIES = 5


@dataclass(frozen=True)
class Cost:
    """One call: seconds of wall time, of processor time, and the others' share of all cores."""

    wall: float
    cpu: float
    others: float


@dataclass
class Result:
    """One comparison; each run of the peer's has one of ours before it and one after."""

    work: str
    peer_name: str
    tokens: int
    goal: float | None
    floor: float | None
    ours: list[Cost] = field(default_factory=list)
    peer: list[Cost] = field(default_factory=list)

    def ratios(self, of: str = "wall") -> list[float]:
        """Each peer's run over the mean of ours before and after it."""
        ours = [getattr(cost, of) for cost in self.ours]
        beside = [(a + b) / 2 for a, b in itertools.pairwise(ours)]
        return [getattr(b, of) / a for a, b in zip(beside, self.peer, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Figures of a table: medians, and the least and the largest ratio."""
        ratios, others = self.ratios(), [c.others for c in (*self.ours, *self.peer)]
        return {
            "work": self.work,
            "peer_name": self.peer_name,
            "tokens": self.tokens,
            "ours_tokens_per_second": self.tokens / statistics.median(c.wall for c in self.ours),
            "peer_tokens_per_second": self.tokens / statistics.median(c.wall for c in self.peer),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "ratio_of_cpu_seconds": statistics.median(self.ratios("cpu")),
            "runs": len(self.peer),
            "others_max": max(others),
            "goal": self.goal,
            "floor": self.floor,
            "ours": [asdict(cost) for cost in self.ours],
            "peer": [asdict(cost) for cost in self.peer],
        }


def _own() -> float:
    """Processor seconds of this process and the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _all() -> float | None:
    """Processor seconds of everything on the machine, stolen ones included; None where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(
        int, stat.read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(step: Step, calls: int = 1) -> Cost:
    """The mean cost of some calls in a row."""
    everything, own, start = _all(), _own(), time.perf_counter()
    for _ in range(calls):
        step()
    wall, own = time.perf_counter() - start, _own() - own
    now = _all()
    share = 0.0
    if everything is not None and now is not None:
        share = max(0.0, now - everything - own) / (wall * (os.cpu_count() or 1))
    return Cost(wall / calls, own / calls, round(share, 3))


def undisturbed(step: Step, calls: int, tries: int) -> Cost:
    """The least disturbed of some tries; the first that others left alone."""
    runs: list[Cost] = []
    for _ in range(tries):
        os.sync()  # writes that earlier runs left pending must not fall into this one
        runs.append(measure(step, calls))
        if runs[-1].others <= OTHERS:
            break
    return min(runs, key=lambda run: run.others)


def enough(step: Step, seconds: float) -> int:
    """Number of calls that take about so long; they warm up as well."""
    calls = 1
    while (run := measure(step, calls)).wall * calls < seconds / 2:
        calls *= 2
    return max(1, round(seconds / run.wall))


def compare(
    work: str,
    peer_name: str,
    tokens: int,
    ours: Step,
    peer: Step,
    *,
    repeats: int,
    bounds: tuple[float | None, float | None] = (None, None),
    cold: bool = False,
) -> Result:
    """Interleave runs of both, ours first and last; a run that others disturbed is made again.

    A run repeats its call for about half a second. With ``cold``, for work that is never
    repeated in practice, nothing is warmed up, a run of ours is three calls and one of the peer's
    a single one, made once whoever disturbs it.
    """
    result = Result(work, peer_name, tokens, *bounds)
    mine, theirs = (3, 1) if cold else (enough(ours, 0.5), enough(peer, 0.5))
    result.ours.append(undisturbed(ours, mine, TRIES))
    for _ in range(repeats):
        result.peer.append(undisturbed(peer, theirs, 1 if cold else TRIES))
        result.ours.append(undisturbed(ours, mine, TRIES))
    show(result.summary())
    return result


HEADER = (
    f"{'work':36} {'peer':28} {'ours':>9} {'peer':>8} {'ratio':>8}  spread, cpu ratio, goal/floor "
    "(Mtokens/s)"
)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    goal = "" if row["goal"] is None else f" [{row['goal']:g}/{row['floor']:g}]"
    print(
        f"{row['work']:36} {row['peer_name']:28} {row['ours_tokens_per_second'] / 1e6:9.1f} "
        f"{row['peer_tokens_per_second'] / 1e6:8.2f} {row['ratio']:7.1f}x  "
        f"{row['ratio_min']:.1f}-{row['ratio_max']:.1f}, "
        f"cpu {row['ratio_of_cpu_seconds']:.1f}x{goal}; others took up to {row['others_max']:.0%}",
        flush=True,
    )


def skip(work: str, reason: str) -> None:
    """Say why something is not measured."""
    print(f"{work:36} skipped: {reason}", flush=True)
