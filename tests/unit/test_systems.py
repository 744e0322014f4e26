"""Identities of each system: with itself written out, and with the others."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from bd3lm.config import ModelConfig, NoiseConfig, TrainConfig
from bd3lm.data import Loader, NoiseSpec, Rows, Schedule
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.model import HeadInputs, Transformer, head_cross_entropy, head_score_entropy
from bd3lm.model.cross_entropy import LossInputs
from bd3lm.model.head import score_entropy_
from bd3lm.systems import (
    Autoregressive,
    BlockDiffusion,
    MaskedDiffusion,
    ScoreEntropy,
    build_system,
    sigma_of,
)
from tests.conftest import MASK_ID, VOCAB_SIZE, random_ids, tiny_model, token_arrays

TOLD = {"cond_width": 8, "time_conditioning": True}


def batch_of(seq_len, block_size, spec=None, rows=4):
    data = token_arrays(rows * (seq_len - 1))
    loader = Loader(Rows(data, seq_len=seq_len, block_size=block_size), rows, seed=3)
    spec = spec or NoiseSpec(Schedule("loglinear"), estimator="count")
    return loader.batch(0, spec)


def spread_(model, scale=0.3):
    """Random weights everywhere, so that nothing is zero by initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * scale)
    return model


# --- autoregression --------------------------------------------------------------------------


def test_ar_is_the_chain_rule_of_its_own_next_tokens():
    """Each -log p(x_i | x_<i) from a forward of its own over x_<i alone."""
    model, data = tiny_model(), token_arrays(20)
    rows = Rows(data, seq_len=12, block_size=1, keep_last=True)
    total = 0.0
    for row in range(len(rows)):
        batch = rows.batch(np.array([row], dtype=np.uint64))
        for i in batch.noisable[0].nonzero().flatten().tolist():
            logits = model.logits(model.encode(batch.x0[:, :i], 1))[0, -1].detach().double()
            logits[MASK_ID] = -torch.inf
            total -= torch.log_softmax(logits, -1)[batch.x0[0, i]].item()
    result = evaluate_likelihood(Autoregressive(MASK_ID), model, rows, estimator="exact")
    assert (result.tokens, result.forwards, result.mc_error) == (20, 1, 0.0)
    assert result.nelbo * 20 == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("packing", ["aligned", "best_fit"])
def test_ar_reads_no_document_beside_it(packing):
    """Several documents a row, each with a BOS of its own, and padding: Σ nats as one by one."""
    model, system = tiny_model(), Autoregressive(MASK_ID)
    documents = [[3, 4, 5], [6, 2], [7, 3, 2, 5]]

    def nats(documents, packing):
        special = {"bos_id": 0, "eos_id": 1, "mask_id": MASK_ID}
        data = TokenArrays(documents, vocab_size=VOCAB_SIZE, **special)
        rows = Rows(data, seq_len=16, block_size=1, packing=packing)
        result = evaluate_likelihood(system, model, rows, estimator="exact")
        return result.nelbo * result.tokens, result.tokens, len(rows)

    total, tokens, rows = nats(documents, packing)
    apart = [nats([document], packing) for document in documents]
    assert (tokens, rows) == (9, 1)
    assert total == pytest.approx(sum(value for value, *_ in apart), rel=1e-5)


def test_ar_loss_is_its_likelihood_and_its_gradient_is_autograds():
    model = spread_(Transformer(ModelConfig(width=16, depth=2, heads=2), VOCAB_SIZE))
    system = Autoregressive(MASK_ID)
    batch = batch_of(12, 1, system.noise(0))
    loss = system.loss(model, batch)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(model.encode(batch.x0, 1))
    logits = logits.masked_fill(torch.arange(VOCAB_SIZE) == MASK_ID, -torch.inf)
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.x0[:, 1:].flatten(), reduction="sum"
    )
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5)


def test_ar_differs_from_block_size_one():
    """Systems are different functions of the same weights (docs/math.md §5)."""
    model, rows = tiny_model(), Rows(token_arrays(40), seq_len=8, block_size=1)
    ar = evaluate_likelihood(Autoregressive(MASK_ID), model, rows, estimator="exact")
    bd = evaluate_likelihood(BlockDiffusion(1, MASK_ID), model, rows, estimator="exact")
    assert abs(ar.nelbo - bd.nelbo) > 0.01


# --- mdlm ------------------------------------------------------------------------------------


