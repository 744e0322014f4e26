"""The gate runs on any machine with Triton; the exhaustive part is marked slow.

The interpreter's work is done by a child process, started when the session begins and waited for
by the tests that need it, while the compiler works in this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cases import EXHAUSTIVE, QUICK
from interpreter import DECODES, Child, job, mutation_jobs

JOBS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "quick": lambda: [job(QUICK, DECODES)],
    "mutated": mutation_jobs,
    "traced": list,
    "logits": list,
    "emulated": list,
    "emulated_exhaustive": list,
    "exhaustive": lambda: [job(EXHAUSTIVE)],
}


@pytest.fixture(scope="session", autouse=True)
def child(request: pytest.FixtureRequest) -> Iterator[Child]:
    """Child process that works on the results that collected tests wait for."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not here")
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    running = Child({name: jobs() for name, jobs in JOBS.items() if name in wanted})
    yield running
    running.kill()


@pytest.fixture(scope="session")
def answers(child: Child) -> dict[str, Any]:
    """Results of the child."""
    return child.finish()


@pytest.fixture(scope="session")
def quick(answers: dict[str, Any]) -> list[dict[str, float]]:
    """Errors of the quick cases, then of decoding."""
    return answers["quick"][0]


@pytest.fixture(scope="session")
def exhaustive(answers: dict[str, Any]) -> list[dict[str, float]]:
    """Errors of the exhaustive cases."""
    return answers["exhaustive"][0]


@pytest.fixture(scope="session")
def mutated(answers: dict[str, Any]) -> list[list[dict[str, float]]]:
    """Errors without a change, then with each mutation."""
    return answers["mutated"]


@pytest.fixture(scope="session")
def traced(answers: dict[str, Any]) -> dict[str, Any]:
    """Findings of :mod:`traced`."""
    return answers["traced"]


@pytest.fixture(scope="session")
def logits(answers: dict[str, Any]) -> dict[str, Any]:
    """Findings of :mod:`logits`."""
    return answers["logits"]


@pytest.fixture(scope="session")
def emulated(answers: dict[str, Any]) -> dict[str, Any]:
    """Findings of :func:`emulated.run`."""
    return answers["emulated"]


@pytest.fixture(scope="session")
def emulated_exhaustive(answers: dict[str, Any]) -> dict[str, Any]:
    """Findings of :func:`emulated.run_exhaustive`."""
    return answers["emulated_exhaustive"]
