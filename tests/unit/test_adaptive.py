"""An adaptive softmax is the distribution of its logits, in training, scoring and decoding."""

import pytest
import torch
import torch.nn.functional as F

from bd3lm.config import ModelConfig, preset
from bd3lm.errors import ConfigError
from bd3lm.model import HeadInputs, Transformer, for_inference
from bd3lm.model.adaptive import adaptive_cross_entropy, adaptive_logits, new_clusters
from bd3lm.model.flops import head_columns, step_flops
from bd3lm.systems import Autoregressive, build_system
from tests.conftest import VOCAB_SIZE, random_ids, tiny_model

V, D, CUTOFFS = 40, 8, (6, 9, 30)


def log_probabilities(features, head, bias, clusters, mask_id):
    """Over the whole vocabulary, composed of PyTorch's operations."""
    scores = F.linear(features, head, bias).index_fill(-1, torch.tensor([mask_id]), -torch.inf)
    return adaptive_logits(scores, clusters(features), CUTOFFS).log_softmax(-1)


@pytest.mark.parametrize(("biased", "mask_id"), [(False, 1), (True, 1), (False, 39), (True, 8)])
@pytest.mark.parametrize("ids", [range(2, V), range(2, 6), range(30, V)])
def test_loss_and_gradients_equal_autograd(biased, mask_id, ids):
    torch.manual_seed(0)
    m = 70
    features = torch.randn(m, D, requires_grad=True)
    head = torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True) if biased else None
    clusters = new_clusters(D, CUTOFFS, V)
    torch.nn.init.normal_(clusters.weight)
    ids = torch.tensor([i for i in ids if i != mask_id])
    target, weight = ids[torch.randint(len(ids), (m,))], torch.rand(m)
    inputs = [features, head, *clusters.parameters(), *([] if bias is None else [bias])]

    log_p = log_probabilities(features, head, bias, clusters, mask_id)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(m))
    expected_nll = F.nll_loss(log_p, target, reduction="none")
    wanted = torch.autograd.grad(3 * (expected_nll * weight).sum(), inputs)

    given = HeadInputs(features, head, bias, target, weight, mask_id)
    total, nll = adaptive_cross_entropy(given, clusters, CUTOFFS)
    found = torch.autograd.grad(3 * total, inputs)
    torch.testing.assert_close(total, (expected_nll * weight).sum())
    torch.testing.assert_close(nll, expected_nll)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_is_uniform_at_first():
    model = Transformer(ModelConfig(width=D, depth=1, heads=2, softmax_cutoffs=CUTOFFS), V)
    log_p = model(torch.randint(2, V, (2, 4)), 1).log_softmax(-1)
    torch.testing.assert_close(log_p.exp(), torch.full((2, 4, V), 1 / V))


@pytest.mark.parametrize("cutoffs", [(), CUTOFFS])
def test_it_starts_from_the_frequencies(cutoffs):
    shape = ModelConfig(width=D, depth=1, heads=2, softmax_cutoffs=cutoffs)
    model = Transformer(shape, V)
    counts = torch.arange(V) ** 2
    model.start_from_counts(counts)
    p = model(torch.randint(2, V, (2, 4)), 1).softmax(-1)
    torch.testing.assert_close(p[1, 2], (counts + 1) / (counts + 1).sum(), check_dtype=False)


@pytest.mark.parametrize("name", ["ar", "mdlm", "bd3lm"])
def test_systems_train_on_what_they_draw_from(name):
    model = tiny_model(softmax_cutoffs=(3, 7))
    system = build_system(preset("demo", name, model={"softmax_cutoffs": (3, 7)}), mask_id=1)
    features, x0 = torch.randn(5, model.cfg.width), random_ids(1, 5).clamp(min=2)
    nats = system.nats(model, features, x0, torch.arange(5))
    log_p = system.logits(model, features).log_softmax(-1)
    torch.testing.assert_close(nats, F.nll_loss(log_p, x0[0], reduction="none"))
    ready = for_inference(model)
    torch.testing.assert_close(system.logits(ready, features).log_softmax(-1), log_p)


def test_cutoffs_beyond_the_vocabulary_are_left_out():
    assert tiny_model(softmax_cutoffs=(4, VOCAB_SIZE, 99)).cutoffs == (4,)
    assert tiny_model(softmax_cutoffs=(VOCAB_SIZE,)).clusters is None


def test_unfit_cutoffs_are_refused():
    def refused(**changes):
        with pytest.raises(ConfigError) as error:
            build_system(preset("demo", **changes), mask_id=5)
        return str(error.value)

    assert "in increasing order" in refused(model={"softmax_cutoffs": (8, 8)})
    assert "a whole number" in refused(model={"softmax_cutoffs": (8.5,)})
    assert "at least 1" in refused(model={"softmax_cutoffs": (0, 8)})
    assert "empty for system = sedd" in refused(system="sedd", model={"softmax_cutoffs": (8,)})
    assert "init-unigram" in refused(init_unigram=True, model={"head_bias": False})


def test_operations_count_the_columns_that_are_computed():
    """The shortlist for every position, a cluster for its share of them by Zipf's law."""
    assert head_columns((), 1000) == 1000
    harmonic = torch.arange(1, 1001).reciprocal().cumsum(0)
    first, second = (harmonic[b - 1] - harmonic[a - 1] for a, b in ((50, 300), (300, 1000)))
    exact = 52 + (250 * first + 700 * second) / harmonic[-1]
    assert head_columns((50, 300), 1000) == pytest.approx(exact.item(), rel=1e-3)
    config, plain = (preset("demo", model={"softmax_cutoffs": c}) for c in ((2048,), ()))
    whole = step_flops(plain, 16384)
    predicted = config.batch_size * config.seq_len / 2
    saved = 6 * predicted * config.model.width * (16384 - head_columns((2048,), 16384))
    assert whole - step_flops(config, 16384) == pytest.approx(saved)


def test_an_autoregressive_model_has_it_too():
    model = tiny_model(softmax_cutoffs=(4,))
    system = Autoregressive(1)
    ids = random_ids(2, 8).clamp(min=2)
    features = model.encode(ids, 1)[:, :-1].flatten(0, 1)
    log_p = system.logits(model, features).log_softmax(-1)
    assert torch.isneginf(log_p[:, 1]).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(14))
