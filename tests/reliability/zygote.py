"""Trainers in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

_SERVER = """
import ctypes, faulthandler, json, os, resource, sys
import torch
from pathlib import Path
from bd3lm.config import TrainConfig, from_dict
from bd3lm.errors import Bd3lmError
from bd3lm.training import run_training
from tests.integration.conftest import Silent

torch.set_num_threads(1)

def train(order):
    log = open(order["log"], "a", buffering=1)
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    faulthandler.enable()
    os.environ.update(order["env"])
    names = globals() | {"order": order}
    exec(order["patch"], names)
    if order["memory"] is not None:
        # A stack that cannot grow any more is a SIGSEGV, whoever needs it: it is grown before.
        call = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda n: call(n - 1) if n else None)
        call(400)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + order["memory"],) * 2)
    try:
        if "main" in names:
            names["main"]()
            sys.stdout.flush()
            os._exit(0)
        config = from_dict(TrainConfig, order["config"])
        run_training(config, Path(order["out"]), Silent(), resume=order["resume"])
    except Bd3lmError as error:
        print(f"error: {error}")
        os._exit(error.exit_code)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            train(order)
    print(answer, flush=True)
"""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Zygote:
    """Starts trainers; each needs a few hundred milliseconds instead of seconds of imports."""

    def __init__(self, imports: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", imports + _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(
        self,
        config: dict[str, Any],
        out: Path,
        log: Path,
        *,
        resume: bool = True,
        memory: int | None = None,
        env: dict[str, str] | None = None,
        patch: str = "",
    ) -> int:
        """Begin or resume a run; returns the process's number.

        Args:
            config: the settings.
            out: directory of the run.
            log: file for its output.
            resume: continue what is there.
            memory: bytes of address space that it may add to those of the server.
            env: variables of its environment.
            patch: Python code that it runs first. If it defines ``main``, that is run instead.
        """
        order = {"config": config, "out": str(out), "log": str(log), "resume": resume}
        return self._ask(order | {"memory": memory, "env": env or {}, "patch": patch})

    def job(
        self, ranks: int, config: dict[str, Any], out: Path, log: Path, *, patch: str = ""
    ) -> list[int]:
        """Begin or resume a run on several ranks, as ``torchrun`` does."""
        job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        job |= {"MASTER_PORT": str(free_port())}
        places = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        return [self.start(config, out, log, env=env, patch=patch) for env in places]

    def step(
        self, ranks: int, config: dict[str, Any], out: Path, log: Path, *, job: int
    ) -> list[int]:
        """Begin or resume a run on several ranks, as ``srun`` does in a job of this number."""
        step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(ranks)}
        step |= {"SLURM_STEP_NUM_TASKS": str(ranks), "SLURM_STEP_NODELIST": "localhost"}
        places = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(ranks)]
        return [self.start(config, out, log, env=env) for env in places]

    def wait(self, number: int) -> int:
        """Wait for a trainer; returns its exit code, negative after a signal."""
        return self._ask({"wait": number})

    def close(self) -> None:
        """End the server; trainers that still run are left alone."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())
