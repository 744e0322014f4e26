"""Runs on several ranks: they are the run of one rank, and end together.

The ranks are processes on this machine that exchange tensors by gloo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bd3lm.checkpoint import load_checkpoint
from bd3lm.checkpoint.native import read_meta
from bd3lm.checkpoint.sharded import ShardFiles
from bd3lm.checkpoint.steps import find_checkpoint
from bd3lm.config import ObjectiveConfig, TrainConfig, preset, to_dict
from bd3lm.errors import CheckpointError
from bd3lm.model.scaling import rank_cost
from bd3lm.training import read_metrics
from tests.reliability.test_kills import IN_BACKGROUND, assert_same_run, state_of
from tests.reliability.zygote import Zygote, free_port

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)

IMPORTS = """
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor
import torch.nn.parallel
from torch.distributed.device_mesh import init_device_mesh
"""


@pytest.fixture(scope="module")
def zygote():
    server = Zygote(IMPORTS)
    yield server
    server.close()


@pytest.fixture(scope="module")
def exact(small: TrainConfig) -> TrainConfig:
    """Settings in float32, whose sums differ by rounding alone."""
    return dataclasses.replace(small, precision="fp32")


def finish(zygote, processes):
    """Exit codes of a job."""
    return [zygote.wait(process) for process in processes]


def run(zygote, ranks, config, out, *, patch=""):
    """Train on so many ranks."""
    log = out.with_suffix(".log")
    codes = finish(zygote, zygote.job(ranks, to_dict(config), out, log, patch=patch))
    assert codes == [0] * ranks, log.read_text()
    return out


def stopped(zygote, ranks, config, out):
    """Train on so many ranks until rank 0 gets a signal in step 6."""
    patch = """
import signal
from bd3lm.training.trainer import Trainer
after = Trainer._after_step
def signalled(self, window):
    after(self, window)
    if self.steps_done == 6 and self.ranks.first:
        os.kill(os.getpid(), signal.SIGTERM)
Trainer._after_step = signalled
"""
    log = out.with_suffix(".log")
    codes = finish(zygote, zygote.job(ranks, to_dict(config), out, log, patch=patch))
    assert codes == [128 + signal.SIGTERM] * ranks, log.read_text()
    assert load_checkpoint(out).step == 6
    return out


def losses(out: Path) -> list[float]:
    return [m["loss"] for m in read_metrics(out / "metrics.jsonl") if "loss" in m]


def assert_same_curve(one: Path, many: Path, tolerance: float = 1e-5) -> None:
    first, second = losses(one), losses(many)
    assert len(first) == len(second)
    assert second == pytest.approx(first, rel=0, abs=tolerance)
    bounds = [json.loads((out / "summary.json").read_text())["val_nelbo"] for out in (one, many)]
    assert bounds[1] == pytest.approx(bounds[0], rel=0, abs=10 * tolerance)
    shapes = [{k: v.shape for k, v in state_of(out).items()} for out in (one, many)]
    assert shapes[0] == shapes[1]


def parallel(config, **changes):
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **changes))


def optimized(config, name):
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, optimizer=name))


# --- the same run -------------------------------------------------------------------------------


def test_two_ranks_train_as_one_and_one_goes_on(zygote, exact, tmp_path):
    """DDP, learned noise, validation on both; then the second half on one rank."""
    noise = dataclasses.replace(exact.noise, fit_counts=True)
    config = optimized(dataclasses.replace(exact, noise=noise, batch_size=5), "adamw")
    one = run(zygote, 1, config, tmp_path / "one")
    many = run(zygote, 2, config, tmp_path / "many")
    assert_same_curve(one, many)
    lines = [m for m in read_metrics(many / "metrics.jsonl") if "loss" in m]
    assert all(line["skew"] >= 0 for line in lines)
    assert_same_curve(one, run(zygote, 1, config, stopped(zygote, 2, config, tmp_path / "half")))


def test_three_ranks_share_one_model_and_one_continues(zygote, exact, tmp_path):
    """FSDP2 and Muon; eight rows in two micro-batches for each of three ranks.

    Their checkpoint is in shards, whose damage is named.
    """
    config = dataclasses.replace(optimized(exact, "muon"), batch_size=8)
    one = run(zygote, 1, config, tmp_path / "one")
    shared = dataclasses.replace(parallel(config, strategy="fsdp"), micro_batch=2)
    half = stopped(zygote, 3, shared, tmp_path / "half")
    check_damage(half, tmp_path / "copy")
    assert_same_curve(one, run(zygote, 1, shared, half))


def check_damage(out: Path, copy: Path) -> None:
    folder = find_checkpoint(out)
    files = sorted((folder / "training").iterdir())
    assert len(files) == 3
    assert not (folder / "training.safetensors").exists()

    def damaged(change, message):
        shutil.rmtree(copy, ignore_errors=True)
        change(Path(shutil.copytree(folder, copy)) / "training" / files[1].name)
        with pytest.raises(CheckpointError, match=message):
            read_meta(copy).training()

    damaged(lambda file: file.unlink(), f"{files[1].name} is missing from the checkpoint")
    damaged(lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "its SHA-256 is not")
    damaged(lambda file: shutil.copy(file, f"{file}.more"), "more is not named in the config.json")
    (copy / "training" / files[1].name).unlink()
    with pytest.raises(CheckpointError, match=r"lacks a part of|cannot be read"):
        ShardFiles(copy / "training")
    for file in files:
        target = copy / "training" / file.name
        target.write_bytes(file.read_bytes().replace(b"saved_offsets", b"saved_offset_", 1))
    with pytest.raises(CheckpointError, match="cannot be read"):
        ShardFiles(copy / "training")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 3), (2, 3), (4, 2)])
def test_the_state_of_some_ranks_is_read_by_others(zygote, exact, tmp_path, first, second):
    config = parallel(dataclasses.replace(exact, batch_size=8), strategy="fsdp")
    one = run(zygote, 1, config, tmp_path / "one")
    half = stopped(zygote, first, config, tmp_path / "half")
    assert_same_curve(one, run(zygote, second, config, half))


COUNT = """
import json
from torch.utils._python_dispatch import TorchDispatchMode
from bd3lm.training.trainer import Trainer
from bd3lm.training.shards import local

