"""Switches of conversion: token shift, complementary views, a ramp of block sizes."""

import math

import numpy as np
import pytest
import torch

from bd3lm.config import NoiseConfig, ObjectiveConfig, SampleConfig, preset
from bd3lm.data import Loader, NoiseSpec, Rows, Schedule
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.sample import Sampler
from bd3lm.sample.strategies.ordered import left_to_right
from bd3lm.systems import Autoregressive, BlockDiffusion
from bd3lm.systems.views import with_complements
from tests.conftest import MASK_ID, VOCAB_SIZE, random_ids, token_arrays
from tests.unit.test_joint import COUNT, batch_of, causal_model

SHIFTED = {"token_shift": True}


# --- token shift ----------------------------------------------------------------------------------


@pytest.mark.parametrize("clean_stream", ["block", "causal"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_shifted_position_reads_the_one_before(clean_stream, block_size):
    """Inside a block the noised one, at its start the clean one."""
    model, length = causal_model(**SHIFTED | {"clean_stream": clean_stream}), 12
    x0 = random_ids(2, length)
    xt = torch.where(torch.rand(2, length) < 0.5, MASK_ID, x0)
    every = torch.arange(2 * length).view(2, length)[:, 1:].flatten()
    found = model.denoise(xt, x0, block_size, every).view(2, length - 1, -1)
    for start in range(0, length, block_size):
        ids = torch.cat([x0[:, :start], xt[:, start : start + block_size]], dim=1)
        noised = model.encode(ids, block_size)[:, start:]
        # A clean block is the last but one here, so that it is taken for clean.
        clean = model.encode(torch.cat([x0[:, :start], x0[:, :block_size]], dim=1), block_size)
        for at in range(max(start, 1), start + block_size):
            wanted = clean[:, start - 1] if at == start else noised[:, at - start - 1]
            torch.testing.assert_close(found[:, at - 1], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_shifted_model_scores_what_it_trains_on(block_size):
    """The denoiser of the likelihood gives the features of the training step."""
    model, system = causal_model(**SHIFTED), BlockDiffusion(block_size, MASK_ID)
    batch = batch_of(block_size)
    with torch.no_grad():
        loss = system.loss(model, batch)
        denoise = system.denoiser(model, batch.x0, None)
        features = denoise(batch.xt, batch.masked, batch.mask_prob)
        nats = system.nats(model, features, batch.x0, batch.masked)
    torch.testing.assert_close((nats * batch.weight).sum(), loss, rtol=1e-5, atol=1e-4)


def test_with_one_token_a_block_the_shift_is_autoregression():
    model = causal_model(**SHIFTED)
    rows = Rows(token_arrays(20), seq_len=16, block_size=1)
    mine = evaluate_likelihood(BlockDiffusion(1, MASK_ID), model, rows, estimator="exact")
    ar = evaluate_likelihood(Autoregressive(MASK_ID), model, rows)
    assert mine.nll == pytest.approx(ar.nll, rel=1e-5)


@pytest.mark.parametrize("prompt", [(), (3, 4, 5, 6, 7), (3, 4, 5)])
def test_a_sample_of_a_shifted_model_has_the_law_it_is_scored_with(prompt):
    """From left to right, the sampler's log-probability is that of the likelihood suite's order."""
    model, system = causal_model(**SHIFTED), BlockDiffusion(4, MASK_ID)
    sampler = Sampler(model, system, window=16, bos_id=0, eos_id=1)
    cfg = SampleConfig(num=3, length=16, seed=2, forbidden=(1,), tokens_per_forward=1)
    drawn = sampler.generate(cfg, [prompt], strategy=left_to_right)
    assert {sample.stop for sample in drawn} <= {"length", "degenerate"}
    for sample in drawn:
        ids = torch.tensor([[0, *sample.ids]])
        whole = ids.shape[1] // 4 * 4
        total = 0.0
        with torch.no_grad():
            for at in range(1 + len(prompt), whole):
                xt = ids[:, :whole].clone()
                xt[:, at:] = MASK_ID
                select = torch.tensor([at])
                features = model.denoise(xt, ids[:, :whole], 4, select)
                logits = system.logits(model, features)
                total += torch.log_softmax(logits.double(), -1)[0, ids[0, at]].item()
        if whole == ids.shape[1]:
            assert sample.log_prob == pytest.approx(total, rel=1e-4)


def test_rows_of_a_shifted_model_do_not_depend_on_the_batch():
    sampler = Sampler(
        causal_model(**SHIFTED), BlockDiffusion(4, MASK_ID), window=16, bos_id=0, eos_id=1
    )
    cfg = SampleConfig(num=2, length=24, seed=5)  # beyond the window
    prompts = [(3, 4, 5, 6, 7, 8, 9), (), (4,)]
    together = [sample.ids for sample in sampler.generate(cfg, prompts)]
    alone = [
        sample.ids
        for index, prompt in enumerate(prompts)
        for sample in sampler.generate(cfg, [prompt], first=2 * index)
    ]
    assert together == alone


# --- complementary views --------------------------------------------------------------------------


def masks_of(number):
    return NoiseSpec(Schedule("loglinear"), estimator="count", masks=number)


@pytest.mark.parametrize("packing", ["wrap", "aligned"])
@pytest.mark.parametrize("pairs", [1, 3])
def test_each_token_is_masked_once_in_each_pair_of_views(packing, pairs):
    batch = batch_of(packing=packing, spec=masks_of(pairs))
    weights = torch.from_numpy(COUNT.complementary_weights(4))
    both = with_complements(batch, weights, MASK_ID)
    tokens = batch.x0.numel()
    noisable = batch.noisable.flatten().nonzero()[:, 0].tolist()
    assert sorted((both.masked % tokens).tolist()) == sorted(noisable * pairs)
    hidden = both.xt.flatten() == MASK_ID
    assert hidden.nonzero()[:, 0].tolist() == sorted(both.masked.tolist())
    x0 = both.x0.repeat(2 * pairs, 1).flatten()
    assert torch.equal(x0[~hidden], both.xt.flatten()[~hidden])
    assert both.num_noisable == batch.num_noisable
    views = hidden.view(2, pairs, -1)
    assert torch.equal(views[0] ^ views[1], batch.noisable.flatten().expand(pairs, -1))
    assert len({tuple(view.tolist()) for view in views[0]}) == pairs


def test_further_masks_leave_the_rows_as_they_are_in_every_part_of_a_batch():
    """A part of a batch has the same masks as the whole."""
    rows = Rows(token_arrays(60), seq_len=16, block_size=4)
    loader, spec = Loader(rows, 6, seed=3), masks_of(2)
    whole = loader.batch(5, spec)
    parts = [loader.batch(5, spec, part=(i, 2)) for i in range(2)]
    xt = torch.stack([part.xt.view(2, 3, 16) for part in parts], dim=1)
    assert torch.equal(xt.view(12, 16), whole.xt)
    assert torch.equal(whole.x0, loader.batch(5, COUNT).x0)
    assert torch.equal((whole.xt == MASK_ID).flatten().nonzero()[:, 0], whole.masked)
    weight = torch.zeros(whole.xt.numel())
    weight[whole.masked] = whole.weight
    for i, part in enumerate(parts):
        own = torch.zeros(part.xt.numel())
        own[part.masked] = part.weight
        assert torch.equal(own, weight.view(2, 2, 3, 16)[:, i].flatten())
        assert torch.equal(part.mask_prob, whole.mask_prob.view(2, 2, 3, 4)[:, i].reshape(6, 4))


@pytest.mark.parametrize("weighting", ["nelbo", "simple"])
def test_views_have_the_same_expectation_and_vary_less(weighting):
    model = causal_model(scale=0.3)
    noise = NoiseConfig(weighting=weighting, estimator="count")
    systems = [
        BlockDiffusion(4, MASK_ID, noise, objective=ObjectiveConfig(views=views))
        for views in (1, 2, 4)
    ]
    rows = Rows(token_arrays(60), seq_len=16, block_size=4)
    losses = []
    with torch.no_grad():
        for seed in range(300):
            # The same row in every draw: order and noise are functions of the step.
            loader = Loader(rows, 1, seed=seed)
            losses.append([float(s.loss(model, loader.batch(0, s.noise(0)))) for s in systems])
    single, *several = np.array(losses).T
    spread = np.std(single)
    for views in several:
        error = math.hypot(np.std(single), np.std(views)) / math.sqrt(len(losses))
        assert abs(single.mean() - views.mean()) < 4 * error
        assert np.std(views) < spread
        spread = np.std(views)


def test_weights_of_views_are_unbiased_for_fitted_counts():
    """Σ over views of P(j masked)·j·weight = 1 for every count j, whatever q is."""
    q = [0.1, 0.2, 0.3, 0.4]
    spec = NoiseSpec(Schedule("loglinear"), estimator="count", count_probs=q)
    table = spec.complementary_weights(4)
    for n in (2, 4):
        own = np.array([0, *q[:n]]) / sum(q[:n])
        views = own.copy()
        for j in range(1, n):
            views[j] += own[n - j]
        np.testing.assert_allclose(views[1:] * np.arange(1, n + 1) * table[n, 1 : n + 1], 1, 1e-6)
    with pytest.raises(ConfigError, match="estimator"):
        NoiseSpec(Schedule("loglinear")).complementary_weights(4)


def test_the_next_token_loss_counts_each_token_once():
    model, batch = causal_model(), batch_of(packing="aligned")
    joint = BlockDiffusion(4, MASK_ID, objective=ObjectiveConfig(views=2, ar_weight=0.7)).loss(
        model, batch
    )
    plain = BlockDiffusion(4, MASK_ID, objective=ObjectiveConfig(views=2))
    full = batch_of(spec=NoiseSpec(Schedule("loglinear"), estimator="full"), packing="aligned")
    ar = Autoregressive(MASK_ID).loss(model, full)
    torch.testing.assert_close(joint, plain.loss(model, batch) + 0.7 * ar, rtol=1e-5, atol=1e-4)


# --- a ramp of block sizes ------------------------------------------------------------------------


def test_a_ramp_goes_through_the_sizes_once():
    objective = ObjectiveConfig(block_sizes=(4, 1, 2), ramp_steps=9)
    system = BlockDiffusion(4, MASK_ID, objective=objective)
    assert [system.size_of(step) for step in range(12)] == [1] * 3 + [2] * 3 + [4] * 6
    assert system.at(2).size_of(0) == 2
    ramp = {"block_sizes": (4, 1, 2), "ramp_steps": 9}
    assert preset("demo", objective=ramp).with_block(2).objective == ObjectiveConfig()


def test_switches_that_do_not_fit_say_so():
    def refused(system="bd3lm", **changes):
        with pytest.raises(ConfigError) as error:
            preset("demo", system, **changes)
        return str(error.value)

    assert "ramp-steps = 5" in refused(objective={"ramp_steps": 5})
    assert "views = 2: must be 1 with block-size = 1" in refused(
        block_size=1, objective={"views": 2}
    )
    assert "views = 2: must be 1 where noise.clip" in refused(
        objective={"views": 2}, noise={"clip": (1.0, 1.0)}
    )
    with pytest.raises(ConfigError, match=r"objective.views = two"):
        ObjectiveConfig(views="two")
    assert "views = 3: must be 1 or even" in refused(objective={"views": 3})
    assert "views = 2" in refused("ar", objective={"views": 2})
    assert "views = 2" in refused(objective={"views": 2}, noise={"estimator": "bernoulli"})
    assert "views = 2" in refused(objective={"views": 2}, noise={"fit_counts": True})
    assert "ar-tokens = unmasked" in refused(
        model={"clean_stream": "causal"},
        objective={"views": 2, "ar_weight": 1.0, "ar_tokens": "unmasked"},
    )
    assert "token-shift = True" in refused("ar", model={"token_shift": True})
    model = causal_model(vocab=VOCAB_SIZE, **SHIFTED)
    sampler = Sampler(model, BlockDiffusion(4, MASK_ID), window=16, bos_id=0, eos_id=1)
    with pytest.raises(ConfigError, match="speculate"):
        sampler.generate(SampleConfig(num=1, length=8, speculate=True))
