"""The training step as a device sees it: batches made ahead, and a host that never waits."""

import dataclasses
import signal
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bd3lm.model.head as head
import bd3lm.model.transformer as transformer
import bd3lm.systems.learned_noise as learned
from bd3lm.config import NoiseConfig, preset
from bd3lm.data import Loader, Prefetcher, Rows
from bd3lm.data.prefetch import AHEAD
from bd3lm.data.resolve import open_splits
from bd3lm.errors import ConfigError, InterruptedRunError
from bd3lm.model import Transformer
from bd3lm.model.cross_entropy import composed_cross_entropy_
from bd3lm.systems import build_system
from bd3lm.training import Trainer
from tests.integration.conftest import Silent


@pytest.fixture
def splits(config, tmp_path):
    return open_splits(config.data, None, "default", tmp_path / "work", print)


@pytest.fixture
def trainer(config, splits, tmp_path):
    return Trainer(config, splits.train, splits.valid, tmp_path, Silent())


class Counting(Loader):
    """Remembers which steps were made, and refuses one of them."""

    def __init__(self, *args, refuses=None, **options):
        super().__init__(*args, **options)
        self.made, self.refuses = [], refuses

    def batch(self, step, spec, *, part=(0, 1)):
        if step == self.refuses:
            raise ConfigError("step", step, "another one")
        self.made.append(step)
        return super().batch(step, spec, part=part)


def prefetching_threads():
    return [t for t in threading.enumerate() if t.name.startswith("bd3lm-prefetch")]


def assert_same_batch(found, wanted):
    for field in dataclasses.fields(wanted):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name


# --- batches made ahead ---------------------------------------------------------------------


def test_what_is_made_ahead_is_what_would_be_made_later(config, splits):
    rows = Rows(splits.train, seq_len=32, block_size=4)
    loader = Loader(rows, 8, seed=3)
    clips = [(0.3, 0.8), None]
    specs = [
        build_system(dataclasses.replace(config, noise=NoiseConfig(clip=c)), 1).noise(0)
        for c in clips
    ]
    batches = Prefetcher(loader, steps=9, parts=2)
    # The noise changes while batches with the old one are already made; then steps are repeated.
    asked = [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 0), (2, 0), (8, 1), (9, 1)]
    for step, which in asked:
        found = batches.get(step, lambda step, which=which: specs[which])
        for i in range(2):
            assert_same_batch(found[i], loader.batch(step, specs[which], part=(i, 2)))
    batches.close()


def test_a_run_without_prefetching_is_the_same_run(config, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(learned, "EVERY", 2)
    noise = dataclasses.replace(config.noise, estimator="count", fit_counts=True)
    config = dataclasses.replace(config, noise=noise, micro_batch=4)
    weights = []
    for ahead in (True, False):
        (tmp_path / str(ahead)).mkdir()
        trainer = Trainer(config, splits.train, splits.valid, tmp_path / str(ahead), Silent())
        if not ahead:
            parts = [(i, 2) for i in range(2)]
            trainer.batches.get = lambda step, noise, loader=trainer.loader, parts=parts: [
                loader.batch(step, noise(step), part=part) for part in parts
            ]
        trainer.run()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert trainer.system.state()["counts"]["probs"] is not None  # so the noise did change
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_no_more_is_made_than_the_bound_and_nothing_past_the_last_step(config, splits):
    loader = Counting(Rows(splits.train, seq_len=32, block_size=4), 8, seed=3)
    spec = build_system(config, 1).noise(0)
    batches = Prefetcher(loader, steps=5)
    for step in range(5):
        batches.get(step, lambda step: spec)
        assert max(loader.made) <= step + AHEAD
    batches.close()
    assert loader.made == [0, 1, 2, 3, 4]


def test_a_mistake_in_the_thread_is_raised_where_the_batch_is_asked_for(config, splits):
    loader = Counting(Rows(splits.train, seq_len=32, block_size=4), 8, seed=3, refuses=1)
    batches = Prefetcher(loader, steps=5)
    spec = build_system(config, 1).noise(0)
    batches.get(0, lambda step: spec)
    with pytest.raises(ConfigError, match="another one"):
        batches.get(1, lambda step: spec)
    batches.close()
    assert not prefetching_threads()


@pytest.mark.parametrize("how", ["finished", "failed", "interrupted"])
def test_the_thread_ends_with_the_run(trainer, monkeypatch, how):
    def stop(done, metrics):
        assert prefetching_threads()
        if done == 2 and how == "failed":
            raise RuntimeError("the reporter fell over")
        if done == 2 and how == "interrupted":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.reporter, "step", stop)
    if how == "finished":
        trainer.run()
    else:
        with pytest.raises(RuntimeError if how == "failed" else InterruptedRunError):
            trainer.run()
    assert not prefetching_threads()


# --- a host that never waits ----------------------------------------------------------------

SYSTEMS = ["bd3lm", "mdlm", "ar", "sedd"]
# Each brings something back to the host: a number, or how many there are of something.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
WAITS |= {"is_nonzero", "repeat_interleave", "unique_consecutive", "bincount", "allclose"}


