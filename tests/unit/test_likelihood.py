"""The estimators of docs/math.md §4 against brute force, and against each other."""

import itertools
import math

import numpy as np
import pytest
import torch

from bd3lm.cli.summary import likelihood_line
from bd3lm.config import NoiseConfig
from bd3lm.data import Rows, Schedule
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.evaluate.draws import sampled_draws
from bd3lm.systems import BlockDiffusion
from tests.conftest import MASK_ID, random_ids, tiny_model, token_arrays


def rows_of(num_tokens, seq_len, block_size, **options):
    data = token_arrays(num_tokens)
    return Rows(data, seq_len=seq_len, block_size=block_size, keep_last=True, **options)


def score(model, rows, **options):
    system = BlockDiffusion(rows.block_size, MASK_ID)
    return evaluate_likelihood(system, model, rows, **options)


def conditional_nll(model, context, block_size):
    """-log p of every token at the last block of ``context`` [1, T], mask token excluded."""
    logits = model.logits(model.encode(context, block_size))[0].double()
    logits[:, MASK_ID] = -torch.inf
    return -torch.log_softmax(logits, -1)


def test_exact_is_the_sum_over_all_subsets():
    """Σ_M B(|M|, n-|M|+1) Σ_{i∈M} CE_i(M), each CE from a forward of its own."""
    model, seq_len, size = tiny_model(), 8, 4
    rows = rows_of(12, seq_len, size)  # a full row, and one with padding
    total = 0.0
    for row in range(len(rows)):
        batch = rows.batch(np.array([row], dtype=np.uint64))
        live = int((batch.noisable[0].nonzero().max() + 1).item())
        for start in range(0, live, size):
            spots = [i for i in range(start, min(start + size, live)) if batch.noisable[0, i]]
            n = len(spots)
            for k in range(1, n + 1):
                beta = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
                for subset in itertools.combinations(spots, k):
                    ids = batch.x0[:, : min(start + size, live)].clone()
                    ids[0, list(subset)] = MASK_ID
                    nll = conditional_nll(model, ids, size)
                    total += beta * sum(nll[i, batch.x0[0, i]].item() for i in subset)
    result = score(model, rows, estimator="exact")
    assert result.tokens == 12
    assert result.coverage == 1.0
    assert result.nelbo == pytest.approx(total / 12, rel=1e-5)
    assert result.forwards == 1 + 15


def test_at_block_size_one_it_is_the_chain_rule():
    """S = 1: -log p of each token from a mask query behind the clean tokens before it."""
    model = tiny_model()
    x0 = random_ids(1, 9)
    rows = Rows(_arrays(x0), seq_len=9, block_size=1, keep_last=True)
    expected = 0.0
    for i in range(1, 9):
        ids = torch.cat([x0[:, :i], torch.tensor([[MASK_ID]])], dim=1)
        expected += conditional_nll(model, ids, 1)[i, x0[0, i]].item()
    result = score(model, rows, estimator="exact")
    assert result.nelbo * result.tokens == pytest.approx(expected, rel=1e-5)
    counted = score(model, rows, estimator="count", repeats=2)
    assert counted.nelbo == pytest.approx(result.nelbo, rel=1e-6)
    assert counted.mc_error == pytest.approx(0.0, abs=1e-7)


def _arrays(x0):
    from bd3lm.data.store import TokenArrays

    return TokenArrays(
        [x0[0, 1:].tolist()], vocab_size=MASK_ID + 1, bos_id=0, eos_id=1, mask_id=MASK_ID
    )


@pytest.mark.parametrize(("estimator", "repeats"), [("count", 64), ("stratified", 64)])
def test_sampled_estimators_agree_with_exact(estimator, repeats):
    model, rows = tiny_model(), rows_of(150, 16, 4)
    exact = score(model, rows, estimator="exact")
    sampled = score(model, rows, estimator=estimator, repeats=repeats)
    assert exact.mc_error == 0
    assert 0 < sampled.mc_error < 0.1
    assert abs(sampled.nelbo - exact.nelbo) < 4 * sampled.mc_error
    assert sampled.tokens == exact.tokens == 150


def test_bernoulli_misses_only_the_mass_below_its_lowest_level():
    """The estimate on [1e-3, 1] lacks ∫_0^1e-3 w p ... <= 1e-3 of the largest CE, each token."""
    model, rows = tiny_model(), rows_of(150, 16, 4)
    exact = score(model, rows, estimator="exact")
    sampled = score(model, rows, estimator="bernoulli", repeats=256)
    missed = 1e-3 * 20.0  # no CE of this model is above 20 nats
    assert abs(sampled.nelbo - exact.nelbo) < 5 * sampled.mc_error + missed


def test_stratified_masks_every_count_equally_often():
    """Each half of 2·S draws has every count k = 1..S once in every whole block."""
    rows = rows_of(150, 16, 8)
    batch = rows.batch(np.arange(len(rows), dtype=np.uint64))
    draws = sampled_draws(
        batch,
        8,
        "stratified",
        16,
        seed=3,
        keys=np.arange(len(rows), dtype=np.uint64),
        num_rows=len(rows),
        schedule=Schedule("loglinear"),
    )
    counts = {0: [], 1: []}
    for draw in draws:
        counts[draw.group].append(draw.mask.view(len(rows), -1, 8).sum(-1))
    whole = batch.noisable.view(len(rows), -1, 8).all(-1)
    for half in counts.values():
        found = torch.stack(half).sort(0).values[:, whole]
        assert (found == torch.arange(1, 9)[:, None]).all()


