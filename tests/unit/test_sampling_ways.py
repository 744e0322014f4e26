"""Other ways to sample than first hitting: their laws by enumeration, and their cost."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from bd3lm.config import NoiseConfig, SampleConfig
from bd3lm.data import Rows
from bd3lm.data.store import TokenArrays
from bd3lm.errors import ConfigError
from bd3lm.evaluate import evaluate_likelihood
from bd3lm.sample import Sampler
from bd3lm.sample.draw import composed_draw, discourage, draw
from bd3lm.sample.plan import plan_block
from bd3lm.systems import Autoregressive, BlockDiffusion, MaskedDiffusion, ScoreEntropy
from tests.conftest import MASK_ID, VOCAB_SIZE, tiny_model
from tests.unit.test_sampler import chi_square, config, first_hitting_joint, sampler, small_model

M = 4  # the mask id of the models whose laws are enumerated: ids 0..3


def log_p(model, ids, block_size):
    logits = model.logits(model.encode(torch.tensor([ids]), block_size))[0].detach().double()
    logits[:, M] = -torch.inf
    return torch.log_softmax(logits, -1)


def fits(samples, joint):
    """Chi-square of the samples' ids against a law, at about 0.1%."""
    num = len(samples)
    counts = Counter(tuple(x.ids) for x in samples)
    expected = {k: num * p for k, p in joint.items() if num * p >= 5}
    rest = num - sum(expected.values())
    seen = num - sum(counts[k] for k in expected)
    statistic = chi_square(counts, expected) + (seen - rest) ** 2 / max(rest, 1.0)
    degrees = len(expected)
    return statistic < degrees + 3.3 * math.sqrt(2 * degrees)


def two_step_joint(model):
    """Ancestral sampling of [0, x, y] on a grid of two levels: each is revealed early or late."""
    joint = {}
    both = log_p(model, [0, M, M], 3)
    for x, y in itertools.product(range(M), repeat=2):
        together = both[1, x] + both[2, y]
        x_first = both[1, x] + log_p(model, [0, x, M], 3)[2, y]
        y_first = both[2, y] + log_p(model, [0, M, y], 3)[1, x]
        joint[x, y] = float(0.5 * together.exp() + 0.25 * x_first.exp() + 0.25 * y_first.exp())
    assert sum(joint.values()) == pytest.approx(1.0)
    return joint


class Normalised(ScoreEntropy):
    """A SEDD whose scores sum to one for any weights."""

    def logits(self, model, features):
        logits = super().logits(model, features).double()
        return logits.log_softmax(-1) + math.log(logits.shape[-1] - 1)


@pytest.mark.parametrize("system", [MaskedDiffusion, BlockDiffusion, Normalised])
@torch.inference_mode()
def test_ancestral_samples_follow_the_enumerated_joint(system):
    """Analytic steps of scores that sum to one are ancestral steps."""
    model, num = small_model(M + 1), 6000
    s = Sampler(model, system(3, M), window=3, bos_id=0, eos_id=99)
    cfg = SampleConfig(num=num, length=3, top_p=1.0, steps=2)
    samples = s.generate(cfg)
    assert fits(samples, two_step_joint(model))
    # A forward that would reveal nothing is not run: half of the rows need one, half two.
    if system is not Normalised:
        assert {x.nfe for x in samples} == {1, 2}


@torch.inference_mode()
def test_infilling_follows_the_enumerated_joint():
    """[0, x, 2, y]: tokens between the holes are context for both."""
    model, num = small_model(M + 1), 4000
    joint = first_hitting_joint(model, [0, M, 2, M], 4, M, 4)
    s = Sampler(model, MaskedDiffusion(4, M), window=4, bos_id=0, eos_id=99)
    samples = s.generate(SampleConfig(num=num, length=4, top_p=1.0), [[None, 2, None]])
    assert all(x.ids[1] == 2 for x in samples)
    assert fits(samples, {(x, 2, y): p for (x, y), p in joint.items()})


@torch.inference_mode()
def test_ar_samples_follow_the_chain_rule():
    model, num = small_model(M + 1), 6000
    first = log_p(model, [0], 1)[0]
    joint = {
        (x, y): float((first[x] + log_p(model, [0, x], 1)[1, y]).exp())
        for x, y in itertools.product(range(M), repeat=2)
    }
    s = Sampler(model, Autoregressive(M), window=8, bos_id=0, eos_id=99)
    samples = s.generate(SampleConfig(num=num, length=3, top_p=1.0))
    assert fits(samples, joint)
    assert {x.nfe for x in samples} == {2}  # BOS predicts the first token: no other forward