class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            name = str(func).split(".")[1].strip("_")
            tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
            size = max([x.nbytes for x in tensors if isinstance(x, torch.Tensor)] or [0])
            if name == "allreduce":
                size = sum(x.nbytes for x in args[0])
            if name == "alltoall_base":  # bytes to the others
                size = sum(args[4]) - args[4][int(os.environ["RANK"])]
            self.found[name] = self.found.get(name, 0) + size
        return func(*args, **(kwargs or {}))

step = Trainer.step
def counted(self):
    if self.steps_done != 3:
        return step(self)
    with Count() as count:
        result = step(self)
    kept = [*self.model.parameters(), *self.ema.weights.values()]
    kept += self.optimizers.state().values()
    held = sum(local(tensor).nbytes for tensor in kept)
    held += sum(local(p).nbytes for p in self.model.parameters())  # a gradient each
    file = order["out"] + f"/count-{os.environ['RANK']}"
    open(file, "w").write(json.dumps({"held": held, **count.found}))
    return result
Trainer.step = counted
"""


@pytest.mark.parametrize(("strategy", "views"), [("ddp", 1), ("fsdp", 1), ("fsdp", 4)])
def test_memory_and_traffic_are_those_on_paper(zygote, exact, tmp_path, strategy, views):
    ranks = 2
    config = dataclasses.replace(parallel(optimized(exact, "muon"), strategy=strategy), steps=4)
    model = dataclasses.replace(config.model, depth=3)
    objective = ObjectiveConfig(views=views)
    config = dataclasses.replace(config, model=model, objective=objective)
    out = run(zygote, ranks, config, tmp_path / "run", patch=COUNT)
    model = load_checkpoint(out).model
    paper = rank_cost(config, model, ranks, item=4)
    counts = [json.loads((out / f"count-{rank}").read_text()) for rank in range(ranks)]
    assert max(c.pop("held") for c in counts) == pytest.approx(paper.state, rel=0.02)
    for count in counts:
        # In a ring of two a rank sends half of the bytes, and all of them for an all-reduce.
        gathered = sum(v for k, v in count.items() if "allgather" in k or "reduce_scatter" in k)
        exchanged = count.get("alltoall_base", 0)
        added = count.get("allreduce", 0)
        sent = gathered // 2 + exchanged + added
        assert sent == pytest.approx(paper.sent + paper.sent_far, rel=0.05), count


def test_views_share_a_clean_stream_on_two_ranks_as_on_one(zygote, exact, tmp_path):
    """Under FSDP each layer is gathered for the clean stream, and again for the noised ones."""
    model = dataclasses.replace(exact.model, previous_tokens=2)
    config = dataclasses.replace(
        exact, steps=5, model=model, objective=ObjectiveConfig(views=4), checkpoint_every=5
    )
    one = run(zygote, 1, config, tmp_path / "one")
    for strategy in ("ddp", "fsdp"):
        shared = parallel(config, strategy=strategy)
        assert_same_curve(one, run(zygote, 2, shared, tmp_path / strategy))


SYSTEMS = ("bd3lm", "mdlm", "sedd", "ar", "joint")


def of_system(config, system):
    if system == "joint":  # blocks of two sizes, a next-token loss, learned counts
        return dataclasses.replace(
            config,
            objective=ObjectiveConfig(ar_weight=0.5, ar_steps=5, block_sizes=(2, 4)),
            noise=dataclasses.replace(config.noise, fit_counts=True),
            model=dataclasses.replace(config.model, clean_stream="causal"),
        )
    theirs = preset("demo", system)
    model = dataclasses.replace(theirs.model, width=16, depth=2, heads=2)
    return dataclasses.replace(
        config, system=system, block_size=theirs.block_size, noise=theirs.noise, model=model
    )


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fifty_steps_on_two_three_and_four_ranks(zygote, exact, tmp_path, system, optimizer):
    config = dataclasses.replace(exact, steps=50, batch_size=9, checkpoint_every=50)
    config = optimized(of_system(config, system), optimizer)
    # At the demo's rates such a model amplifies a rounding error tenfold in 50 steps.
    optim = dataclasses.replace(config.optim, lr=1e-3, matrix_lr=5e-3)
    config = dataclasses.replace(config, optim=optim)
    one = run(zygote, 1, config, tmp_path / "one")
    for strategy in ("ddp", "fsdp"):
        for ranks in (2, 3, 4):
            name = f"{strategy}{ranks}"
            shared = parallel(config, strategy=strategy)
            assert_same_curve(one, run(zygote, ranks, shared, tmp_path / name))


@pytest.mark.slow
def test_two_copies_of_two_shards(zygote, exact, tmp_path):
    config = optimized(dataclasses.replace(exact, steps=50), "muon")
    one = run(zygote, 1, config, tmp_path / "one")
    shared = parallel(config, strategy="fsdp", replicas=2)
    assert_same_curve(one, run(zygote, 4, shared, tmp_path / "four"))


COMPILED = """
import torch._dynamo
from bd3lm.model import transformer
from bd3lm.training.trainer import Trainer

