"""Host code of the GPU path, on a machine that only pretends to have one."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bd3lm.data import Loader, Prefetcher, Rows
from bd3lm.device import resolve_device
from bd3lm.errors import ConfigError
from bd3lm.evaluate import likelihood
from bd3lm.evaluate.likelihood import Measure, evaluate_likelihood
from bd3lm.evaluate.row_scorer import RowScorer
from bd3lm.model import DecodeStep, KVCache, head
from bd3lm.model.flops import data_sheet_peak, peak_flops
from bd3lm.systems import BlockDiffusion
from tests.conftest import MASK_ID, random_ids, tiny_model, token_arrays


def test_the_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small product takes less time than its launch: by it a run's MFU would be above one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda"), torch.bfloat16, 1) == 989e12
    peak_flops.cache_clear()
    assert data_sheet_peak("NVIDIA H100 PCIe") is None
    assert data_sheet_peak("NVIDIA GeForce RTX 4090") == 165e12
    assert data_sheet_peak("a part of tomorrow") is None


def test_the_device_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    with pytest.raises(ConfigError, match="below cuda:2"):
        resolve_device("cuda:2")
    assert len(current) == 1


def test_kernels_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("bd3lm.model.attention.triton.launch", exc_type=ImportError)
    entered = []

    @contextmanager
    def device(where: torch.device):
        entered.append(where)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "laid_out", lambda x: 1 / 0)
    q = torch.empty(1, 1, 4, 16)
    with pytest.raises(ZeroDivisionError):
        launch.run_forward(q, q, q, q, False, 1.0)
    with pytest.raises(ZeroDivisionError):
        launch.run_backward(q, q, q, q, q, q, q, q, False, 1.0)
    with pytest.raises(ZeroDivisionError):
        launch.run_decode(q, q, q, None, q, q, 1.0, 1)
    assert entered == [q.device] * 3


def test_the_thread_that_pins_memory_chooses_its_device_first() -> None:
    class Made(Loader):
        def __init__(self) -> None:
            self.rows = SimpleNamespace(are_remote=False)  # type: ignore[assignment]

        def batch(self, step, spec, part=(0, 1)):  # type: ignore[override]
            events.append("batch")
            return step

    events: list[str] = []
    batches = Prefetcher(Made(), 1, on_start=lambda: events.append("device"))
    assert batches.get(0, lambda step: None) == [0]  # type: ignore[arg-type]
    batches.close()
    assert events == ["device", "batch"]


def test_a_replayed_forward_past_the_cache_is_refused_on_the_host() -> None:
    """A GPU would fail an assertion on the device, after which no call works."""
    model = tiny_model()
    with torch.inference_mode():
        cache = KVCache(model.cfg, 1, 8, torch.device("cpu"))
        step = DecodeStep(model, cache, 4, model.logits)
        ids, select = random_ids(1, 4), torch.arange(4)
        step(ids, select, commit=4)
        step(ids, select, commit=4)
        with pytest.raises(ValueError, match="capacity of 12; the cache's is 8"):
            step(ids, select)


# --- scoring: nothing is read back inside a batch ---------------------------------------------


SLOW = [
    Measure(estimator="exact"),
    Measure("marginal"),
    Measure("left-to-right"),
    Measure("orders", repeats=2),
]
MEASURES = [
    Measure(estimator="stratified", repeats=2),
    Measure("confidence"),
    *(pytest.param(measure, marks=pytest.mark.slow) for measure in SLOW),
]


@pytest.fixture
def rows() -> Rows:
    return Rows(token_arrays(60), seq_len=8, block_size=4, keep_last=True)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: f"{m.likelihood} {m.estimator}")
def test_scoring_a_batch_reads_nothing_back(
    measure: Measure, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the meta device have no values to read: any attempt raises."""
    monkeypatch.setattr(head, "compute_dtype", lambda features: features.dtype)  # no autocast there
    model, numbers = tiny_model(depth=1).to("meta"), np.arange(3, dtype=np.uint64)
    batch = rows.batch(numbers)
    with torch.no_grad():
        whole = measure.likelihood == "confidence"
        scorer = RowScorer(BlockDiffusion(4, MASK_ID), model, batch, whole_distribution=whole)
        found = measure.take(scorer, batch, numbers, len(rows))
    assert found.nats.is_meta
    assert found.variance.is_meta
    with pytest.raises(NotImplementedError):
        found.nats.cpu()


def test_scores_are_read_once_a_batch_and_one_batch_late(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    take, add = Measure.take, likelihood._Totals.add

    def taken(self, *arguments):
        events.append("score")
        return take(self, *arguments)

    def added(self, *arguments):
        events.append("read")
        return add(self, *arguments)

    monkeypatch.setattr(Measure, "take", taken)
    monkeypatch.setattr(likelihood._Totals, "add", added)
    done: list[int] = []
    system = BlockDiffusion(4, MASK_ID)
    evaluate_likelihood(
        system, tiny_model(), rows, batch_size=3, max_rows=7, progress=lambda n, _: done.append(n)
    )
    assert events == ["score", "score", "read", "score", "read", "read"]
    assert done == [3, 6, 7]
