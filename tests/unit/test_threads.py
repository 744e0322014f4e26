"""The threads of the Rust kernels: PyTorch's, in several Python threads, and after a fork."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

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
    """Its copy of the runtime believes in threads that were not copied, and would wait for them."""
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
from bd3lm.model.fused import activated
with torch.no_grad():
    activated(x, None, "gelu")
assert len(os.listdir("/proc/self/task")) == before, before
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("this system does not list the threads of a process")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
