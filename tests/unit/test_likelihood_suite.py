"""Exact marginals and orders against brute force, against each other, and against samples."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from bd3lm.config import SampleConfig
from bd3lm.data import Rows
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.evaluate.orders import orders_bound
from bd3lm.evaluate.windows import Windows
from bd3lm.model import Transformer
from bd3lm.sample import Sampler
from bd3lm.sample.strategies import ordered
from bd3lm.systems import Autoregressive, BlockDiffusion, MaskedDiffusion, ScoreEntropy
from tests.conftest import MASK_ID, VOCAB_SIZE, random_ids, tiny_model, token_arrays

KINDS = ("nelbo", "marginal", "left-to-right", "confidence", "orders")


def rows_of(num_tokens, seq_len, block_size):
    data = token_arrays(num_tokens)
    return Rows(data, seq_len=seq_len, block_size=block_size, keep_last=True)


def score(model, rows, kind, system=None, **options):
    system = system or BlockDiffusion(rows.block_size, MASK_ID)
    return evaluate_likelihood(system, model, rows, likelihood=kind, **options)


def log_probs(model, ids, block_size):
    """log p of every token at every position of [1, T], mask token excluded."""
    logits = model.logits(model.encode(ids, block_size))[0].double()
    logits[:, MASK_ID] = -torch.inf
    return logits.log_softmax(-1)


def brute_force(model, x0, noisable, size, kind):
    """-log p of a row, each step of each order from a forward of its own without a cache."""
    total = 0.0
    for start in range(0, len(x0), size):
        stop = min(start + size, len(x0))
        spots = [i for i in range(start, stop) if noisable[i]]
        if not spots:
            continue

        def step(hidden, stop=stop):
            ids = x0[None, :stop].clone()
            ids[0, sorted(hidden)] = MASK_ID
            return log_probs(model, ids, size)

        def along(order, spots=spots, step=step):
            hidden, log_p = set(spots), 0.0
            for i in order:
                log_p += step(hidden)[i, x0[i]].item()
                hidden.remove(i)
            return log_p

        if kind == "left-to-right":
            total -= along(spots)
        elif kind == "marginal":
            orders = [along(order) for order in itertools.permutations(spots)]
            total -= math.log(sum(map(math.exp, orders)) / len(orders))
        elif kind == "confidence":
            hidden = set(spots)
            while hidden:
                found = step(hidden)
                i = max(sorted(hidden), key=lambda i: found[i].max().item())
                total -= found[i, x0[i]].item()
                hidden.remove(i)
    return total


@pytest.mark.parametrize("kind", ["marginal", "left-to-right", "confidence"])
def test_each_is_brute_force_over_its_orders(kind):
    """Marginal: the mean over all n! orders of the chain rule; a padded last block, too."""
    model, size = tiny_model(), 4
    data = token_arrays(9)
    rows = Rows(data, seq_len=8, block_size=size, keep_last=True)
    batch = rows.batch(np.arange(len(rows), dtype=np.uint64))
    with torch.no_grad():
        want = []
        for x0, noisable in zip(batch.x0, batch.noisable, strict=True):
            length = int(noisable.nonzero().max()) + 1
            want.append(brute_force(model, x0[:length], noisable[:length], size, kind))
    found = score(model, rows, kind)
    np.testing.assert_allclose(found.row_nats, want, rtol=1e-5)
    assert found.estimator == "exact"
    assert found.forwards == 1 + (15 if kind == "marginal" else 4)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_marginal_is_between_the_best_order_and_the_nelbo(size):
    model, rows = tiny_model(), rows_of(62, 16, size)
    marginal = score(model, rows, "marginal")
    assert (marginal.row_nats < marginal.nelbo * marginal.row_tokens.sum()).all()
    assert marginal.nll < marginal.nelbo
    if size <= 4:
        exact = score(model, rows, "nelbo", estimator="exact")
        assert marginal.nelbo == pytest.approx(exact.nelbo, rel=1e-6)
        assert (marginal.row_nats <= exact.row_nats).all()
    left = score(model, rows, "left-to-right")
    # The mean of S! probabilities is at least each one's share of it.
    blocks = marginal.row_tokens / size + 1
    assert (marginal.row_nats <= left.row_nats + blocks * math.lgamma(size + 1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", [BlockDiffusion(1, MASK_ID), Autoregressive(MASK_ID)])
def test_at_block_size_one_all_are_equal(kind, system):
    model, rows = tiny_model(), rows_of(30, 12, 1)
    exact = score(model, rows, "nelbo", system, estimator="exact")
    found = score(model, rows, kind, system, repeats=2)
    np.testing.assert_allclose(found.row_nats, exact.row_nats, rtol=1e-6)


def test_more_orders_tighten_the_bound_towards_the_marginal():
    model, rows = tiny_model(), rows_of(62, 16, 4)
    marginal = score(model, rows, "marginal")
    bounds = [score(model, rows, "orders", repeats=r) for r in (2, 8, 64)]
    gaps = [bound.nelbo - bound.nll for bound in bounds]  # on the same draws, so without noise
    assert 0 < gaps[0] < gaps[1]
    assert gaps[2] == pytest.approx(marginal.nelbo - marginal.nll, rel=0.1)
    assert abs(bounds[2].nll - marginal.nll) < 4 * bounds[2].mc_error + 0.002
    assert bounds[0].mc_error > bounds[1].mc_error > bounds[2].mc_error > 0


def test_the_jackknife_is_the_spread_of_the_bound():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(4000, 16, generator=generator, dtype=torch.float64) * 0.5
    nats, variance = orders_bound(log_p.T)
    assert nats.var().item() == pytest.approx(variance.mean().item(), rel=0.1)
    assert nats.mean().item() > -(0.5**2) / 2  # Jensen: above -log E p
    fewer = [orders_bound(log_p.T[:count])[0].mean() for count in (2, 4, 8)]
    assert fewer[0] > fewer[1] > fewer[2] > nats.mean()


def test_full_rows_have_no_clean_stream():
    model, rows = tiny_model(), rows_of(21, 8, 8)
    found = score(model, rows, "marginal", MaskedDiffusion(8, MASK_ID))
    same = score(model, rows, "marginal")
    np.testing.assert_allclose(found.row_nats, same.row_nats, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batch(kind):
    model, rows = tiny_model(), rows_of(100, 16, 4)
    options = {"estimator": "stratified", "repeats": 4, "per_token": True}
    one = score(model, rows, kind, batch_size=1, **options)
    many = score(model, rows, kind, batch_size=7, **options)
    np.testing.assert_allclose(one.row_nats, many.row_nats, rtol=1e-5)
    np.testing.assert_array_equal(one.token_ids, many.token_ids)
    assert (one.token_nats is None) == (kind in ("marginal", "orders"))
    if one.token_nats is not None:
        np.testing.assert_allclose(one.token_nats.sum(), one.row_nats.sum(), rtol=1e-9)
        np.testing.assert_allclose(one.token_nats, many.token_nats, rtol=1e-4, atol=1e-5)


def small_vocabulary(block_size, length):
    """A sharp random model of six ids, and every row that it can draw."""
    torch.manual_seed(3)
    model = Transformer(tiny_model().cfg, 6)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    system = BlockDiffusion(block_size, 5)
    rows = [list(row) for row in itertools.product(range(5), repeat=length - 1)]
    data = TokenArrays(rows, vocab_size=6, bos_id=0, eos_id=1, mask_id=5)
    return model.eval(), system, data


def test_probabilities_of_all_rows_sum_to_one_and_are_the_sampler_s():
    """Chi-square of 4,000 first-hitting samples against the exact marginal, S = 4."""
    length = 4
    model, system, _ = small_vocabulary(4, length)
    texts = list(itertools.product(range(5), repeat=length - 1))
    windows = Windows(
        [((), text) for text in texts],
        seq_len=length,
        block_size=4,
        bos_id=0,
        mask_id=5,
        vocab_size=6,
    )
    found = evaluate_likelihood(system, model, windows, likelihood="marginal", batch_size=125)
    p = np.exp(-windows.totals(found.row_nats, len(texts)))
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    for kind in ("left-to-right", "confidence"):
        other = evaluate_likelihood(system, model, windows, likelihood=kind)
        assert np.exp(-other.row_nats).sum() == pytest.approx(1.0, abs=1e-5)

    sampler = Sampler(model, system, window=length, bos_id=0, eos_id=99)
    num = 4000
    samples = sampler.generate(SampleConfig(num=num, length=length, top_p=1.0), [[]])
    counts = Counter(tuple(sample.ids) for sample in samples)
    observed = np.array([counts[text] for text in texts], dtype=float)
    big = p * num >= 5
    expected = np.append(p[big], p[~big].sum()) * num
    observed = np.append(observed[big], observed[~big].sum())
    degrees = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Wilson and Hilferty: its cube root is normal; four deviations.
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5
    assert degrees > 20
    assert abs(z) < 4
    assert -np.log(p) @ p < found.nelbo * found.row_tokens[0] * 10


def test_time_conditioned_models_have_bounds_alone():
    model = tiny_model(cond_width=8, time_conditioning=True)
    rows = rows_of(62, 16, 4)
    for kind in ("marginal", "left-to-right", "confidence"):
        with pytest.raises(ConfigError, match=f"likelihood = {kind}.*nelbo or orders"):
            score(model, rows, kind)
    nelbo = score(model, rows, "nelbo", estimator="count", repeats=128)
    orders = score(model, rows, "orders", repeats=32)
    assert orders.nll < nelbo.nll
    assert abs(orders.nelbo - nelbo.nelbo) < 0.05
    with pytest.raises(ConfigError, match="nelbo where scores"):
        score(model, rows_of(62, 16, 16), "orders", ScoreEntropy(16, MASK_ID))


def test_what_is_not_allowed_says_so():
    model = tiny_model()
    with pytest.raises(ConfigError, match="above block-size = 8"):
        score(model, rows_of(50, 16, 16), "marginal")
    with pytest.raises(ConfigError, match="repeats = 1"):
        score(model, rows_of(50, 16, 4), "orders", repeats=1)
    with pytest.raises(ConfigError, match="batch-size = -3"):
        score(model, rows_of(50, 16, 4), "marginal", batch_size=-3)
    with pytest.raises(ConfigError, match="rows = 0"):
        score(model, rows_of(50, 16, 4), "marginal", max_rows=0)


def test_greedy_is_what_the_order_decodes():
    """Rows filled by greedy decoding are greedy, and no other row is."""
    model, system, _ = small_vocabulary(2, 4)
    texts = list(itertools.product(range(5), repeat=3))
    windows = Windows(
        [((), text) for text in texts], seq_len=4, block_size=2, bos_id=0, mask_id=5, vocab_size=6
    )
    for kind in ("left-to-right", "confidence"):
        found = evaluate_likelihood(system, model, windows, likelihood=kind, greedy=True)
        assert found.row_greedy.sum() == 1
    every = evaluate_likelihood(system, model, windows, likelihood="marginal", greedy=True)
    assert every.row_greedy.sum() <= 1


# --- answers and long texts ------------------------------------------------------------------


def windows_of(parts, seq_len=16, block_size=4):
    return Windows(
        parts,
        seq_len=seq_len,
        block_size=block_size,
        bos_id=0,
        mask_id=MASK_ID,
        vocab_size=VOCAB_SIZE,
    )


@pytest.mark.parametrize("kind", ["marginal", "left-to-right", "confidence"])
def test_an_answer_sees_its_prompt_and_masks_behind_it(kind):
    """Brute force: the prompt's tail is clean, the block's other positions stay masked."""
    model, system = tiny_model(), BlockDiffusion(4, MASK_ID)
    ids = random_ids(1, 11)[0]
    prompt, answer = ids[1:6].tolist(), ids[6:10].tolist()  # positions 6..9 of blocks 1 and 2
    found = evaluate_likelihood(system, model, windows_of([(prompt, answer)]), likelihood=kind)
    x0 = torch.full((12,), MASK_ID)
    x0[:10] = ids[:10]
    noisable = torch.zeros(12, dtype=torch.bool)
    noisable[6:10] = True
    with torch.no_grad():
        want = brute_force(model, x0, noisable, 4, kind)
    assert found.row_nats.sum() == pytest.approx(want, rel=1e-5)
    assert found.tokens == 4


def test_answers_do_not_depend_on_their_batch():
    model, system = tiny_model(), BlockDiffusion(4, MASK_ID)
    parts = [(random_ids(n)[1:].tolist(), random_ids(3, seed=n).tolist()) for n in (2, 9, 5, 12)]
    together = windows_of(parts)
    for kind in KINDS:
        options = {"likelihood": kind, "estimator": "stratified", "repeats": 4}
        found = evaluate_likelihood(system, model, together, **options)
        alone = [
            evaluate_likelihood(system, model, windows_of([part]), **options).row_nats.sum()
            for part in parts
        ]
        totals = together.totals(found.row_nats, len(parts))
        np.testing.assert_allclose(totals, alone, rtol=1e-5)


@pytest.mark.parametrize(("seq_len", "block_size"), [(16, 4), (16, 8), (8, 8), (8, 1), (12, 2)])
def test_windows_score_each_token_once_with_the_sampler_s_context(seq_len, block_size):
    text = [1 + i % 7 for i in range(53)]
    windows = windows_of([((), text)], seq_len, block_size)
    batch = windows.batch(np.arange(len(windows), dtype=np.uint64))
    assert int(batch.noisable.sum()) == len(text)
    seen = []
    for index in range(len(windows)):
        row = windows.batch(np.array([index], dtype=np.uint64))
        seen += row.x0[row.noisable].tolist()
        first = int(row.noisable[0].nonzero().min())
        assert first == 1 or first >= seq_len // 2
    assert sorted(seen) == sorted(text)


def test_a_long_row_has_the_sampler_s_own_probability():
    """Greedy samples that outgrow the window: the sampler's log p is the score's, S = 1."""
    model, system = tiny_model(), BlockDiffusion(1, MASK_ID)
    sampler = Sampler(model, system, window=8, bos_id=0, eos_id=99)
    cfg = SampleConfig(num=2, length=21, top_p=1.0)
    for sample in sampler.generate(cfg, [[3, 4]]):
        windows = windows_of([(sample.ids[:2], sample.ids[2:])], 8, 1)
        found = evaluate_likelihood(system, model, windows, likelihood="marginal")
        assert found.row_nats.sum() == pytest.approx(-sample.log_prob, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("left-to-right", ordered.left_to_right), ("confidence", ordered.by_confidence)],
)
def test_samples_of_an_order_have_its_likelihood(kind, strategy):
    """The sampler's own log p is the score of its own rows, prompts and long rows included."""
    model, system = tiny_model(), BlockDiffusion(4, MASK_ID)
    sampler = Sampler(model, system, window=16, bos_id=0, eos_id=99)
    cfg = SampleConfig(num=2, length=28, top_p=1.0)
    for sample in sampler.generate(cfg, [[3, 4], [5]], strategy=strategy):
        given = 2 if sample.ids[:2] == [3, 4] else 1
        windows = windows_of([(sample.ids[:given], sample.ids[given:])], 16, 4)
        found = evaluate_likelihood(system, model, windows, likelihood=kind)
        assert found.row_nats.sum() == pytest.approx(-sample.log_prob, rel=1e-5)


def test_answers_that_cannot_be_scored_say_so():
    with pytest.raises(ConfigError, match="answer = no tokens"):
        windows_of([((1, 2), ())])
    with pytest.raises(ConfigError, match=r"ids = \[15\]"):
        windows_of([((1, 2), (3, MASK_ID))])
