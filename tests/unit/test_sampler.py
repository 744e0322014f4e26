"""First-hitting sampling: exact draws, an exact cache, and rows that mind their own business."""

import itertools
import math
from collections import Counter

import pytest
import torch

from bd3lm.config import SampleConfig
from bd3lm.errors import ConfigError
from bd3lm.sample import Sampler
from bd3lm.sample.draw import draw
from bd3lm.sample.plan import block_uniforms
from bd3lm.sample.stopping import is_degenerate
from bd3lm.systems import BlockDiffusion
from tests.conftest import MASK_ID, VOCAB_SIZE, tiny_model


def sampler(model=None, *, block_size=4, window=16, eos_id=VOCAB_SIZE + 5, replay=None):
    """No id is EOS unless a test sets one."""
    system = BlockDiffusion(block_size, MASK_ID)
    return Sampler(
        model or tiny_model(), system, window=window, bos_id=0, eos_id=eos_id, replay=replay
    )


def config(**changes):
    return SampleConfig(**({"num": 1, "length": 16, "top_p": 1.0} | changes))


def chi_square(counts, expected):
    return sum((counts[x] - e) ** 2 / e for x, e in expected.items())


def small_model(vocab):
    """A model over few ids, sharpened so that the joint is far from a product."""
    import dataclasses

    from bd3lm.config import ModelConfig
    from bd3lm.model import Transformer

    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(ModelConfig(width=16, depth=2, heads=2)), vocab)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.35)
    return model.eval()


def first_hitting_joint(model, prefix, size, mask_id, block_size):
    """Exact law of a block under first hitting: average over orders of the chain rule."""
    vocab = mask_id
    joint = {}
    masked = [i for i in range(size) if prefix[i] == mask_id]
    for filled in itertools.product(range(vocab), repeat=len(masked)):
        truth = list(prefix)
        for spot, token in zip(masked, filled, strict=True):
            truth[spot] = token
        total, orders = 0.0, list(itertools.permutations(masked))
        for order in orders:
            ids, logp = list(prefix), 0.0
            for spot in order:
                logits = model.logits(model.encode(torch.tensor([ids]), block_size))[0, spot]
                logits = logits.detach().double().clone()
                logits[mask_id] = -torch.inf
                logp += torch.log_softmax(logits, 0)[truth[spot]].item()
                ids[spot] = truth[spot]
            total += math.exp(logp)
        joint[filled] = total / len(orders)
    return joint


@torch.inference_mode()
def test_samples_follow_the_enumerated_joint():
    """Three free positions over four ids: 64 outcomes, chi-square at fixed seeds."""
    mask_id, size, num = 4, 4, 6000
    model = small_model(mask_id + 1)
    joint = first_hitting_joint(model, [0, mask_id, mask_id, mask_id], size, mask_id, 4)
    assert sum(joint.values()) == pytest.approx(1.0)
    s = Sampler(model, BlockDiffusion(4, mask_id), window=4, bos_id=0, eos_id=99)
    samples = s.generate(SampleConfig(num=num, length=4, top_p=1.0))
    counts = Counter(tuple(x.ids) for x in samples)
    expected = {k: num * p for k, p in joint.items() if num * p >= 5}
    rest = num - sum(expected.values())
    seen_rest = num - sum(counts[k] for k in expected)
    statistic = chi_square(counts, expected) + (seen_rest - rest) ** 2 / max(rest, 1.0)
    degrees = len(expected)
    assert statistic < degrees + 3.3 * math.sqrt(2 * degrees), statistic  # about 0.1%


def test_rows_do_not_depend_on_the_batch():
    s, cfg = sampler(), config(length=14)
    prompts = [[3, 4], [], [5, 6, 7, 8, 9], [1]]
    together = s.generate(cfg, prompts)
    for index, prompt in enumerate(prompts):
        alone = s.generate(cfg, [prompt], first=index)[0]
        assert alone.ids == together[index].ids
        assert alone.ids[: len(prompt)] == prompt
    again = s.generate(cfg, prompts)
    assert [x.ids for x in again] == [x.ids for x in together]
    other = s.generate(config(length=14, seed=2), prompts)
    assert [x.ids for x in other] != [x.ids for x in together]


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_one_forward_a_token(block_size):
    sample = sampler(block_size=block_size).generate(config(), [[]])[0]
    assert len(sample.ids) == 15
    assert sample.stop == "length"
    # The fused commit costs none; only S=1 must first encode BOS, whose block has no mask.
    assert sample.nfe_paper == 15
    assert sample.nfe == 15 + (1 if block_size == 1 else 0)


def test_block_size_one_is_ancestral_sampling_of_the_chain():
    """Greedy at S=1: the most probable token behind the clean tokens before it."""
    model = tiny_model()
    ids = [0]
    for _ in range(10):
        context = torch.tensor([[*ids, MASK_ID]])
        logits = model.logits(model.encode(context, 1))[0, -1]
        logits[MASK_ID] = -torch.inf
        ids.append(int(logits.argmax()))
    sample = sampler(model, block_size=1).generate(config(length=11, temperature=0.0), [[]])[0]
    assert sample.ids == ids[1:]


