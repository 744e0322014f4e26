"""The place of this process among those that ``torchrun`` or Slurm started; no PyTorch needed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from bd3lm.errors import ConfigError

FIRST_PORT, PORTS = 15_000, 15_000
"""Ports of Slurm jobs without a ``MASTER_PORT``: one for each of so many jobs in a row."""


class Place(NamedTuple):
    """One process of a job.

    Attributes:
        rank: number of the process, from 0.
        size: number of processes.
        local: its number on its machine, which is the number of its GPU.
        address: machine of rank 0.
        port: on which rank 0 listens.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    address: str = "127.0.0.1"
    port: int = 29_500


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Read the variables of ``torchrun`` or, without them, those of a Slurm job step.

    ``srun`` with one task, and a batch script itself, are one process.

    Args:
        environment: variables; None: those of this process.

    Raises:
        ConfigError: a variable that is missing or no number in its range.

    >>> find_place({}).size
    1
    >>> find_place({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    ...             "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "42"})
    Place(rank=5, size=8, local=1, address='gpu07', port=15042)
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        size = _number(env, "WORLD_SIZE", 1)
        if size == 1:
            return Place()
        return Place(
            rank=_number(env, "RANK", 0, size - 1),
            size=size,
            local=_number(env, "LOCAL_RANK", 0, size - 1),
            address=_text(env, "MASTER_ADDR"),
            port=_number(env, "MASTER_PORT", 1, 65_535),
        )
    if env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return Place()
    size = _number(env, "SLURM_STEP_NUM_TASKS", 1)
    address = env.get("MASTER_ADDR") or first_host(_text(env, "SLURM_STEP_NODELIST"))
    port = FIRST_PORT + _number(env, "SLURM_JOB_ID", 0) % PORTS
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT", 1, 65_535)
    return Place(
        rank=_number(env, "SLURM_PROCID", 0, size - 1),
        size=size,
        local=_number(env, "SLURM_LOCALID", 0, size - 1),
        address=address,
        port=port,
    )


def first_host(nodes: str) -> str:
    """Name of the first machine of a Slurm node list.

    >>> [first_host(x) for x in ("a1,a2", "gpu[007-010,12]", "r[1,3]n5,x")]
    ['a1', 'gpu007', 'r1n5']
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    name = nodes if first is None else first[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name)


def _text(env: Mapping[str, str], name: str) -> str:
    value = env.get(name)
    if not value:
        raise ConfigError(name, value, "set in the environment of every rank, as torchrun does")
    return value


def _number(env: Mapping[str, str], name: str, low: int, high: int = 2**31) -> int:
    text = _text(env, name)
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise ConfigError(name, text, f"a whole number from {low} to {high}")
    return int(text)
