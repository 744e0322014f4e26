"""One model that is autoregressive and block-diffusive: a causal clean stream, several sizes."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch

from bd3lm.config import ModelConfig, NoiseConfig, ObjectiveConfig, SampleConfig, preset
from bd3lm.data import Loader, NoiseSpec, Rows, Schedule
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.model import KVCache, Transformer
from bd3lm.model.flops import head_columns, step_flops
from bd3lm.sample import Sampler
from bd3lm.sample.draw import composed_draw, distribution, draw
from bd3lm.sample.speculative import Speculation
from bd3lm.sample.strategies.ordered import left_to_right
from bd3lm.systems import Autoregressive, BlockDiffusion
from tests.conftest import MASK_ID, VOCAB_SIZE, random_ids, tiny_model, token_arrays
from tests.unit.test_sampling_ways import M, fits

COUNT = NoiseSpec(Schedule("loglinear"), estimator="count")


def batch_of(block_size=4, spec=COUNT, *, step=0, packing="wrap"):
    rows = Rows(token_arrays(60), seq_len=16, block_size=block_size, packing=packing)
    return Loader(rows, 4, seed=3).batch(step, spec)


def causal_model(vocab=VOCAB_SIZE, scale=0.5, **changes):
    """Random weights everywhere, sharp enough that laws are far from products."""
    torch.manual_seed(1)
    shape = ModelConfig(**{"width": 16, "depth": 2, "heads": 2, "clean_stream": "causal"} | changes)
    model = Transformer(shape, vocab)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * scale)
    return model.eval()


# --- the objective --------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["wrap", "aligned"])
def test_the_joint_loss_is_the_sum_of_its_parts(packing):
    """Block diffusion over the clean stream, and AR of the same weights on the same tokens."""
    model, batch = causal_model(), batch_of(packing=packing)
    objective = ObjectiveConfig(ar_weight=0.7)
    system = BlockDiffusion(4, MASK_ID, objective=objective)
    joint = system.loss(model, batch)
    diffusion = BlockDiffusion(4, MASK_ID).loss(model, batch)
    full = batch_of(spec=NoiseSpec(Schedule("loglinear"), estimator="full"), packing=packing)
    assert torch.equal(full.x0, batch.x0)
    ar = Autoregressive(MASK_ID).loss(model, full)
    torch.testing.assert_close(joint, diffusion + 0.7 * ar, rtol=1e-5, atol=1e-4)
    parts = system.parts.read()  # the loss that is shown is the noised stream's
    assert parts["loss"] == parts["loss_S4"] == pytest.approx(diffusion.item() / batch.num_noisable)
    assert parts["loss_ar"] == pytest.approx(ar.item() / batch.num_noisable)


def test_the_ar_loss_of_unmasked_tokens_has_the_same_expectation():
    model, system = causal_model(), BlockDiffusion(4, MASK_ID)
    objective = ObjectiveConfig(ar_weight=1.0, ar_tokens="unmasked")
    some = BlockDiffusion(4, MASK_ID, objective=objective)
    full = batch_of(spec=NoiseSpec(Schedule("loglinear"), estimator="full"))
    ar = float(Autoregressive(MASK_ID).loss(model, full).detach())
    with torch.no_grad():
        draws = []
        rows = Rows(token_arrays(60), seq_len=16, block_size=4)
        for seed in range(200):
            b = Loader(rows, 4, seed=seed).batch(0, COUNT)
            draws.append(float((some.loss(model, b) - system.loss(model, b)).detach()))
    mean, error = np.mean(draws), np.std(draws) / math.sqrt(len(draws))
    assert abs(mean - ar) < 4 * error
    assert error < 0.05 * ar


def test_noisable_tokens_are_those_that_may_be_masked():
    batch = batch_of(packing="aligned")
    assert int(batch.noisable.sum()) == batch.num_noisable
    assert batch.noisable.flatten()[batch.masked].all()
    assert (batch.step, batch.block_size) == (0, 4)


def test_a_warm_start_is_the_ar_loss():
    model = causal_model()
    system = BlockDiffusion(4, MASK_ID, objective=ObjectiveConfig(ar_weight=1.0, ar_steps=1))
    full = batch_of(spec=NoiseSpec(Schedule("loglinear"), estimator="full"))
    ar = Autoregressive(MASK_ID).loss(model, full).detach()
    torch.testing.assert_close(system.loss(model, batch_of()).detach(), ar, rtol=1e-5, atol=1e-4)
    parts = system.parts.read()
    assert "loss" not in parts  # the whole loss is the next-token loss
    assert parts["loss_ar"] == pytest.approx(float(ar) / full.num_noisable)
    assert system.loss(model, batch_of(step=1)) > ar


# --- several block sizes --------------------------------------------------------------------------


def test_the_size_of_a_step_is_a_function_of_seed_and_step():
    objective = ObjectiveConfig(block_sizes=(1, 2, 4, 8))
    system, again = (BlockDiffusion(4, MASK_ID, objective=objective, seed=5) for _ in range(2))
    sizes = [system.size_of(step) for step in range(1000)]
    assert sizes == [again.size_of(step) for step in range(1000)]
    other = BlockDiffusion(4, MASK_ID, objective=objective, seed=6)
    assert sizes != [other.size_of(step) for step in range(1000)]
    rounds = {tuple(sizes[i : i + 4]) for i in range(0, 1000, 4)}
    assert all(sorted(one) == [1, 2, 4, 8] for one in rounds)
    assert len(rounds) == 24, "all the orders of four sizes"
    assert [system.noise(step).block_size for step in range(1000)] == sizes


def test_a_size_given_twice_has_twice_the_steps():
    objective = ObjectiveConfig(block_sizes=(2, 4, 2))
    system = BlockDiffusion(4, MASK_ID, objective=objective)
    sizes = [system.size_of(step) for step in range(300)]
    assert Counter(sizes) == {2: 200, 4: 100}
    assert system.sizes == (2, 4)
    assert system.at(2).sizes == (2,)


def test_a_step_of_a_size_is_that_of_a_run_of_this_size_alone():
    """Same rows, same noise, same loss."""
    model = causal_model()
    mixed = BlockDiffusion(4, MASK_ID, objective=ObjectiveConfig(block_sizes=(2, 4, 8)))
    for step in range(6):
        size = mixed.size_of(step)
        alone = BlockDiffusion(size, MASK_ID)
        loss = mixed.loss(model, batch_of(8, mixed.noise(step), step=step))
        other = alone.loss(model, batch_of(size, alone.noise(step), step=step))
        assert torch.equal(loss, other)
    sizes = {f"loss_S{mixed.size_of(step)}" for step in range(6)}
    assert set(mixed.parts.state()) == sizes


def test_clips_and_counts_are_kept_for_each_size():
    noise = NoiseConfig(fit_counts=True, clip=(0.3, 0.8))
    objective = ObjectiveConfig(block_sizes=(2, 4))
    system = BlockDiffusion(4, MASK_ID, noise, objective=objective)
    system.at(2).set_clip((0.1, 0.9))
    assert (system.clip, system.at(2).clip) == ((0.3, 0.8), (0.1, 0.9))
    model = causal_model()
    for step in range(50):
        system.loss(model, batch_of(4, system.noise(step), step=step))
        system.update_noise_after_step(step + 1)
    state = system.state()
    assert len(state["counts"]["probs"]) == 4
    assert len(state["sizes"]["2"]["counts"]["probs"]) == 2
    other = BlockDiffusion(4, MASK_ID, noise, objective=objective)
    other.load_state(state)
    assert other.state() == state
    assert other.at(2).count_probs.tolist() == state["sizes"]["2"]["counts"]["probs"]


def test_settings_that_do_not_fit_say_so():
    def refused(**changes):
        with pytest.raises(ConfigError) as error:
            preset("demo", **changes)
        return str(error.value)

    causal = {"clean_stream": "causal"}
    assert "objective.ar-weight = 1" in refused(objective={"ar_weight": 1.0})
    assert "clean-stream = causal" in refused(objective={"ar_weight": 1.0})
    assert "objective.ar-steps = 5" in refused(objective={"ar_steps": 5}, model=causal)
    assert "block-size = 4 is one" in refused(objective={"block_sizes": (2, 8)})
    assert "a divisor of seq-len = 128" in refused(objective={"block_sizes": (3, 4)})
    assert "unless system = bd3lm" in refused(system="mdlm", objective={"block_sizes": (128,)})
    sizes = {"objective": {"block_sizes": (2, 4, 8)}}
    assert "above block-size = 4 (here 8)" in refused(**sizes, eval={"estimator": "exact"})
    assert "eval.stride = 4: must be a multiple of block-size = 8" in refused(
        **sizes, eval={"stride": 4}
    )
    with pytest.raises(ConfigError, match=r"model.clean-stream = block: must be causal"):
        preset("demo").autoregressive()
    assert preset("demo", model=causal).autoregressive().block == 1


# --- the model as an autoregressive one -----------------------------------------------------------


@torch.inference_mode()
def test_blocks_of_one_token_and_next_tokens_agree_through_cache_and_without():
    """A causal clean stream gives the same next-token features at any S."""
    model, ids = causal_model(), random_ids(2, 12)
    as_ar = model.encode(ids, 1)
    every = torch.arange(ids.numel())
    both = model.denoise_and_predict(ids, ids, 4, every, every)
    torch.testing.assert_close(both[ids.numel() :].view_as(as_ar), as_ar, rtol=1e-5, atol=1e-5)
    noised = model.denoise(ids, ids, 4, every)
    torch.testing.assert_close(both[: ids.numel()], noised, rtol=1e-5, atol=1e-5)


def test_every_size_scores_with_one_checkpoint():
    model = causal_model()
    for size in (1, 2, 4):
        rows = Rows(token_arrays(60), seq_len=16, block_size=size)
        exact = evaluate_likelihood(BlockDiffusion(size, MASK_ID), model, rows, estimator="exact")
        assert math.isfinite(exact.nelbo)


# --- self-speculation -----------------------------------------------------------------------------


def samplers(model, window=8, size=4, eos_id=99):
    options = {"window": window, "bos_id": 0, "eos_id": eos_id}
    mask_id = model.vocab_size - 1
    ar = Sampler(model, Autoregressive(mask_id), **options)
    return ar, Sampler(model, BlockDiffusion(size, mask_id), **options)


@pytest.mark.parametrize("previous", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_greedy_speculation_gives_the_ar_models_tokens(size, previous):
    """Also beyond the window, from prompts of several lengths in one batch, and to the same end."""
    model = causal_model(M + 1, previous_tokens=previous)
    ar, speculative = samplers(model, size=size, eos_id=3)
    cfg = SampleConfig(length=30, temperature=0.0, top_p=1.0)
    prompts = [[1], [2, 0, 1], [], [0, 1, 2, 1, 0, 2, 2, 1, 1]]
    expected = ar.generate(cfg, prompts)
    found = speculative.generate(dataclasses.replace(cfg, speculate=True), prompts)
    assert [x.ids for x in found] == [x.ids for x in expected]
    assert [x.stop for x in found] == [x.stop for x in expected]
    for a, b in zip(expected, found, strict=True):
        assert b.log_prob == pytest.approx(a.log_prob, abs=1e-4)
        assert b.nfe <= a.nfe


@pytest.mark.parametrize("previous", [0, 2, 5])
@torch.inference_mode()
def test_drafts_are_of_a_masked_block_after_the_known_text(previous):
    """In every row, whatever was accepted; the block begins with the token just drawn."""
    model, size, window = causal_model(M + 1, previous_tokens=previous), 4, 8
    cfg = SampleConfig(top_p=1.0)
    prompts = [[0], [0, 1, 2, 1], [0, 2]]
    run = Speculation(
        model,
        BlockDiffusion(size, M),
        cfg,
        prompts,
        first=0,
        limit=30,
        window=window,
        bos_id=0,
        eos_id=99,
    )
    accepted = set()
    for _ in range(9):
        accepted |= {len(tokens) for tokens in run.step()}
        for row in run.rows:
            context = [0, *row.ids[row.window + 1 :]][: len(row.ids) - 1 - row.window]
            cache = KVCache(model.cfg, 1, len(context) + size, torch.device("cpu"))
            model.encode(torch.tensor([context]), 1, cache=cache, commit=len(context))
            masks = torch.full((1, size), M)
            logits = model.logits(model.encode(masks, len(context) + size, cache=cache)[0, 1:])
            logits[:, M] = -torch.inf
            wanted = distribution(logits, cfg)
            for place in range(size - 1):
                found = row.drafted_from.row(place)
                torch.testing.assert_close(found, wanted.row(place), rtol=1e-4, atol=1e-5)
    assert accepted >= {1, 2, 3}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
@torch.inference_mode()
def test_speculation_has_the_law_of_the_ar_model(temperature, top_p):
    """Four tokens over four ids, past the window: chi-square at fixed seeds."""
    model, num = causal_model(M + 1, scale=0.4), 4000
    _, speculative = samplers(model)
    cfg = SampleConfig(
        num=num, length=5, temperature=temperature, top_p=top_p, speculate=True, seed=3
    )
    law = {(): 1.0}
    for _ in range(4):
        longer = {}
        for ids, p in law.items():
            logits = model.logits(model.encode(torch.tensor([[0, *ids]]), 1)[:, -1])
            logits[:, M] = -torch.inf
            for token, share in enumerate(distribution(logits, cfg).row(0).tolist()):
                if share > 0:
                    longer[*ids, token] = p * share
        law = longer
    samples = speculative.generate(cfg)
    assert fits(samples, law)
    found = speculative.acceptance
    assert found is not None
    assert found.tokens == 4 * num
    tried = found.tried.clip(min=1)
    difference = np.abs(found.accepted - found.overlap) / tried
    assert (difference < 4 * np.sqrt(0.25 / tried)).all()
    # The drafts are used: fewer forwards than tokens.
    assert found.forwards < 0.8 * found.tokens


@torch.inference_mode()
def test_the_log_probability_ends_with_eos():
    """Drafts accepted behind an EOS belong to no text."""
    model = causal_model(M + 1, scale=0.4)
    _, speculative = samplers(model, window=16, eos_id=3)
    samples = speculative.generate(SampleConfig(num=40, length=12, top_p=1.0, speculate=True))
    ended = [sample for sample in samples if sample.stop == "eos"]
    assert len(ended) >= 10
    for sample in ended:
        ids = torch.tensor([[0, *sample.ids, 3]])
        logits = model.logits(model.encode(ids, 1)[0, :-1]).double()
        logits[:, M] = -torch.inf
        log_p = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        assert sample.log_prob == pytest.approx(log_p, abs=1e-4)


def test_rows_of_a_speculation_do_not_depend_on_the_batch():
    _, speculative = samplers(causal_model(M + 1))
    cfg = SampleConfig(length=14, top_p=1.0, speculate=True)
    prompts = [[1, 2], [], [0, 1, 3, 2], [3]]
    together = speculative.generate(cfg, prompts)
    for index, prompt in enumerate(prompts):
        alone = speculative.generate(cfg, [prompt], first=index)[0]
        assert (alone.ids, alone.nfe) == (together[index].ids, together[index].nfe)


def test_speculation_refuses_what_it_cannot_do():
    cfg = SampleConfig(speculate=True)
    with pytest.raises(ConfigError, match="causal clean stream"):
        Sampler(tiny_model(), BlockDiffusion(4, MASK_ID), window=8, bos_id=0, eos_id=1).generate(
            cfg
        )
    ar, speculative = samplers(causal_model(M + 1))
    with pytest.raises(ConfigError, match="sampled as bd3lm"):
        ar.generate(cfg)
    with pytest.raises(ConfigError, match="without holes"):
        speculative.generate(cfg, [[1, None, 2]])
    with pytest.raises(ConfigError, match="strategy"):
        speculative.generate(cfg, strategy=left_to_right)
    for other in ({"steps": 4}, {"order": "confidence"}, {"repetition_penalty": 1.2}):
        with pytest.raises(ConfigError, match="speculate"):
            SampleConfig(speculate=True, **other)


@pytest.mark.parametrize(
    "cfg",
    [
        SampleConfig(top_p=1.0),
        SampleConfig(temperature=0.0),
        SampleConfig(temperature=0.6, top_p=0.7, forbidden=(2, 5)),
        SampleConfig(top_k=3, top_p=1.0),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_the_draw(cfg):
    """Rust and composed agree, and the draw inverts their cumulative sum."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 300)
    logits[:, 7] = -torch.inf
    mine = distribution(logits, cfg).probs
    torch.testing.assert_close(mine, distribution(logits.double(), cfg).probs, rtol=1e-5, atol=1e-7)
    assert mine.sum(-1).tolist() == pytest.approx([1.0] * 6)
    for uniform in (0.0, 0.3, 0.9, 0.999):
        at = torch.full((6,), uniform, dtype=torch.float64)
        for way in (draw, composed_draw):
            token = way(logits, at, cfg)[0]
            before = torch.stack([mine[i, :t].sum() for i, t in enumerate(token.tolist())])
            own = mine[torch.arange(6), token]
            assert (own > 0).all()
            assert ((before - 1e-5 <= uniform) & (before + own >= uniform - 1e-5)).all()