transformer.COMPILER = "aot_eager"
after = Trainer._after_step
def counted(self, window):
    after(self, window)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with open(order["out"] + "/graphs-" + os.environ["RANK"], "a") as file:
        print(graphs, file=file)
Trainer._after_step = counted
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"precision": "bf16"}])
def test_blocks_that_are_compiled_behind_the_hooks_of_fsdp(zygote, exact, tmp_path, options):
    """Each part of a block is compiled once, by every rank; the losses are those without it."""
    model = dataclasses.replace(exact.model, depth=3)
    config = parallel(dataclasses.replace(exact, model=model, batch_size=6), strategy="fsdp")
    config = dataclasses.replace(config, **options)
    plain = run(zygote, 2, config, tmp_path / "plain")
    compiled = dataclasses.replace(config, compile=True)
    made = run(zygote, 2, compiled, tmp_path / "compiled", patch=COMPILED)
    rounding = 0.02 if config.precision == "bf16" else 1e-5
    assert losses(made) == pytest.approx(losses(plain), rel=0, abs=rounding)
    for rank in range(2):
        counts = [int(line) for line in (made / f"graphs-{rank}").read_text().split()]
        assert len(counts) == config.steps
        assert 0 < counts[0] <= 6  # two parts of a middle block, of the last one, and between
        assert counts[-1] == counts[0]


# --- scores and samples -------------------------------------------------------------------------


def printed(zygote, ranks, command, words, log):
    """Lines that a command prints on so many ranks, as JSON."""
    main = f"""
def main():
    from bd3lm.cli.{command} import main as command
    command({[str(word) for word in words]!r})
"""
    codes = finish(zygote, zygote.job(ranks, {}, log, log, patch=main))
    assert codes == [0] * ranks, log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize(
    "options",
    ["--estimator exact --variance", "--likelihood confidence", "--estimator stratified --rows 7"],
)
def test_scores_are_those_of_one_rank(zygote, trained, tmp_path, options):
    words = [trained, "--json", "--batch-size", 2, "--device", "cpu", *options.split()]
    one, many = (
        printed(zygote, ranks, "evaluate", words, tmp_path / f"{ranks}.log") for ranks in (1, 3)
    )
    assert one == many
    assert len(one) == 1