class NoWaits(TorchDispatchMode):
    """Refuses every operation that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITS, f"{func} waits for the device"
        if name.startswith("index"):
            indices = [i for i in args[1] if i is not None] if isinstance(args[1], list) else []
            assert not any(i.dtype == torch.bool for i in indices), f"{func} counts a mask"
        return func(*args, **(kwargs or {}))


def of_system(config, system):
    """The configuration with another system's settings, without an adaptive softmax.

    The host reads how many tokens each of its clusters has.
    """
    theirs = preset("demo", system, model={"softmax_cutoffs": ()})
    return dataclasses.replace(
        config,
        system=system,
        block_size=theirs.block_size,
        noise=theirs.noise,
        model=dataclasses.replace(theirs.model, width=32, depth=2, heads=2),
        micro_batch=4,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_may_start_from_the_frequencies_of_its_text(config, splits, tmp_path, system):
    """Features of zero predict the share of each token in the text."""
    config = dataclasses.replace(of_system(config, system), init_unigram=True)
    trainer = Trainer(config, splits.train, splits.valid, tmp_path, Silent())
    trainer.batches.close()
    counts = torch.from_numpy(splits.train.token_counts().astype("float64")) + 1
    p = trainer.model.logits(torch.zeros(config.model.width)).softmax(-1)
    torch.testing.assert_close(p, (counts / counts.sum()).float())


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_step_reads_nothing_back(config, splits, tmp_path, system, monkeypatch):
    monkeypatch.setattr(head, "cross_entropy_", composed_cross_entropy_)  # as on a GPU
    trainer = Trainer(of_system(config, system), splits.train, splits.valid, tmp_path, Silent())
    trainer.optimizers.host_decides = False  # as on a GPU
    trainer.step()
    with NoWaits():
        loss, norm = trainer.step()
    trainer.batches.close()
    assert loss.isfinite()
    assert norm > 0


def test_the_guard_sees_what_it_guards_against():
    x = torch.ones(3)
    for waits in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: bool(x[0]),
    ):
        with NoWaits(), pytest.raises(AssertionError):
            waits()


# --- compiled blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["bd3lm", "mdlm"])
def test_a_compiled_step_is_the_same_and_is_compiled_once(
    config, splits, tmp_path, system, monkeypatch
):
    """Every step masks another number of tokens, and none but the first compiles."""
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(transformer, "COMPILER", count)
    monkeypatch.setattr(head, "TILE_ROWS", 1)
    torch._dynamo.reset()
    config = dataclasses.replace(
        of_system(config, system), micro_batch=None, batch_size=24, precision="fp32"
    )
    losses, numbers, compiled = {}, set(), []
    for on in (True, False):
        changed = dataclasses.replace(config, compile=on)
        trainer = Trainer(changed, splits.train, splits.valid, tmp_path, Silent())
        losses[on] = []
        for step in range(4):
            (batch,) = trainer.batches.get(step, trainer.system.noise)
            numbers.add(len(batch.masked))
            losses[on].append(trainer.step()[0].item())
            compiled.append(len(graphs))
        trainer.batches.close()
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=1e-5)
    assert len(numbers) > 1
    assert compiled[0] > 0
    assert set(compiled) == {compiled[0]}
    assert compiled[0] <= 6  # two parts of a middle block, of the last one, and the rest between


def test_a_compiler_that_fails_costs_a_sentence(config, splits, tmp_path, monkeypatch):
    def broken(graph, examples):
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(transformer, "COMPILER", broken)
    torch._dynamo.reset()
    losses, notes = {}, []
    for on in (True, False):
        changed = dataclasses.replace(config, compile=on)
        trainer = Trainer(changed, splits.train, splits.valid, tmp_path, Silent())
        losses[on] = [trainer.step()[0].item() for _ in range(2)]
        trainer.batches.close()
        notes += trainer.reporter.notes
    assert losses[True] == losses[False]
    (note,) = notes
    assert note.startswith("compile: off from now on, since the compiler failed (")
    assert "no compiler on this machine" in note


@pytest.mark.parametrize("system", SYSTEMS)
def test_loss_and_gradients_need_no_value_on_the_host(config, splits, system, monkeypatch):
    """Tensors of the meta device have no values to read: any attempt raises."""
    monkeypatch.setattr(head, "compute_dtype", lambda features: features.dtype)  # no autocast there
    config = of_system(config, system)
    trained = build_system(config, splits.train.tokenizer.mask_id)
    rows = Rows(splits.train, seq_len=32, block_size=config.block, packing="aligned")
    batch = Loader(rows, 8, seed=0).batch(0, trained.noise(0)).to(torch.device("meta"))
    with torch.device("meta"):
        model = Transformer(config.model, splits.train.tokenizer.vocab_size)
    loss = trained.loss(model, batch) / batch.num_noisable
    loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None for p in model.parameters())