def test_ar_through_the_cache_and_past_the_window():
    """Greedy, against the argmax of plain causal forwards over the same context."""
    model = tiny_model()
    s = Sampler(model, Autoregressive(MASK_ID), window=16, bos_id=0, eos_id=99)
    sample = s.generate(config(length=37, temperature=0.0), [[3, 4, 5]])[0]
    ids = [0, 3, 4, 5]
    while len(ids) < 37:
        base = 0
        while len(ids) + 1 - base > 16:
            base += 8
        context = ids if base == 0 else [0, *ids[base + 1 :]]
        logits = model.logits(model.encode(torch.tensor([context]), 1))[0, -1]
        logits[MASK_ID] = -torch.inf
        ids.append(int(logits.argmax()))
    assert sample.ids == ids[1:]


@pytest.mark.parametrize("system", [Autoregressive(MASK_ID), BlockDiffusion(1, MASK_ID)])
def test_log_prob_is_the_likelihood_of_the_same_tokens(system):
    model = tiny_model()
    s = Sampler(model, system, window=16, bos_id=0, eos_id=99)
    sample = s.generate(config(length=16, top_p=0.7, temperature=0.8), [[]])[0]
    data = TokenArrays([sample.ids], vocab_size=VOCAB_SIZE, bos_id=0, eos_id=1, mask_id=MASK_ID)
    rows = Rows(data, seq_len=16, block_size=1, keep_last=True)
    result = evaluate_likelihood(system, model, rows, estimator="exact")
    assert sample.log_prob == pytest.approx(-result.nelbo * result.tokens, rel=1e-5)


def test_rows_of_every_way_do_not_depend_on_the_batch():
    told = tiny_model(cond_width=8, time_conditioning=True)
    for model, system, changes in [
        (tiny_model(), BlockDiffusion(4, MASK_ID), {"steps": 3}),
        (tiny_model(), BlockDiffusion(4, MASK_ID), {"threshold": 0.4}),
        (tiny_model(), BlockDiffusion(4, MASK_ID), {"entropy_bound": 1.0}),
        (tiny_model(), BlockDiffusion(4, MASK_ID), {"repetition_penalty": 1.5, "top_k": 3}),
        (tiny_model(), Autoregressive(MASK_ID), {}),
        (told, BlockDiffusion(4, MASK_ID), {}),
        (told, ScoreEntropy(16, MASK_ID), {"steps": 5}),
    ]:
        s = Sampler(model, system, window=16, bos_id=0, eos_id=99)
        cfg = config(length=16 if system.block_size == 16 else 39, **changes)
        prompts = [[3, 4], [], [5, 6, 7, 8, 9], [1, None, 2]]
        if system.block_size < 16:  # past the first window, and holes on both sides of it
            prompts += [[3] * 26, [4, None, *[5] * 20, None, 6]]
        together = s.generate(cfg, prompts)
        for index, prompt in enumerate(prompts):
            alone = s.generate(cfg, [prompt], first=index)[0]
            beside = together[index]
            assert alone.ids == beside.ids
            assert (alone.nfe, alone.nfe_paper) == (beside.nfe, beside.nfe_paper)
            assert alone.log_prob == pytest.approx(together[index].log_prob, abs=1e-4)
            given = [t for t in prompt if t is not None]
            assert [t for t, p in zip(alone.ids, prompt, strict=False) if p is not None] == given


def test_threshold_one_is_first_hitting_and_a_low_one_is_one_forward_a_block():
    s = sampler()
    plain, exact, loose = (
        s.generate(config(length=16, **changes), [[]] * 5)
        for changes in ({}, {"threshold": 1.0}, {"threshold": 1e-6})
    )
    assert [x.ids for x in plain] == [x.ids for x in exact]
    assert {x.nfe for x in plain} == {15}
    assert {x.nfe for x in loose} == {4}


def test_entropy_bound_runs_from_one_token_to_a_whole_block():
    s = sampler()
    for bound, nfe in ((0.0, 15), (1e9, 4)):
        samples = s.generate(config(length=16, entropy_bound=bound), [[]] * 3)
        assert {x.nfe for x in samples} == {nfe}


