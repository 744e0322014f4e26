"""The adapter of lm-evaluation-harness: end to end on local tasks, and against brute force."""

import itertools
import json
import math

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra lm-eval; run by make check-extras")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from bd3lm.checkpoint import save_hf, save_original, save_sdar
from bd3lm.cli import train
from bd3lm.integrations.lm_eval import BD3LM
from tests.checkpoints import random_checkpoint
from tests.integration.conftest import corpus  # noqa: F401 - a fixture
from tests.unit.test_sdar import trained

TINY = (
    "--seq-len 32 --steps 3 --batch-size 4 --device cpu --log-every 1 --eval.every 0 "
    "--model.width 32 --model.depth 2 --model.heads 2 --sample.num 1 --sample.length 20"
).split()
QUESTIONS = [
    {"question": "The old house stood by the", "choices": [" river", " no one"], "label": 0},
    {"question": "and no one knew who", "choices": [" had built it", " the"], "label": 0},
    {"question": "", "choices": ["the", "who knew"], "label": 1},
]
TEXTS = ["the old house stood by the river. " * 9, "no one knew who"]


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("lm_eval") / "run"
    train.main(["demo", "--data", str(corpus), "--out", str(out), *TINY])
    return str(out / "checkpoint")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Task files as a user of the harness writes them, with data on disk."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, records in (
        ("choice", QUESTIONS),
        ("rolling", [{"text": text} for text in TEXTS]),
        ("generate", [{"text": text[:40]} for text in TEXTS]),
    ):
        lines = "\n".join(json.dumps(record) for record in records)
        (folder / f"{name}.jsonl").write_text(lines + "\n")
    head = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\ntest_split: test\n"
    choice = "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
    choice += "target_delimiter: ''\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    rolling = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    rolling += "metric_list:\n  - metric: bits_per_byte\n"
    generate = "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: 'x'\n"
    generate += "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 12\n"
    generate += "metric_list:\n  - metric: exact_match\n"
    for name, body in (("choice", choice), ("rolling", rolling), ("generate", generate)):
        data = head.format(folder / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(f"task: bd3lm_{name}\n{data}{body}")
    return TaskManager(include_path=str(folder), include_defaults=False)


def brute_force(lm, prompt, answer):
    """-log of the mean over all orders of the chain rule, block by block, without a cache."""
    model, size, mask = lm.loaded.model, lm.system.block_size, lm.loaded.tokenizer.mask_id
    ids = [lm.loaded.tokenizer.bos_id, *prompt, *answer]
    first = 1 + len(prompt)
    total = 0.0
    if lm.system.name == "ar":
        with torch.no_grad():
            logits = model.logits(model.encode(torch.tensor([ids]), 1))[0].double()
        logits[:, mask] = -torch.inf
        log_p = logits.log_softmax(-1)
        return sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids)))
    for start in range(first // size * size, len(ids), size):
        spots = [i for i in range(start, min(start + size, len(ids))) if i >= first]
        probabilities = []
        for order in itertools.permutations(spots):
            hidden, log_p = set(spots), 0.0
            for i in order:
                x = torch.full((1, start + size), mask)
                x[0, : min(len(ids), start + size)] = torch.tensor(ids[: start + size])
                x[0, sorted(hidden)] = mask
                with torch.no_grad():
                    logits = model.logits(model.encode(x, size))[0, i].double()
                logits[mask] = -torch.inf
                log_p += logits.log_softmax(-1)[ids[i]].item()
                hidden.remove(i)
            probabilities.append(math.exp(log_p))
        total += math.log(sum(probabilities) / len(probabilities))
    return total


def request(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def publish(layout, folder):
    """A folder of random weights as one of the published layouts has them."""
    if layout == "sdar":
        save_sdar(folder, trained())
    elif layout == "hf, ar":
        save_hf(folder, trained("ar"))
    elif layout == "hf":
        save_hf(folder, random_checkpoint("demo", "bd3lm", {"width": 16, "depth": 2, "heads": 2}))
    else:
        dit = {"width": 16, "depth": 2, "heads": 2, "cond_width": 8}
        save_original(folder, random_checkpoint("tiny", "bd3lm", dit))


@pytest.fixture(params=["run", "sdar", "hf", "hf, ar", "original"])
def model_args(request, checkpoint, tmp_path):
    """``--model_args`` of a checkpoint of each layout."""
    if request.param == "run":
        return f"pretrained={checkpoint}"
    publish(request.param, tmp_path / "model")
    # The original's checkpoints carry no tokenizer.
    tokenizer = ",tokenizer=default" if request.param == "original" else ""
    return f"pretrained={tmp_path / 'model'}{tokenizer}"


def test_multiple_choice_and_rolling_equal_brute_force(model_args, tasks):
    lm = BD3LM.create_from_arg_string(model_args, {"batch_size": 2})
    found = simple_evaluate(
        lm, tasks=["bd3lm_choice", "bd3lm_rolling"], task_manager=tasks, bootstrap_iters=0
    )
    config = found["config"]
    assert config["bd3lm_likelihood"] == "marginal"
    assert config["bd3lm_estimator"] == "exact"
    assert config["bd3lm_upper_bound"] is False
    encode, right = lm.loaded.tokenizer.encode, 0
    for question, sample in zip(QUESTIONS, found["samples"]["bd3lm_choice"], strict=True):
        want = []
        for choice, reply in zip(question["choices"], sample["filtered_resps"], strict=True):
            prompt, answer = lm._pair(question["question"], choice)
            want.append(brute_force(lm, prompt, answer))
            assert float(reply[0]) == pytest.approx(want[-1], rel=1e-4)
        right += want.index(max(want)) == question["label"]
    assert found["results"]["bd3lm_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    short = encode(TEXTS[1])
    nats = -brute_force(lm, [], short)
    reply = found["samples"]["bd3lm_rolling"][1]["filtered_resps"][0]
    assert float(reply[0] if isinstance(reply, tuple | list) else reply) == pytest.approx(
        -nats, rel=1e-4
    )
    assert found["results"]["bd3lm_rolling"]["bits_per_byte,none"] > 0


@pytest.mark.parametrize("likelihood", ["marginal", "confidence", "orders", "nelbo"])
def test_answers_do_not_depend_on_their_batch(checkpoint, likelihood):
    requests = [
        request("loglikelihood", question["question"], choice)
        for question in QUESTIONS
        for choice in question["choices"]
    ]
    rolling = [request("loglikelihood_rolling", text) for text in TEXTS]
    one, many = (
        BD3LM(checkpoint, likelihood=likelihood, repeats=2, batch_size=size) for size in (1, 8)
    )
    for a, b in zip(
        one.loglikelihood(requests), many.loglikelihood(requests[::-1])[::-1], strict=True
    ):
        assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert one.loglikelihood_rolling(rolling) == pytest.approx(
        many.loglikelihood_rolling(rolling), rel=1e-5
    )


@pytest.mark.parametrize("likelihood", ["confidence", "left-to-right"])
def test_what_greedy_decoding_writes_is_greedy(checkpoint, likelihood):
    """An answer that ends its block: the same order decodes and scores it."""
    lm = BD3LM(checkpoint, likelihood=likelihood)
    prompt = lm.loaded.tokenizer.encode("the old house")[:3]
    sampler = lm._sampling()
    from bd3lm.config import SampleConfig
    from bd3lm.integrations.lm_eval import STRATEGIES

    cfg = SampleConfig(num=1, temperature=0.0, length=12, top_p=1.0)
    (sample,) = sampler.generate(cfg, [prompt], strategy=STRATEGIES[likelihood])
    if sample.stop != "length":
        pytest.skip("the sample ended early")
    answer = sample.ids[len(prompt) :]
    ((_, greedy),) = lm._score([(prompt, answer)])
    assert greedy
    other = [*answer[:-1], (answer[-1] + 1) % 50 + 3]
    ((_, greedy),) = lm._score([(prompt, other)])
    assert not greedy


def test_generation_stops_at_strings_and_lengths(checkpoint, tasks):
    found = simple_evaluate(
        BD3LM(checkpoint, batch_size=2, likelihood="confidence"),
        tasks=["bd3lm_generate"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    for sample in found["samples"]["bd3lm_generate"]:
        assert "." not in sample["filtered_resps"][0]
    lm = BD3LM(checkpoint, batch_size=2, likelihood="left-to-right")
    options = {"until": [], "max_gen_toks": 6}
    contexts = ["the old", "", "no one knew who had built it"]
    together = lm.generate_until([request("generate_until", c, options) for c in contexts])
    alone = [lm.generate_until([request("generate_until", c, options)])[0] for c in contexts]
    assert together == alone
    for text in together:
        assert len(lm.loaded.tokenizer.encode(text)) <= 6
    everywhere = [{"until": [c], "max_gen_toks": 6} for c in together[0][1:2]]
    (cut,) = lm.generate_until([request("generate_until", contexts[0], everywhere[0])])
    assert cut == together[0].split(together[0][1])[0]


def test_the_command_registers_the_model(checkpoint):
    from lm_eval.api.registry import get_model

    assert get_model("bd3lm") is BD3LM
    lm = BD3LM.create_from_arg_string(
        f"pretrained={checkpoint},likelihood=orders,repeats=4",
        {"batch_size": "auto", "max_batch_size": None, "device": "cpu"},
    )
    assert (lm.likelihood, lm.repeats, lm.batch_size) == ("orders", 4, 32)
