"""The first minutes on a GPU: is it right, and how fast is it. One command, at most six minutes.

``first_run.py run`` starts a process for every section, most important first, each with a time cap
of its own, so that a crash, a hang or a sticky CUDA error in one loses nothing of the others.
Every finding is one line of ``$OUT/results.jsonl``, written at once; ``$OUT/summary.txt`` is made
of them at the end, and ``$OUT/log.txt`` holds what the sections printed.

``first_run.py curve`` writes ``cpu_curve.json``, the losses that a CPU gets, before the GPU is
there. ``first_run.py run --rehearse`` runs every section on a CPU in Triton's interpreter over tiny
shapes: it shows that the program works and that the Python of the CUDA path is right, and nothing
about speed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checks
import kernels
import learning
import speed
from common import OUT, REHEARSE, WORK, prepare_process, record

SHARDS = 2 if REHEARSE else 6
TUNE_SHARDS = 1 if REHEARSE else 5
# name, seconds it may take, processes that run it; those of one stage run at the same time.
STAGES: list[list[tuple[str, int, int]]] = [
    [("smoke", 60, 1)],
    [("numerics", 90, SHARDS), ("pytest", 90, 1), ("warm_tune", 90, TUNE_SHARDS),
     ("warm_flex", 100, 1), ("warm_step", 100, 1), ("warm_hopper", 90, 1)],
    [("train", 50, 1)],
    [("sample", 40, 1)],
    [("attention", 75, 1)],
    [("step", 75, 1)],
    [("hopper", 45, 1)],
    [("tune", 50, 1)],
    [("speed", 45, 1)],
    [("ncu", 45, 1)],
]  # fmt: skip


SECTIONS: dict[str, Callable[..., None]] = {
    "smoke": checks.smoke, "numerics": checks.numerics, "pytest": checks.pytests,
    "train": learning.train, "sample": learning.sample, "attention": kernels.attention,
    "warm_flex": kernels.warm_flex, "warm_tune": kernels.warm_tune, "warm_step": speed.warm_step,
    "tune": kernels.tune, "step": speed.step, "speed": speed.speed, "ncu": kernels.ncu,
    "warm_hopper": kernels.warm_hopper, "hopper": kernels.hopper,
}  # fmt: skip
SHARDED = ("numerics", "warm_tune")


def die_with_parent() -> None:
    """End with the driver; a worker is a session of its own, which can be ended as a whole."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Worker:
    """Process that has imported everything and waits to be started."""

    def __init__(self, name: str, cap: int, shard: int, shards: int) -> None:
        self.name, self.label = name, f"{name}.{shard}"
        self.cap = cap * float(os.environ.get("FIRST_RUN_PATIENCE", "1"))
        self.log = (WORK / f"{self.label}.log").open("wb")
        command = [sys.executable, str(Path(__file__).resolve()), "section", name,
                   str(shard), str(shards)]  # fmt: skip
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
        if REHEARSE:
            environment["TRITON_INTERPRET"] = "1"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.log, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment, preexec_fn=die_with_parent,
        )  # fmt: skip
        self.begun = 0.0

    def go(self) -> None:
        """Start the section."""
        self.begun = time.monotonic()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()
        except OSError:  # it died on import: its log says why
            pass

    def wait(self, until: float) -> None:
        """Wait for its end; kill it when its cap or ``until`` is reached."""
        left = min(self.begun + self.cap, until) - time.monotonic()
        try:
            code: int | str = self.process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            self.kill()
            code = "out of time"
        seconds = round(time.monotonic() - self.begun, 1)
        record("driver", what=self.label, ok=code == 0, code=code, seconds=seconds)
        self.log.close()
        text = (WORK / f"{self.label}.log").read_bytes()[-60_000:]
        with (OUT / "log.txt").open("ab") as file:
            file.write(f"\n===== {self.label}: {code}, {seconds} s\n".encode() + text)

    def kill(self) -> None:
        """Kill it and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def run(budget: float, chosen: set[str] | None) -> None:
    """Run all stages in order, inside a budget of seconds."""
    begun = time.monotonic()
    until = begun + budget - 6
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(WORK / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(WORK / "inductor"))
    stages = [[s for s in stage if chosen is None or s[0] in chosen] for stage in STAGES]
    stages = [stage for stage in stages if stage]

    def made(stage: list[tuple[str, int, int]]) -> list[Worker]:
        return [Worker(n, cap, i, count) for n, cap, count in stage for i in range(count)]

    # Two stages ahead: importing takes seconds, and would be the device's time.
    waiting = [made(stage) for stage in stages[:3]]
    for index in range(len(stages)):
        workers = waiting.pop(0)
        if until - time.monotonic() < 8:
            record("driver", what="skipped", ok=False, stage=[w.label for w in workers])
            for worker in workers:
                worker.kill()
            continue
        if index + 3 < len(stages):
            waiting.append(made(stages[index + 3]))
        for worker in workers:
            worker.go()
        for worker in workers:
            worker.wait(until)
        summary()
    record("driver", what="end", ok=True, seconds=round(time.monotonic() - begun, 1))
    summary()


def summary() -> None:
    """Write a short table of all findings."""
    lines, path = [], OUT / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for name in SECTIONS:
        mine = [r for r in rows if r["section"] == name]
        if not mine:
            continue
        bad = [r for r in mine if not r.get("ok")]
        lines.append(f"{name}: {len(mine) - len(bad)} good, {len(bad)} bad")
        lines += [
            f"  BAD {r.get('what')} " + " ".join(
                f"{k}={r[k]}" for k in ("dtype", "width", "tiles", "L", "S", "worst", "error")
                if k in r)[:300] for r in bad[:12]
        ]  # fmt: skip
        worst: dict[str, float] = {}
        for r in mine:
            if "worst" in r:
                key = f"{r.get('dtype')} {r.get('width')}"
                worst[key] = max(worst.get(key, 0.0), r["worst"])
        if worst:
            lines.append("  worst: " + ", ".join(f"{k}: {v:.1e}" for k, v in worst.items()))
        keys = ("fwd_tflops", "bwd_tflops", "both_tflops", "ms", "tokens_per_second", "mfu",
                "host_ms", "tflops", "forward_ms", "draw_ms_1.0", "draw_ms_0.9", "ms_a_step",
                "first", "first_20", "largest", "same", "bf16_tflops", "copy_tbps",
                "launched_ms_a_step", "best")  # fmt: skip
        for r in mine:
            values = {k: r[k] for k in keys if k in r}
            if values and not name.startswith("warm"):
                about = " ".join(
                    f"{k}={r[k]}" for k in ("L", "S", "D", "B", "width", "tiles", "replay", "top_p")
                    if k in r)  # fmt: skip
                shown = " ".join(
                    f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                    for k, v in values.items())  # fmt: skip
                lines.append(f"  {r.get('what')} {about}: {shown}"[:400])
    (OUT / "summary.txt").write_text("\n".join(lines) + "\n")


def section(name: str, shard: int = 0, shards: int = 1) -> None:
    """Run one section in this process."""
    SECTIONS[name](*((shard, shards) if name in SHARDED else ()))


def rehearse(chosen: list[str] | None) -> None:
    """Run every section in this process, one after the other.

    Raises:
        SystemExit: a finding is bad.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    prepare_process()
    for name in chosen or [n for n in SECTIONS if n not in ("pytest", "ncu")]:
        section(name)
    summary()
    rows = [json.loads(line) for line in (OUT / "results.jsonl").read_text().splitlines()]
    bad = [row for row in rows if not row["ok"]]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(rows)} findings are bad: {bad[0]}")