def test_tokens_per_forward_divides_the_forwards():
    samples = sampler().generate(config(length=16, tokens_per_forward=2), [[]] * 3)
    assert {x.nfe for x in samples} == {2 + 3 * 2}  # BOS's block has three masks


def test_sedd_takes_at_most_one_forward_more_than_its_levels():
    model = tiny_model(cond_width=8, time_conditioning=True)
    s = Sampler(model, ScoreEntropy(16, MASK_ID), window=16, bos_id=0, eos_id=99)
    samples = s.generate(config(length=16, steps=6), [[]] * 8)
    assert all(x.nfe <= 7 and len(x.ids) == 15 for x in samples)
    assert all(0 <= t < MASK_ID for x in samples for t in x.ids)
    for changes in ({"threshold": 0.9}, {"tokens_per_forward": 2}):
        with pytest.raises(ConfigError, match="must be left out for sedd"):
            s.generate(config(length=16, **changes), [[]])


def test_many_levels_leave_no_mask_and_cost_one_forward_a_token():
    for steps in (1, 2, 1000):
        samples = sampler().generate(config(length=16, steps=steps), [[]] * 4)
        assert all(len(x.ids) == 15 and MASK_ID not in x.ids for x in samples)
        assert all(x.nfe <= min(4 * steps, 15) for x in samples)


@pytest.mark.parametrize("schedule", ["square", "logarithmic", "cosine", "gaussian"])
def test_ancestral_levels_are_the_schedules(schedule):
    system = BlockDiffusion(4, MASK_ID, NoiseConfig(schedule=schedule))
    grid = system.level_grid(10)
    assert grid[0] == pytest.approx(1.0)
    assert grid[-1] == 0.0
    assert (np.diff(grid) < 0).all()


def test_a_plan_reveals_each_position_once_and_tells_the_level_above_it():
    rng = np.random.default_rng(0)
    level, masked = rng.random((6, 8)), rng.random((6, 8)) < 0.7
    grid = np.linspace(1, 0, 4)
    for cfg, points in ((config(), None), (config(tokens_per_forward=3), None), (config(), grid)):
        seen = np.zeros_like(masked, dtype=int)
        above = np.full(6, 2.0)
        for forward in plan_block(level, masked, cfg.tokens_per_forward, points):
            np.add.at(seen, (forward.rows, forward.pos), 1)
            told = forward.level[forward.rows]
            assert (told >= level[forward.rows, forward.pos].astype(np.float32)).all()
            assert (forward.level[forward.rows] < above[forward.rows]).all()
            above[forward.rows] = told
        assert (seen == masked).all()


def test_top_k_forbidden_and_penalty():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)).expand(1000, 4)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    share = draw(logits, uniform, config(top_k=2))[0].bincount(minlength=4) / 1000
    torch.testing.assert_close(share, torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=2e-3, rtol=0)
    both = draw(logits, uniform, config(top_k=3, top_p=0.5))[0].bincount(minlength=4) / 1000
    torch.testing.assert_close(both, torch.tensor([4 / 7, 3 / 7, 0, 0]), atol=2e-3, rtol=0)
    seen = torch.tensor([[True, True, False]])
    found = discourage(torch.tensor([[2.0, -1.0, 3.0]]), seen, 2.0)
    assert found.tolist() == [[1.0, -2.0, 3.0]]
    samples = sampler().generate(config(length=16, forbidden=(3, 4, 5)), [[]] * 6)
    assert not {3, 4, 5} & {t for x in samples for t in x.ids}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nucleus_may_hold_half_of_a_vocabulary(dtype):
    """Uniform over 5,000 ids: the 2,500 first, on the CPU's kernel and by PyTorch's operations."""
    logits = torch.zeros(5000, 5000, dtype=dtype)
    uniform = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    tokens, log_p = draw(logits, uniform, config(top_p=0.5))
    assert len(tokens.unique()) in (2500, 2501)  # sums of 1/5000 round
    assert (tokens.bincount(minlength=5000) <= 2).all()
    torch.testing.assert_close(log_p, torch.full_like(log_p, -math.log(5000)), atol=1e-6, rtol=0)