def test_neighbouring_seeds_share_no_draws():
    """Scores of seeds s and s + 1 are uncorrelated, and mc_error is their spread."""
    model, rows = tiny_model(), rows_of(30, 16, 4)
    results = [score(model, rows, estimator="count", repeats=4, seed=s) for s in range(-1, 79)]
    nelbo = np.array([r.nelbo for r in results])
    assert abs(np.corrcoef(nelbo[:-1], nelbo[1:])[0, 1]) < 0.35
    spread = np.sqrt(np.mean([r.mc_error**2 for r in results]))
    assert nelbo.std(ddof=1) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize("estimator", ["exact", "stratified", "bernoulli"])
def test_scores_do_not_depend_on_the_batch(estimator):
    model, rows = tiny_model(), rows_of(100, 12, 4)
    one = score(model, rows, estimator=estimator, batch_size=1)
    many = score(model, rows, estimator=estimator, batch_size=7)
    assert one.nelbo == pytest.approx(many.nelbo, rel=1e-6)


def test_stride_scores_each_token_once_with_more_context():
    model = tiny_model()
    rows = rows_of(60, 16, 4, stride=4)
    strided = score(model, rows, estimator="exact")
    assert strided.tokens == 60
    assert strided.coverage == 1.0
    plain = score(model, rows_of(60, 16, 4), estimator="exact")
    assert strided.nelbo != plain.nelbo


def test_bits_per_byte_counts_all_nats_over_all_bytes():
    model, rows = tiny_model(), rows_of(50, 16, 4)
    result = score(model, rows, estimator="exact", num_bytes=123)
    assert result.bpb == pytest.approx(result.nelbo * 50 / math.log(2) / 123)
    assert result.ppl == pytest.approx(math.exp(result.nelbo))
    part = score(model, rows, estimator="exact", num_bytes=123, max_rows=2)
    assert part.bpb is None
    assert part.coverage < 1


def test_full_size_block_equals_a_brute_force_mdlm():
    """S = L: full attention over xt alone; the exact sum written out."""
    model, length = tiny_model(), 4
    x0 = random_ids(1, length)
    rows = Rows(_arrays(x0), seq_len=length, block_size=length, keep_last=True)
    total, n = 0.0, length - 1
    for k in range(1, n + 1):
        beta = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
        for subset in itertools.combinations(range(1, length), k):
            xt = x0.clone()
            xt[0, list(subset)] = MASK_ID
            nll = conditional_nll(model, xt, length)
            total += beta * sum(nll[i, x0[0, i]].item() for i in subset)
    result = score(model, rows, estimator="exact")
    assert result.nelbo * n == pytest.approx(total, rel=1e-5)


def test_what_is_not_allowed_says_so():
    model = tiny_model()
    with pytest.raises(ConfigError, match="estimator = exact: must be a sampled one"):
        score(model, rows_of(50, 16, 8), estimator="exact")
    with pytest.raises(ConfigError, match="repeats = 3: must be an even number"):
        score(model, rows_of(50, 16, 8), estimator="stratified", repeats=3)


def test_a_tabulated_schedule_gives_the_same_bound_and_sampling_grid():
    """`bernoulli` under t^2 and under a table of t^2 draws the same masks."""
    model, rows = tiny_model(), rows_of(40, 16, 4)
    square = Schedule("square")
    table = Schedule.from_callable(lambda t: t**2)
    options = {"estimator": "bernoulli", "repeats": 4}
    want = score(model, rows, schedule=square, **options)
    got = score(model, rows, schedule=table, **options)
    assert got.nelbo == pytest.approx(want.nelbo, rel=1e-4)
    noise = NoiseConfig(schedule="table", schedule_table=table.points)
    system = BlockDiffusion(4, MASK_ID, noise)
    np.testing.assert_allclose(
        system.level_grid(20),
        BlockDiffusion(4, MASK_ID, NoiseConfig(schedule="square")).level_grid(20),
    )
    assert system.noise(0) is not None


def test_a_single_row_has_no_error_of_the_data():
    model = tiny_model()
    one = score(model, rows_of(7, 8, 4), estimator="exact")
    assert one.data_error is None
    more = score(model, rows_of(21, 8, 4), estimator="exact")
    assert more.data_error is not None
    assert more.data_error > 0


def test_the_line_of_a_likelihood_says_what_is_not_known():
    found = {
        "val_nelbo": 5.0,
        "val_ppl": 148.41,
        "val_bpb": 2.0,
        "val_data_error": 0.05,
        "val_tokens": 7,
        "val_coverage": 1.0,
        "estimator": "exact",
    }
    assert "2.000 ± 0.020 bits per byte" in likelihood_line(found)
    part = found | {"val_bpb": None, "val_coverage": 0.4, "val_data_error": None}
    line = likelihood_line(part)
    assert "bits per byte need the whole text" in line
    assert "one row" in line