def main() -> None:
    """``run``, ``rehearse``, ``curve``, or a section by itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="every section, each in a process of its own")
    runner.add_argument("--budget", type=float, default=350.0, help="seconds")
    runner.add_argument("--only", nargs="*", choices=sorted(SECTIONS))
    runner.add_argument("--rehearse", action="store_true", help="on a CPU, over tiny shapes")
    practice = commands.add_parser("rehearse", help="every section in one process, on a CPU")
    practice.add_argument("--only", nargs="*", choices=sorted(SECTIONS))
    one = commands.add_parser("section", help="one section, once a line of input comes")
    one.add_argument("name", choices=sorted(SECTIONS))
    one.add_argument("shard", type=int, nargs="?", default=0)
    one.add_argument("shards", type=int, nargs="?", default=1)
    curves = commands.add_parser("curve", help="the losses of a CPU")
    curves.add_argument("--only", nargs="*")
    args = parser.parse_args()
    if (args.command == "rehearse" or getattr(args, "rehearse", False)) and not REHEARSE:
        # Triton reads its own when it is imported.
        os.environ.update(FIRST_RUN_REHEARSE="1", TRITON_INTERPRET="1")
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if args.command == "run":
        run(args.budget, None if args.only is None else set(args.only))
        print((OUT / "summary.txt").read_text()[-9000:])
    elif args.command == "rehearse":
        rehearse(args.only)
    elif args.command == "curve":
        learning.curve(args.only)
    else:
        if args.name not in ("pytest", "ncu"):
            prepare_process()
        if sys.stdin.readline() == "go\n":  # else the driver is gone
            section(args.name, args.shard, args.shards)


if __name__ == "__main__":
    main()