def uncached_sample(model, length, block_size, window, *, prompt=(), seed=1, row=0):
    """First hitting with everything recomputed at every step, in the plainest words."""
    ids = [0, *prompt]
    while len(ids) < length:
        start = len(ids) // block_size * block_size
        block = ids[start:] + [MASK_ID] * (start + block_size - len(ids))
        base = 0
        while start + block_size - base > window:
            base += window // 2
        context = ids[:start] if base == 0 else [0, *ids[base + 1 : start]]
        uniforms = block_uniforms(seed, row, start // block_size, block_size)
        while MASK_ID in block:
            free = [i for i, t in enumerate(block) if t == MASK_ID]
            spot = max(free, key=lambda i: uniforms[i][0])
            u_token = uniforms[spot][1]
            logits = model.logits(model.encode(torch.tensor([context + block]), block_size))
            logits = logits[0, len(context) + spot].detach().double().clone()
            logits[MASK_ID] = -torch.inf
            cumulative = torch.softmax(logits, 0).cumsum(0)
            block[spot] = int((cumulative <= u_token * cumulative[-1]).sum())
        ids = ids[:start] + block
    return ids[1:length]


@pytest.mark.parametrize(
    "changes",
    [{}, {"cond_width": 8, "kv_heads": 1, "qk_norm": True}, {"previous_tokens": 2}],
    ids=["plain", "shared keys", "previous tokens"],
)
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_cached_sampling_equals_uncached_sampling(changes, block_size):
    model = tiny_model(**changes)
    s = sampler(model, block_size=block_size, window=16)
    samples = s.generate(config(length=37), [[], []], first=3)
    for row, sample in enumerate(samples, 3):
        assert sample.ids == uncached_sample(model, 37, block_size, 16, row=row)


@pytest.mark.parametrize("length", [5, 13, 18, 31], ids="{} tokens of prompt".format)
def test_a_prompt_of_any_length(length):
    """Also longer than the window, and ending inside a block, whose given tokens stay."""
    model = tiny_model()
    prompt = torch.arange(length).mul(7).remainder(MASK_ID).tolist()
    sample = sampler(model).generate(config(length=40), [prompt], first=2)[0]
    assert sample.ids == uncached_sample(model, 40, 4, 16, prompt=prompt, row=2)
    assert sample.ids[:length] == prompt


@torch.inference_mode()
@pytest.mark.parametrize("holes", [[6], [5, 7]], ids=str)
def test_a_block_begun_by_the_prompt_is_scored_as_the_likelihood_scores_it(holes):
    """The same model call as the bounds use: noised and clean streams side by side."""
    model, x0 = tiny_model(), torch.tensor([[0, 5, 3, 9, 2, 7, 4, 6]])
    prompt = [None if i in holes else t for i, t in enumerate(x0[0].tolist())][1:]
    sample = sampler(model, window=8).generate(config(length=8), [prompt], first=4)[0]
    filled = torch.tensor([[0, *sample.ids]])
    xt = torch.where(torch.isin(torch.arange(8), torch.tensor(holes)), MASK_ID, filled)
    levels = block_uniforms(1, 4, 1, 4)[:, 0]
    wanted = 0.0
    for spot in sorted(holes, key=lambda i: -levels[i - 4]):
        features = model.denoise(xt, filled, 4, torch.tensor([spot]))
        logits = model.logits(features)[0].double()
        logits[MASK_ID] = -torch.inf
        wanted += torch.log_softmax(logits, 0)[filled[0, spot]].item()
        xt[0, spot] = filled[0, spot]
    assert sample.log_prob == pytest.approx(wanted, abs=1e-5)


def test_long_rows_take_the_memory_of_one_window(monkeypatch):
    monkeypatch.setattr("bd3lm.sample.sampler.is_degenerate", lambda ids: False)  # few ids
    s, held = sampler(window=64, block_size=16), set()
    fill = s._fill_block

    def measured(state, *rest):
        held.add(sum(x.untyped_storage().nbytes() for x in (*state.cache.k, *state.cache.v)))
        return fill(state, *rest)

    s._fill_block = measured
    sample = s.generate(config(length=16_384, tokens_per_forward=16), [[]])[0]
    assert (len(sample.ids), sample.stop) == (16_383, "length")
    assert held == {64 * 16 * 2 * 2 * 4}  # positions, width, layers, keys and values, bytes


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, {}),
        ({}, {"tokens_per_forward": 2}),
        ({}, {"steps": 3}),
        ({}, {"threshold": 0.3}),
        ({"cond_width": 8, "time_conditioning": True}, {}),
    ],
    ids=str,
)
def test_replayed_forwards_draw_the_same_rows(changes, way):
    """Rows that end early, prompts inside blocks, and windows left behind."""
    model, cfg = tiny_model(**changes), config(length=37, **way)
    prompts = [[3, None, 4], [], [5, 6, 7, 8, 9], [1]]
    eos = sampler(model).generate(cfg, prompts)[1].ids[12]
    plain = sampler(model, eos_id=eos).generate(cfg, prompts)
    found = sampler(model, eos_id=eos, replay=True).generate(cfg, prompts)
    assert [(x.ids, x.stop, x.nfe) for x in found] == [(x.ids, x.stop, x.nfe) for x in plain]
    assert plain[1].stop == "eos"