def test_a_distribution_of_no_token_is_refused():
    with pytest.raises(ConfigError, match="row 1"):
        distribution(torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]), SampleConfig())
    with pytest.raises(ConfigError, match="forbidden"):
        distribution(torch.zeros(1, 2), SampleConfig(forbidden=(5,)))


def test_operations_of_a_joint_step_are_those_of_both_objectives():
    """With all next tokens: the diffusion step with its whole clean stream, and AR's own head."""
    plain = preset("demo", model={"clean_stream": "causal"})
    joint = preset("demo", model={"clean_stream": "causal"}, objective={"ar_weight": 1.0})
    half = preset(
        "demo",
        model={"clean_stream": "causal"},
        objective={"ar_weight": 1.0, "ar_tokens": "unmasked"},
    )
    warm = preset(
        "demo", model={"clean_stream": "causal"}, objective={"ar_weight": 1.0, "ar_steps": 350}
    )
    vocab = 16_384
    head = 6.0 * 32 * 128 * 192 * head_columns(joint.model.softmax_cutoffs, vocab)
    ar = step_flops(joint.autoregressive(), vocab)
    assert head < step_flops(joint, vocab) - step_flops(plain, vocab) < ar
    assert step_flops(joint, vocab) - step_flops(half, vocab) > head / 2
    between = (ar + step_flops(joint, vocab)) / 2
    assert step_flops(warm, vocab) == pytest.approx(between)
    mixed = preset("demo", objective={"block_sizes": (2, 4)})
    two, four = (step_flops(preset("demo", block_size=size), vocab) for size in (2, 4))
    assert step_flops(mixed, vocab) == pytest.approx((two + four) / 2)
    views = {"views": 2}
    one, two = (step_flops(preset("demo", "mdlm", objective=o), vocab) for o in ({}, views))
    assert two == 2 * one
    shared = step_flops(preset("demo", objective=views), vocab)
    assert 1.5 < shared / step_flops(preset("demo"), vocab) < 1.8  # one clean stream for both


def test_a_ramp_counts_its_sizes_for_its_steps_alone():
    sizes = {"block_sizes": (1, 4), "ramp_steps": 2}
    ramp, plain = (preset("demo", steps=1000, objective=o) for o in (sizes, {}))
    assert step_flops(ramp, 1000) == pytest.approx(step_flops(plain, 1000), rel=1e-3)


def test_a_warm_start_of_a_time_conditioned_model_is_counted():
    """The steps on the next-token loss alone are of a model that is told no time."""
    told = {"clean_stream": "causal", "cond_width": 64, "time_conditioning": True}
    objective = {"ar_weight": 1.0, "ar_steps": 5}
    cfg = preset("demo", steps=10, model=told, objective=objective)
    later = preset("demo", steps=10, model=told, objective={"ar_weight": 1.0})
    assert 0 < step_flops(cfg, 1000) < step_flops(later, 1000)