def test_the_kernel_draws_what_the_composed_operations_draw():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 3000, generator=generator) * 3
    logits[:, 7] = -torch.inf
    seen = torch.rand(64, 3000, generator=generator) < 0.1
    uniform = torch.rand(64, dtype=torch.float64, generator=generator)
    ways = [{}, {"top_p": 0.9}, {"top_k": 20}, {"temperature": 0.0}, {"forbidden": (0, 5)}]
    ways += [{"top_k": 50, "top_p": 0.6, "temperature": 1.7}]
    for changes, marked in itertools.product(ways, (None, seen)):
        cfg = config(repetition_penalty=1.3, **changes)
        tokens, log_p = draw(logits, uniform, cfg, marked)
        expected, expected_log_p = composed_draw(logits, uniform, cfg, marked)
        assert tokens.tolist() == expected.tolist(), changes
        torch.testing.assert_close(log_p, expected_log_p, atol=1e-5, rtol=0)


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ConfigError, match="row 0: must be without NaN"):
        draw(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, dtype=torch.float64), config())


def test_streaming_yields_every_step_and_every_block():
    s, cfg = sampler(), config(length=12)
    samples = {}
    steps = blocks = 0
    for event in s.stream(cfg, [[], [1, 2]], first=7, every_step=True):
        steps += not event.complete
        blocks += event.complete
        samples |= event.ended
        if event.complete:
            assert all(MASK_ID not in ids for ids in event.blocks.values())
    assert (steps, blocks) == (3 + 4 + 4, 3)
    wanted = s.generate(cfg, [[], [1, 2]], first=7)
    assert [samples[7].ids, samples[8].ids] == [x.ids for x in wanted]


def test_what_is_not_allowed_together_says_so():
    with pytest.raises(ConfigError, match="must be one at a time"):
        config(steps=4, threshold=0.9)
    with pytest.raises(ConfigError, match=r"threshold = 1.5: must be in \(0, 1\]"):
        config(threshold=1.5)
    with pytest.raises(ConfigError, match="forbidden = 15"):
        sampler().generate(config(forbidden=(MASK_ID,)), [[]])


def test_num_draws_that_many_samples_of_each_prompt():
    s, prompts = sampler(), [[3], [4, 5]]
    samples = s.generate(config(num=3), prompts)
    assert [x.ids[0] for x in samples] == [3, 3, 3, 4, 4, 4]
    assert samples[4].ids == s.generate(config(), [[4, 5]], first=4)[0].ids
    assert len({tuple(x.ids) for x in samples}) == 6


def test_text_needs_a_tokenizer_and_may_stand_between_ids_and_holes():
    from bd3lm.data import load_tokenizer

    with pytest.raises(ConfigError, match="no tokenizer"):
        sampler().generate(config(), ["the"])
    tokenizer = load_tokenizer("default")
    s = Sampler(
        tiny_model(vocab_size=tokenizer.vocab_size),
        BlockDiffusion(4, tokenizer.mask_id),
        window=16,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.vocab_size + 1,
        tokenizer=tokenizer,
    )
    the, old = tokenizer.encode("The"), tokenizer.encode(" old")
    (sample,) = s.generate(config(), [["The", None, " old", 7]])
    assert sample.ids[: len(the)] == the
    assert sample.ids[len(the) + 1 :][: len(old) + 1] == [*old, 7]
    assert sample.text == tokenizer.decode(sample.ids)


def test_a_strategy_of_ones_own_fills_a_block():
    """Left to right: one position a forward, and no mask before a token."""

    def left_to_right(block):
        while block.masked.any():
            pos = block.masked.argmax(axis=1)
            rows = np.flatnonzero(block.masked.any(axis=1))
            level = block.masked.mean(axis=1).astype(np.float32)
            block.reveal(block.score(rows, pos[rows], level, one_each=True))
            yield

    s, order = sampler(), []
    cfg = config(length=16)
    for event in s.stream(cfg, [[1], [2, 3]], every_step=True, strategy=left_to_right):
        order += [ids for ids in event.blocks.values() if not event.complete]
    for ids in order:
        hidden = [token == MASK_ID for token in ids]
        assert hidden == sorted(hidden)
    first = s.generate(cfg, [[1], [2, 3]], strategy=left_to_right)
    assert [x.nfe for x in first] == [14, 13]
