"""The threads of the Rust kernels: PyTorch's, in several Python threads, and after a fork."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

from bd3lm.model import threads
from bd3lm.model.fused import activated

SIZE = (64, 4096)  # several groups of rows, so that there is something to share

FORKS = """
import os, numpy as np, torch
from bd3lm import _core
from bd3lm.model.threads import kernel_threads

torch.set_num_threads(4)
x, bias = np.ones(1 << 18, np.float32), np.zeros(4096, np.float32)
out = np.empty_like(x)
run = lambda: _core.activate("relu2", x, bias, out, kernel_threads())
run()
child = os.fork()
out[:] = 0
run()
assert out.min() == 1.0
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both")
else:
    os._exit(0)
"""


def test_a_forked_child_works_alone():
    """A child's copy of the runtime would wait for threads that were not copied."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "both"), done.stderr


def test_kernels_may_be_called_from_several_threads_at_once():
    torch.manual_seed(0)
    inputs = [torch.randn(SIZE) for _ in range(4)]
    with torch.no_grad():
        want = [activated(x, None, "gelu") for x in inputs]
        wrong = []

        def work(index):
            with torch.no_grad():
                for _ in range(30):
                    if not torch.equal(activated(inputs[index], None, "gelu"), want[index]):
                        wrong.append(index)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="no such runtime here")
def test_no_threads_of_our_own_where_pytorch_has_some():
    code = """
import os, torch
torch.set_num_threads(3)
x = torch.ones(64, 4096)
(x + x).sum()  # PyTorch has its threads now
before = len(os.listdir("/proc/self/task"))
from bd3lm.model import threads
from bd3lm.model.fused import activated
with torch.no_grad():
    activated(x, None, "gelu")
assert len(os.listdir("/proc/self/task")) == before, before
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("this system does not list the threads of a process")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Steps:
    """Replaces the watch's clock: each period takes one scripted share of a second."""

    def __init__(self, shares):
        self.shares, self.total, self.seen = list(shares), 0.0, []

    def delays(self):
        return {"1": self.total}

    def wait(self, watch):
        self.seen.append(watch.ballast is not None)
        if not self.shares:
            return True
        self.total += self.shares.pop(0)
        return False


@pytest.mark.parametrize(
    ("shares", "sleeping"),
    [
        ([0.0, 0.01, 0.0], [False, False, False, False]),
        ([0.0, 0.5, 0.4], [False, False, True, True]),
        # Three quiet periods in a row bring spinning back; one alone does not.
        ([0.5, 0.0, 0.4, 0.0, 0.0, 0.0], [False, True, True, True, True, True, False]),
    ],
)
def test_waiting_threads_sleep_while_others_need_the_cores(monkeypatch, shares, sleeping):
    steps, clock = Steps(shares), iter(range(100))
    watch = threads.Watch()
    monkeypatch.setattr(threads, "run_delays", steps.delays)
    monkeypatch.setattr(threads.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(watch, "_ended", type("E", (), {"wait": lambda _, p: steps.wait(watch)})())
    watch.run()
    assert steps.seen == sleeping
    assert watch.ballast is None


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads Linux's /proc")
def test_ballast_opens_teams_beyond_the_cores_and_ends_them():
    code = """
import os, time, torch
from bd3lm.model import threads
torch.set_num_threads(max(len(os.sched_getaffinity(0)), 2))
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.ones(1 << 20).add_(1.0)
before = tasks()
ballast = threads.Ballast()
extra = tasks() - before
assert extra >= torch.get_num_threads(), extra
ballast.release()
until = time.monotonic() + 20
while tasks() > before and time.monotonic() < until:
    time.sleep(0.01)
print(tasks() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "0\n", done.stderr


def test_nested_uses_share_one_watch():
    with threads.adaptive_waiting():
        watch = threads._State.watch
        with threads.adaptive_waiting():
            assert threads._State.watch is watch
        assert threads._State.watch is watch
    assert threads._State.watch is None
    if watch is not None:
        watch.join(20)
        assert not watch.is_alive()