def test_mdlm_is_full_attention_over_the_noised_row():
    model, batch = tiny_model(), batch_of(12, 12)
    logits = model.logits(model.encode(batch.xt, 12))
    for place in range(12):  # every position sees every other
        other = batch.xt.clone()
        other[:, place] = (other[:, place] + 1) % VOCAB_SIZE
        changed = model.logits(model.encode(other, 12)) - logits
        assert (changed.abs().amax(-1) > 0).all()
    logits = logits.masked_fill(torch.arange(VOCAB_SIZE) == MASK_ID, -torch.inf)
    nll = -logits.log_softmax(-1).gather(-1, batch.x0[..., None]).flatten()[batch.masked]
    expected = (nll * batch.weight).sum()
    loss = MaskedDiffusion(12, MASK_ID).loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(loss, BlockDiffusion(12, MASK_ID).loss(model, batch))


# --- sedd ------------------------------------------------------------------------------------


def score_entropy(raw, target):
    """Values [R] of raw scores [R, V], without a gradient."""
    return score_entropy_(LossInputs(raw, None, target, None, MASK_ID, None))


def test_score_entropy_is_cross_entropy_where_the_scores_sum_to_one():
    torch.manual_seed(0)
    raw = torch.randn(7, VOCAB_SIZE, dtype=torch.float64)
    raw[:, MASK_ID] = -torch.inf
    raw = raw.log_softmax(-1) + math.log(VOCAB_SIZE - 1)
    target = torch.randint(0, MASK_ID, (7,))
    finite = score_entropy(raw.clone(), target)
    ce = -(raw - math.log(VOCAB_SIZE - 1)).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(finite, ce.float(), rtol=1e-6, atol=1e-6)
    shifted = score_entropy(raw + 0.5, target)
    assert (shifted > finite).all()


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_finite_form_is_the_papers_score_entropy(p):
    """Scores s_y = e^raw / ((V-1)(e^σ-1)) under the absorbing graph's rates (docs/math.md §5).

    The paper's term for a masked position, at noise rate σ'(t), is
    σ' [ Σ_y s_y - r log s_{x0} + r (log r - 1) ] with the true ratio r = 1/(e^σ - 1); and
    σ'·r = w(t), which is all that is left of the shift.
    """
    torch.manual_seed(1)
    raw = torch.randn(5, VOCAB_SIZE, dtype=torch.float64)
    target = torch.randint(0, MASK_ID, (5,))
    esigm1 = p / (1 - p)
    score = (raw - math.log(VOCAB_SIZE - 1) - math.log(esigm1)).exp()
    score[:, MASK_ID] = 0.0
    ratio = 1 / esigm1
    chosen = score.gather(1, target[:, None]).squeeze(1)
    entropy = score.sum(1) - ratio * chosen.log() + ratio * (math.log(ratio) - 1)
    # loglinear: σ(t) = -log(1-t), σ' = 1/(1-p), w = 1/p.
    papers = entropy / (1 - p)
    ours = score_entropy(raw.clone(), target).double() / p
    torch.testing.assert_close(ours, papers, rtol=1e-5, atol=1e-5)


def test_score_entropy_gradient_is_autograds():
    torch.manual_seed(2)
    features, head = torch.randn(9, 6), torch.randn(VOCAB_SIZE, 6) * 0.3
    target, weight = torch.randint(0, MASK_ID, (9,)), torch.rand(9)
    bias = torch.randn(VOCAB_SIZE)
    grads = []
    for run in ("ours", "plain"):
        x, w, b = (t.clone().requires_grad_() for t in (features, head, bias))
        if run == "ours":
            loss = head_score_entropy(HeadInputs(x, w, b, target, weight, MASK_ID))[0]
        else:
            raw = x @ w.T + b - math.log(VOCAB_SIZE - 1)
            keep = torch.arange(VOCAB_SIZE) != MASK_ID
            values = raw[:, keep].exp().sum(1) - raw.gather(1, target[:, None]).squeeze(1) - 1
            loss = (values * weight).sum()
        loss.backward()
        grads.append((loss.detach(), x.grad, w.grad, b.grad))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_sedd_is_told_the_level_it_is_scored_at():
    """The score under a draw is the forward at that draw's own sigma."""
    model = tiny_model(**TOLD)
    x0, system = random_ids(2, 8), ScoreEntropy(8, MASK_ID)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, [2, 5]] = True
    select = mask.flatten().nonzero().squeeze(1)
    xt, level = torch.where(mask, MASK_ID, x0), torch.tensor([[0.3], [0.8]])
    found = system.scorer(model, x0, None)(xt, select, level)
    for row in range(2):
        sigma = -torch.log1p(-level[row : row + 1])
        features = model.encode(xt[row : row + 1], 8, sigma=sigma)[0, [2, 5]]
        raw, truth = model.logits(features).detach(), x0[row, [2, 5]]
        values = score_entropy(raw, truth)
        torch.testing.assert_close(found[2 * row : 2 * row + 2], values, rtol=1e-5, atol=1e-5)
    other = system.scorer(model, x0, None)(xt, select, level.flip(0))
    assert not torch.allclose(found, other)