def test_samples_are_those_of_one_rank(zygote, trained, tmp_path):
    words = [trained, "--json", "--batch-size", 2, "--num", 7, "--length", 12, "--device", "cpu"]
    one, many = (
        printed(zygote, ranks, "sample", words, tmp_path / f"{ranks}.log") for ranks in (1, 2)
    )
    assert one == many
    assert [line["index"] for line in one] == list(range(7))


@pytest.mark.slow
def test_torchrun_starts_every_command(exact, tmp_path):
    """The commands of docs/guides/several-gpus.md, in processes that torchrun starts."""

    def torchrun(*words):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        port = ["--master-port", str(free_port())]
        return subprocess.run(
            [sys.executable, *launcher, *port, "-m", "--", "bd3lm", *words],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    small = ["--data", str(exact.data), "--steps", "3", "--batch-size", "4", "--seq-len", "16"]
    small += ["--device", "cpu", "--model.width", "16", "--model.depth", "1", "--model.heads", "2"]
    small += ["--eval.every", "0", "--sample.num", "1", "--sample.length", "8"]
    done = torchrun("train", "demo", "--out", "runs/two", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_") <= 1
    scored = torchrun("eval", "runs/two/checkpoint", "--json")
    assert json.loads(scored.stdout)["step"] == 3, scored.stderr
    drawn = torchrun("sample", "runs/two/checkpoint", "--num", "3", "--length", "8", "--json")
    assert len(drawn.stdout.splitlines()) == 3, drawn.stderr
    again = torchrun("train", "demo", "--out", "runs/two", *small)
    assert again.returncode != 0
    assert again.stderr.count("error: runs/two already holds a run") == 1
    nowhere = torchrun("train", "demo", *small)
    assert "error: out (not given): must be given where several ranks train" in nowhere.stderr


# --- ends ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(exact):
    return dataclasses.replace(exact, steps=100_000, checkpoint_every=2, log_every=1)


def begun(zygote, ranks, config, out, *, patch=""):
    """A job that has saved its first checkpoint."""
    processes = zygote.job(ranks, to_dict(config), out, out.with_suffix(".log"), patch=patch)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "latest").exists():
        assert time.monotonic() < deadline, out.with_suffix(".log").read_text()
        time.sleep(0.01)
    return processes


def test_a_signal_to_one_rank_ends_all_after_the_same_step(zygote, endless, tmp_path):
    out = tmp_path / "run"
    processes = begun(zygote, 2, endless, out)
    os.kill(processes[1], signal.SIGTERM)
    assert finish(zygote, processes) == [128 + signal.SIGTERM] * 2
    message = (tmp_path / "run.log").read_text()
    assert message.count("the run is saved. Continue it with: bd3lm-train --out") == 2
    last = read_metrics(out / "metrics.jsonl")[-1]["step"]
    assert load_checkpoint(out).step == last


def test_a_rank_that_dies_ends_the_others(zygote, endless, tmp_path):
    out = tmp_path / "run"
    processes = begun(zygote, 2, endless, out)
    os.kill(processes[1], signal.SIGKILL)
    assert finish(zygote, processes) == [2, -signal.SIGKILL]
    assert (
        "error: another rank has ended or cannot be reached" in (tmp_path / "run.log").read_text()
    )
    assert load_checkpoint(out).step > 0


@pytest.mark.slow
def test_a_rank_that_does_not_run_is_named(zygote, endless, tmp_path):
    out = tmp_path / "run"
    processes = begun(zygote, 3, parallel(endless, timeout_minutes=0.1), out)
    os.kill(processes[1], signal.SIGSTOP)
    assert zygote.wait(processes[0]) == zygote.wait(processes[2]) == 2
    os.kill(processes[1], signal.SIGKILL)
    zygote.wait(processes[1])
    message = (tmp_path / "run.log").read_text()
    assert "error: no progress for 6 s: rank 1 " in message
    assert "its process has ended or does not run" in message


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_own_code_is_named(zygote, endless, tmp_path):
    patch = """
import time
from bd3lm.systems import BlockDiffusion
loss = BlockDiffusion.loss
def stuck(self, model, batch):
    if os.environ["RANK"] == "1" and os.path.exists(order["out"] + "/stop"):
        time.sleep(1000)
    return loss(self, model, batch)
BlockDiffusion.loss = stuck
"""
    out = tmp_path / "run"
    config = parallel(endless, timeout_minutes=0.1)
    processes = begun(zygote, 2, config, out, patch=patch)
    (out / "stop").touch()
    assert finish(zygote, processes) == [2, 2]
    message = (tmp_path / "run.log").read_text()
    assert "error: no progress for 6 s: rank 1 after step" in message
    assert "working in stuck" in message
    assert "rank 0" not in message


def test_a_full_disk_of_rank_0_is_the_error_of_all(zygote, exact, tmp_path):
    patch = """
import errno
from bd3lm.training import persistence
write = persistence.write_checkpoint
def full(folder, *args, step, **options):
    if step == 8:
        raise OSError(errno.ENOSPC, "No space left on device")
    write(folder, *args, step=step, **options)
persistence.write_checkpoint = full
"""
    out = tmp_path / "run"
    processes = zygote.job(2, to_dict(exact), out, tmp_path / "run.log", patch=patch)
    assert finish(zygote, processes) == [2, 2]
    assert (
        "no space left on the device. The last checkpoint is of step 4"
        in (tmp_path / "run.log").read_text()
    )
    assert load_checkpoint(out).step == 4


@pytest.mark.slow
def test_a_full_disk_of_another_rank_is_the_error_of_all(zygote, exact, tmp_path):
    patch = """
import errno
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
write = HuggingFaceStorageWriter.write_data
def full(self, plan, planner):
    if os.environ["RANK"] == "1" and "step-00000008" in str(self.path):
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(self, plan, planner)
HuggingFaceStorageWriter.write_data = full
"""
    out = tmp_path / "run"
    shared = to_dict(parallel(exact, strategy="fsdp"))
    processes = zygote.job(2, shared, out, tmp_path / "run.log", patch=patch)
    assert finish(zygote, processes) == [2, 2]
    message = (tmp_path / "run.log").read_text()
    assert "no space left on the device. The last checkpoint is of step 4" in message
    assert "Traceback" not in message
    assert load_checkpoint(out).step == 4
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["latest", "step-00000004"]


@pytest.mark.slow
def test_bad_steps_of_one_rank_are_those_of_all(zygote, exact, tmp_path):
    """One gradient of rank 1 is NaN at two steps in a row: skipped, and gone back, by both."""
    patch = """
from bd3lm.training.trainer import Trainer
accumulate, left = Trainer._accumulate, {5: 1, 6: 1}
def poisoned(self, batches, noisable):
    step = self.steps_done + 1
    if self.ranks.rank == 1 and left.pop(step, 0):
        batches[0].weight[0] = torch.nan
    return accumulate(self, batches, noisable)
Trainer._accumulate = poisoned
"""
    out = run(zygote, 2, exact, tmp_path / "run", patch=patch)
    (line,) = [m for m in read_metrics(out / "metrics.jsonl") if "rewound_from" in m]
    assert line == {"step": 4, "rewound_from": 6}
    assert_same_run(run(zygote, 2, exact, tmp_path / "clean"), out)


def test_a_directory_in_use_is_refused_on_every_rank(zygote, endless, exact, tmp_path):
    out = tmp_path / "run"
    processes = begun(zygote, 1, endless, out)
    second = zygote.job(2, to_dict(exact), out, tmp_path / "second.log")
    assert finish(zygote, second) == [2, 2]
    assert "that another process" in (tmp_path / "second.log").read_text()
    os.kill(processes[0], signal.SIGKILL)
    zygote.wait(processes[0])


# --- kills --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(exact):
    return dataclasses.replace(exact, steps=60, checkpoint_every=2)


@pytest.fixture(scope="module")
def whole(zygote, long, tmp_path_factory):
    """The run on two ranks that nothing interrupts, and how long it takes."""
    begun = time.perf_counter()
    out = run(zygote, 2, long, tmp_path_factory.mktemp("whole") / "run")
    return out, time.perf_counter() - begun


def killed(zygote, long, whole, tmp_path, count, seed, patch=""):
    """Kill one rank at random moments until so many kills met a job; resume, compare."""
    reference, seconds = whole
    draw, met, index = random.Random(seed), 0, 0
    while met < count:
        index += 1
        assert index <= 4 * count, "most jobs had ended before the kill"
        out, log = tmp_path / f"run{index}", tmp_path / f"run{index}.log"
        processes = zygote.job(2, to_dict(long), out, log, patch=patch)
        time.sleep(draw.uniform(0, seconds))
        victim = draw.randrange(2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[victim], signal.SIGKILL)
        codes = finish(zygote, processes)
        assert codes[victim] in (0, -signal.SIGKILL), log.read_text()
        assert codes[1 - victim] in (0, 2), log.read_text()
        if codes[victim] == 0:
            seconds *= 0.8  # the machine is faster than it was for the whole run
        met += codes[victim] != 0
        assert_same_run(reference, run(zygote, 2, long, out, patch=patch))


def test_a_rank_killed_at_a_random_moment(zygote, long, whole, tmp_path):
    killed(zygote, long, whole, tmp_path, 1, seed=1)


@pytest.mark.slow
def test_ranks_killed_at_25_random_moments(zygote, long, whole, tmp_path):
    killed(zygote, long, whole, tmp_path, 25, seed=2)


@pytest.mark.slow
def test_ranks_that_share_a_model_killed_at_25_random_moments(zygote, long, tmp_path):
    """Each writes its shards in the background; half-written ones are met."""
    shared = parallel(long, strategy="fsdp")
    begun = time.perf_counter()
    reference = run(zygote, 2, shared, tmp_path / "whole")
    whole = reference, time.perf_counter() - begun
    killed(zygote, shared, whole, tmp_path, 25, seed=5, patch=IN_BACKGROUND)


@pytest.mark.slow
def test_two_ranks_preempted_ten_times_and_always_resumed(zygote, long, whole, tmp_path):
    """Every rank gets the signal, as Slurm and torchrun send it, at moments of its own."""
    reference, seconds = whole
    draw, out, log = random.Random(3), tmp_path / "run", tmp_path / "run.log"
    codes = []
    for _ in range(10):
        processes = zygote.job(2, to_dict(long), out, log)
        time.sleep(draw.uniform(0.2, 0.4) * seconds)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
            time.sleep(draw.uniform(0, 0.05))
        codes += finish(zygote, processes)
    run(zygote, 2, long, out)
    assert set(codes) <= {0, 2, 128 + signal.SIGTERM}, log.read_text()
    assert_same_run(reference, out)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_slurm_job_that_is_requeued_until_it_ends(zygote, long, tmp_path, strategy):
    """The job keeps its number, hence its port; some signals come to one task alone."""
    config = parallel(long, strategy=strategy)
    draw, out, log = random.Random(11), tmp_path / "run", tmp_path / "run.log"
    reference = run(zygote, 2, config, tmp_path / "whole")
    codes, job, numbers = [], draw.randrange(10**6), (signal.SIGTERM, signal.SIGUSR1)
    while not codes or any(codes[-2:]):
        assert len(codes) < 60, log.read_text()
        processes = zygote.step(2, to_dict(config), out, log, job=job)
        number = draw.choice(numbers)
        chosen = draw.choice([processes, processes[:1], processes[1:]])
        done = lines_of(out / "metrics.jsonl")
        if draw.random() < 0.3:  # while it starts
            time.sleep(draw.uniform(0, 2))
        else:
            wait_for_lines(out / "metrics.jsonl", min(done + draw.randint(1, 15), 60))
        for process in chosen if done < 60 else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        codes += killed_if_left(zygote, processes)
    stopped = {128 + number for number in numbers}
    assert sum(code in stopped for code in codes) >= 4, log.read_text()
    # A task that begins dies of the signal; PyTorch's C++ code aborts where it is interrupted.
    died = {-signal.SIGKILL, -signal.SIGABRT, *(-number for number in numbers)}
    assert set(codes) <= {0, 2, *stopped, *died}, log.read_text()
    assert_same_run(reference, out)


def killed_if_left(zygote, processes):
    """Exit codes of tasks, as srun --kill-on-bad-exit gives them 30 s after the first has ended.

    Where one ended before all were connected, the others wait for it.
    """

    def kill():
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    timer = threading.Timer(30, kill)
    timer.start()
    try:
        return finish(zygote, processes)
    finally:
        timer.cancel()


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_lines(file: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while lines_of(file) < count:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)