def test_eos_ends_a_row_and_only_that_row():
    s = sampler(eos_id=7)
    samples = s.generate(config(length=20, seed=3), [[]] * 12)
    assert {x.stop for x in samples} == {"eos", "length"}
    for x in samples:
        assert 7 not in x.ids
        assert (len(x.ids) == 19) == (x.stop == "length")
    # Tokens before the EOS are the same without one.
    endless = sampler().generate(config(length=20, seed=3), [[]] * 12)
    for x, y in zip(samples, endless, strict=True):
        assert y.ids[: len(x.ids)] == x.ids


def test_an_eos_in_the_prompt_is_context():
    sample = sampler(eos_id=7).generate(config(length=12), [[7, 3]])[0]
    assert sample.ids[:2] == [7, 3]


def test_rows_outgrow_the_window():
    samples = sampler(window=16).generate(config(length=50), [[], [2, 3]])
    assert [len(x.ids) for x in samples] == [49, 49]
    assert all(0 <= t < MASK_ID for x in samples for t in x.ids)
    # The last block is drawn whole, so that a row does not depend on where it is cut.
    assert samples[0].nfe > samples[0].nfe_paper == 51


@pytest.mark.parametrize("length", [2, 5, 13, 15])
def test_lengths_that_are_no_multiple_of_the_block(length):
    sample = sampler().generate(config(length=length), [[]])[0]
    assert len(sample.ids) == length - 1


def test_what_is_not_allowed_says_so():
    s = sampler()
    with pytest.raises(ConfigError, match="mask token"):
        s.generate(config(), [[MASK_ID]])
    with pytest.raises(ConfigError, match="leave room"):
        s.generate(config(length=5), [[1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="at most 16 where one block is the whole row"):
        sampler(block_size=16).generate(config(length=17), [[]])
    with pytest.raises(ConfigError, match="divisor of the trained length"):
        sampler(block_size=5)
    with pytest.raises(ConfigError, match="length = 0"):
        config(length=0)


# --- draws ---------------------------------------------------------------------------------


def test_draws_invert_the_distribution_function():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.79, 0.81, 0.9999], dtype=torch.float64)
    tokens = draw(logits.expand(6, 3), uniform, config())[0]
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_draws_are_exact_over_a_large_vocabulary():
    """Ids of one in a million each behind one heavy id: the tail is hit token by token."""
    vocab, tail = 50_257, 1e-6
    prob = torch.full((vocab,), tail, dtype=torch.float64)
    prob[0] = 1 - tail * (vocab - 1)
    wanted = torch.tensor([1, 2, 777, 25_000, vocab - 2, vocab - 1])
    middle = prob[0] + tail * (wanted - 0.5)
    tokens = draw(prob.log().expand(len(wanted), vocab), middle, config())[0]
    assert tokens.tolist() == wanted.tolist()


def test_the_nucleus_keeps_the_token_that_crosses():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.4]], dtype=torch.float64))
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw(logits.expand(1000, 3), uniform, config(top_p=0.6))[0]
    share = tokens.bincount(minlength=3) / 1000
    torch.testing.assert_close(share, torch.tensor([0.0, 5 / 9, 4 / 9]), atol=2e-3, rtol=0)


def test_temperature_sharpens():
    logits = torch.log(torch.tensor([[0.6, 0.4]], dtype=torch.float64))
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = draw(logits.expand(1000, 2), uniform, config(temperature=0.5))[0]
    assert (tokens == 0).double().mean().item() == pytest.approx(0.36 / 0.52, abs=2e-3)
    assert draw(logits, uniform[-1:], config(temperature=0.0))[0].item() == 0


def test_degenerate_text_is_told():
    assert is_degenerate([1, 2] * 128)
    assert not is_degenerate(list(range(256)))
    assert not is_degenerate([1] * 255)


def test_rows_that_end_keep_their_places_while_forwards_are_replayed(monkeypatch):
    """A new cache needs new graphs: 16 rows that end one by one get four, not sixteen."""
    made, model = [], tiny_model()
    plain = sampler(model, eos_id=1, replay=False)
    cfg = config(length=64, top_p=1.0)
    wanted = plain.generate(cfg, [[]] * 16)
    assert len({len(sample.ids) // 4 for sample in wanted}) >= 5  # they end in different blocks
    replayed = sampler(model, eos_id=1, replay=True)
    step = replayed._step
    monkeypatch.setattr(
        replayed, "_step", lambda cache: made.append(len(cache.k[0])) or step(cache)
    )
    found = replayed.generate(cfg, [[]] * 16)
    assert [(x.ids, x.stop, x.nfe) for x in found] == [(x.ids, x.stop, x.nfe) for x in wanted]
    assert all(after <= before / 2 for before, after in itertools.pairwise(made))