def test_sedd_bound_is_no_better_than_the_normalised_one():
    """x - 1 >= log x: normalising the scores of the same network can only help."""
    model = tiny_model(**TOLD)
    rows = Rows(token_arrays(60), seq_len=8, block_size=8)
    options = {"estimator": "stratified", "repeats": 16}
    sedd = evaluate_likelihood(ScoreEntropy(8, MASK_ID), model, rows, **options)
    subs = evaluate_likelihood(MaskedDiffusion(8, MASK_ID), model, rows, **options)
    assert sedd.nelbo > subs.nelbo


def test_sigma_is_capped_for_the_network_alone():
    sigma = sigma_of(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(sigma, torch.tensor([0.0, math.log(2), math.log(1000)]))


@pytest.mark.parametrize("estimator", ["count", "stratified"])
def test_a_model_that_is_told_the_level_is_scored_without_bias(estimator):
    """Against the integral over t of w(t) E[Σ CE at level p(t)] (docs/math.md §4)."""
    model = tiny_model(**TOLD)
    size = 3
    rows = Rows(token_arrays(2), seq_len=size, block_size=size)
    x0 = rows.batch(np.array([0], dtype=np.uint64)).x0
    score = BlockDiffusion(size, MASK_ID).scorer(model, x0, None)
    total, points = 0.0, 200
    for index in range(points):
        p = (index + 0.5) / points
        for spots, chance in (([1], p * (1 - p)), ([2], p * (1 - p)), ([1, 2], p * p)):
            xt = x0.clone()
            xt[0, spots] = MASK_ID
            with torch.no_grad():
                nats = score(xt, torch.tensor(spots), torch.tensor([[p]])).sum().item()
            total += chance / p * nats / points
    system = BlockDiffusion(size, MASK_ID)
    found, spread = (
        evaluate_likelihood(system, model, rows, estimator=name, repeats=400)
        for name in (estimator, "count")  # one row: two halves alone say little of the spread
    )
    error = max(found.mc_error, spread.mc_error)
    assert error < 0.06
    assert abs(found.nelbo - total / 2) < 4 * error
    with pytest.raises(ConfigError, match="a time-conditioned model has no exact sum"):
        evaluate_likelihood(BlockDiffusion(size, MASK_ID), model, rows, estimator="exact")


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "block"), [("bd3lm", 4), ("mdlm", 64), ("sedd", 64), ("ar", 1)])
def test_every_system_has_its_block_size(system, block):
    model = ModelConfig(cond_width=8, time_conditioning=True) if system == "sedd" else ModelConfig()
    cfg = TrainConfig(system=system, seq_len=64, model=model)
    assert cfg.block == block
    built = build_system(cfg, MASK_ID)
    assert (built.name, built.block_size) == (system, block)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"system": "ar", "block_size": 4}, "block-size = 4: must be 1 for system = ar"),
        ({"system": "mdlm", "block_size": 4}, "block-size = 4: must be 128 for system = mdlm"),
        ({"block_size": 0}, "block-size = 0: must be at least 1"),
        ({"system": "sedd"}, "model.time-conditioning = False: must be True for system = sedd"),
        (
            {"system": "ar", "noise": NoiseConfig(schedule="cosine")},
            "noise.schedule = cosine: must be loglinear for system = ar",
        ),
        (
            {"system": "ar", "model": ModelConfig(cond_width=8, time_conditioning=True)},
            "model.time-conditioning = True: must be False for system = ar",
        ),
    ],
)
def test_settings_that_a_system_cannot_have(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_system(TrainConfig(**changes), MASK_ID)


def test_the_head_losses_leave_no_gradient_under_no_grad():
    features, head = torch.randn(3, 4), torch.randn(VOCAB_SIZE, 4, requires_grad=True)
    target, weight = torch.tensor([1, 2, 3]), torch.ones(3)
    inputs = HeadInputs(features, head, None, target, weight, MASK_ID)
    for loss in (head_cross_entropy, head_score_entropy):
        with torch.no_grad():
            assert not loss(inputs)[0].requires_grad


def test_presets_follow_the_system():
    from bd3lm.config import PRESETS, preset

    for name in PRESETS:
        assert preset(name, "sedd").model.time_conditioning
        assert preset(name, "ar").model.cond_width == 0
        for system in ("bd3lm", "mdlm", "sedd", "ar"):
            assert dataclasses.replace(preset(name, system), steps=1).system == system
    with pytest.raises(ConfigError, match="system = gan: must be one of bd3lm, mdlm, sedd, ar"):
        preset("demo", "gan")
