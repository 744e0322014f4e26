"""Rows and their noise do not depend on the number of ranks, nor does the place of a process."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bd3lm.config import ParallelConfig, TrainConfig
from bd3lm.data import Loader, NoiseSpec, Prefetcher, Rows, Schedule
from bd3lm.data.rows import Batch
from bd3lm.errors import ConfigError
from bd3lm.ranks.group import ALONE, Ranks
from bd3lm.ranks.place import Place, find_place
from bd3lm.training.parallel import check_ranks, micro_batches
from tests.conftest import token_arrays

L, S = 32, 4
SPECS = {
    "count": NoiseSpec(Schedule("loglinear"), estimator="count"),
    "bernoulli": NoiseSpec(Schedule("cosine"), estimator="bernoulli", clip=(0.3, 0.8)),
    "full": NoiseSpec(Schedule("loglinear"), estimator="full"),
}


def joined(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The batch that consecutive parts are of."""
    fields = ("x0", "xt", "mask_prob", "weight")
    found = {name: torch.cat([getattr(b, name) for b in batches]) for name in fields}
    first, masked = 0, []
    for batch in batches:
        masked.append(batch.masked + first * L)
        first += len(batch.x0)
    return found | {"masked": torch.cat(masked)}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [16, 21])
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_and_noise_are_the_same_on_any_number_of_ranks(
    name: str, rows: int, parts: int
) -> None:
    data = Rows(token_arrays(5000), seq_len=L, block_size=S)
    loader = Loader(data, rows, seed=5)
    for step in (0, 7):
        whole = joined([loader.batch(step, SPECS[name])])
        for ranks in (1, 2, 3, 8):
            found: dict[int, Batch] = {}
            tokens = 0
            for rank in range(ranks):
                batches = Prefetcher(loader, 9, parts, rank=(rank, ranks))
                made = batches.get(step, lambda step, name=name: SPECS[name])
                for index, batch in enumerate(made):
                    found[index * ranks + rank] = batch
                    tokens += batch.num_noisable
                batches.close()
            sizes = [len(batch.x0) for batch in found.values()]
            assert max(sizes) - min(sizes) <= 1
            again = joined([found[index] for index in sorted(found)])
            assert all(torch.equal(again[field], whole[field]) for field in whole)
            assert tokens == loader.batch(step, SPECS[name]).num_noisable


def test_rows_in_the_order_of_the_data() -> None:
    """Without shuffling every epoch visits the rows from the first to the last."""
    data = Rows(token_arrays(1000), seq_len=L, block_size=S)
    loader = Loader(data, 10, seed=5, shuffle=False)
    steps = 2 * len(data) // 10 + 1
    parts = [
        loader.batch(step, SPECS["full"], part=(i, 2)).x0 for step in range(steps) for i in (0, 1)
    ]
    found = torch.cat(parts)[: 2 * len(data)]
    once = data.batch(np.arange(len(data), dtype=np.uint64)).x0
    assert torch.equal(found, torch.cat([once, once]))


def test_micro_batches_are_as_few_as_fit() -> None:
    cfg = TrainConfig(batch_size=512, micro_batch=32)
    assert [micro_batches(cfg, ranks) for ranks in (1, 2, 3, 8, 16, 512)] == [16, 8, 6, 2, 1, 1]
    assert micro_batches(dataclasses.replace(cfg, micro_batch=None), 7) == 1
    with pytest.raises(ConfigError, match="batch-size = 512: must be at least 513, one row for"):
        micro_batches(cfg, 513)


def test_settings_that_the_number_of_ranks_does_not_allow() -> None:
    many = Ranks(Place(0, 6))
    copies = ParallelConfig(strategy="fsdp", replicas=4)
    cfg = TrainConfig(parallel=copies)
    with pytest.raises(ConfigError, match=r"parallel.replicas = 4: must be a divisor of .* 6"):
        check_ranks(cfg, many)
    check_ranks(cfg, ALONE)
    for settings in ({"replicas": 2}, {"offload": True}, {"timeout_minutes": 0.0}):
        with pytest.raises(ConfigError, match=r"^parallel\."):
            ParallelConfig(**settings)


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "123456",
}


def test_the_place_of_a_process() -> None:
    assert find_place({}) == Place(0, 1, 0, "127.0.0.1", 29_500)
    assert find_place(TORCHRUN) == Place(3, 4, 1, "node1", 29_400)
    assert find_place(SLURM) == Place(9, 16, 1, "gpu003", 15_000 + 123456 % 15_000)
    assert find_place(SLURM | TORCHRUN) == find_place(TORCHRUN)  # srun torchrun
    named = find_place(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert (named.address, named.port) == ("10.0.0.1", 5000)
    alone = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}  # a batch script
    assert find_place(alone).size == find_place(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}).size == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR = : must be set in the environment of every rank"),
        ({"RANK": "4"}, "RANK = 4: must be a whole number from 0 to 3"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE = four: must be a whole number from 1 to"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT = 99999: must be a whole number from 1 to 65535"),
    ],
)
def test_an_environment_that_is_not_complete(change: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        find_place(TORCHRUN | change)
    without = {k: v for k, v in TORCHRUN.items() if k not in change}
    if "WORLD_SIZE" not in change and "RANK" not in change:
        with pytest.raises(ConfigError, match=r"\(not given\): must be set"):
            find_place(without)
