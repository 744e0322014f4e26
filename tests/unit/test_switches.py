"""Switches of conversion: token shift, complementary views, a ramp of block sizes."""

import math

import numpy as np
import pytest
import torch

from bd3lm.config import NoiseConfig, ObjectiveConfig, SampleConfig, preset
from bd3lm.data import Loader, NoiseSpec, Rows, Schedule, Weighting
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.sample import Sampler
from bd3lm.sample.strategies.ordered import left_to_right
from bd3lm.systems import Autoregressive, BlockDiffusion
from bd3lm.systems.complement import with_complement
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


@pytest.mark.parametrize("packing", ["wrap", "aligned"])
def test_each_token_is_masked_in_one_of_two_views(packing):
    batch = batch_of(packing=packing)
    weights = torch.from_numpy(COUNT.complementary_weights(4))
    both = with_complement(batch, weights, MASK_ID)
    tokens = batch.x0.numel()
    assert (
        sorted((both.masked % tokens).tolist()) == batch.noisable.flatten().nonzero()[:, 0].tolist()
    )
    hidden = both.xt.flatten() == MASK_ID
    assert hidden.nonzero()[:, 0].tolist() == sorted(both.masked.tolist())
    assert torch.equal(both.x0.flatten()[~hidden], both.xt.flatten()[~hidden])
    assert both.num_noisable == batch.num_noisable


@pytest.mark.parametrize("weighting", ["nelbo", "simple"])
def test_complementary_views_have_the_same_expectation(weighting):
    """And for a loss that depends on the mask they vary less."""
    spec = NoiseSpec(Schedule("loglinear"), estimator="count", weighting=Weighting(weighting))
    model = causal_model(scale=0.3)
    noise = NoiseConfig(weighting=weighting)
    one = BlockDiffusion(4, MASK_ID, noise)
    two = BlockDiffusion(4, MASK_ID, noise, objective=ObjectiveConfig(complementary=True))
    rows = Rows(token_arrays(60), seq_len=16, block_size=4)
    losses = []
    with torch.no_grad():
        for seed in range(300):
            # The same row in every draw: order and noise are functions of the step.
            b = Loader(rows, 1, seed=seed).batch(0, spec)
            losses.append((float(one.loss(model, b)), float(two.loss(model, b)), b))
    single, double = np.array([x[:2] for x in losses]).T
    error = math.hypot(np.std(single), np.std(double)) / math.sqrt(len(losses))
    assert abs(single.mean() - double.mean()) < 4 * error
    assert np.std(double) < np.std(single)


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
    joint = BlockDiffusion(
        4, MASK_ID, objective=ObjectiveConfig(complementary=True, ar_weight=0.7)
    ).loss(model, batch)
    plain = BlockDiffusion(4, MASK_ID, objective=ObjectiveConfig(complementary=True))
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
    assert "complementary = True" in refused("ar", objective={"complementary": True})
    assert "complementary = True" in refused(
        objective={"complementary": True}, noise={"estimator": "bernoulli"}
    )
    assert "complementary = True" in refused(
        objective={"complementary": True}, noise={"fit_counts": True}
    )
    assert "ar-tokens = unmasked" in refused(
        model={"clean_stream": "causal"},
        objective={"complementary": True, "ar_weight": 1.0, "ar_tokens": "unmasked"},
    )
    assert "token-shift = True" in refused("ar", model={"token_shift": True})
    model = causal_model(vocab=VOCAB_SIZE, **SHIFTED)
    sampler = Sampler(model, BlockDiffusion(4, MASK_ID), window=16, bos_id=0, eos_id=1)
    with pytest.raises(ConfigError, match="speculate"):
        sampler.generate(SampleConfig(num=1, length=8, speculate=True))
