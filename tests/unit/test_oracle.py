"""Every decoding rule against a source whose distribution is known."""

import numpy as np
import pytest

from bd3lm.config import SampleConfig
from bd3lm.errors import ConfigError
from bd3lm.evaluate.oracle import MarkovSource, compare_decoding
from bd3lm.sample.strategies import ordered

WHOLE = SampleConfig(top_p=1.0)
EXACT = {
    "first hitting": (WHOLE, None),
    "left to right": (WHOLE, ordered.left_to_right),
    "confidence": (WHOLE, ordered.by_confidence),
    "threshold 1": (SampleConfig(top_p=1.0, threshold=1.0), None),
}


def test_posteriors_are_sums_over_all_rows():
    source = MarkovSource(
        np.array([0.5, 0.3, 0.2]),
        np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]),
        4,
    )
    p = source.probabilities()
    rows = np.array(np.unravel_index(np.arange(81), (3,) * 4)).T
    assert p.sum() == pytest.approx(1.0)
    for ids in ([-1, -1, -1, -1], [-1, 2, -1, 0], [1, -1, -1, -1]):
        fits = np.all([(rows[:, i] == x) | (x < 0) for i, x in enumerate(ids)], axis=0)
        found = source.posterior(np.array([ids]), np.array([-1]))[0]
        for i, x in enumerate(ids):
            if x < 0:
                want = [p[fits & (rows[:, i] == v)].sum() / p[fits].sum() for v in range(3)]
                np.testing.assert_allclose(found[i], want, rtol=1e-12)
    # After a known token the chain follows its transitions.
    after = source.posterior(np.array([[-1, -1]]), np.array([2]))[0]
    np.testing.assert_allclose(after[0], source.transition[2])


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_one_token_a_forward_is_exact_in_any_order(block_size):
    source = MarkovSource.sticky(2, 0.85, 7)
    for name, point in compare_decoding(source, EXACT, block_size=block_size, num=3000).items():
        assert point.total_variation < 1.5 * point.floor, name
        # S = 8 is one block; otherwise one forward a token, BOS's block included.
        assert point.forwards == pytest.approx(1.0)


def test_tokens_that_do_not_see_each_other_cost_total_variation():
    source = MarkovSource.sticky(2, 0.9, 7)
    rules = {
        f"{k} a forward": (SampleConfig(top_p=1.0, tokens_per_forward=k), None)
        for k in (1, 2, 4, 7)
    }
    rules |= {f"{n} levels": (SampleConfig(top_p=1.0, steps=n), None) for n in (1, 4, 64)}
    found = compare_decoding(source, rules, block_size=8, num=3000)
    for names in (
        ["1 a forward", "2 a forward", "4 a forward", "7 a forward"],
        ["64 levels", "4 levels", "1 levels"],
    ):
        distances = [found[name].total_variation for name in names]
        forwards = [found[name].forwards for name in names]
        assert distances == sorted(distances)
        assert forwards == sorted(forwards, reverse=True)
    assert found["7 a forward"].forwards == pytest.approx(1 / 7)
    assert found["7 a forward"].total_variation > 0.4  # independent tokens of a sticky chain


def test_parallel_and_greedy_decoding_lie_where_they_should():
    source = MarkovSource.sticky(2, 0.95, 7)
    rules = {
        "threshold 0.9": (SampleConfig(top_p=1.0, threshold=0.9), None),
        "entropy bound 0.3": (SampleConfig(top_p=1.0, entropy_bound=0.3), None),
        "all at once": (SampleConfig(top_p=1.0, tokens_per_forward=7), None),
        "greedy": (SampleConfig(temperature=0.0), ordered.by_confidence),
    }
    found = compare_decoding(source, rules, block_size=8, num=2000)
    for name in ("threshold 0.9", "entropy bound 0.3"):
        assert found[name].forwards < 0.8, name
        assert found[name].total_variation < found["all at once"].total_variation, name
    # All of its mass on one row.
    assert found["greedy"].total_variation == pytest.approx(
        1 - source.probabilities().max(), abs=1e-9
    )


def test_a_source_that_is_none_says_so():
    with pytest.raises(ConfigError, match="sum to one"):
        MarkovSource(np.array([0.5, 0.6]), np.eye(2), 4)
    with pytest.raises(ConfigError, match="length = 30"):
        MarkovSource.sticky(2, 0.9, 30)
