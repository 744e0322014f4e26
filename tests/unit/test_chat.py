"""Chats: what the template makes of them, which tokens are noised, and what is scored."""

import json

import numpy as np
import pytest
import torch

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import preset
from bd3lm.data import (
    ChatTemplate,
    Dataset,
    Loader,
    NoiseSpec,
    Rows,
    Schedule,
    load_tokenizer,
    prepare,
)
from bd3lm.data.chat import chat_reader
from bd3lm.errors import ConfigError, FormatError, TokenizerError
from bd3lm.evaluate.score import Scoring, conditional_likelihood
from bd3lm.model import Transformer

TEMPLATE = """{%- for m in messages %}
{{ '<' + m.role + '>' + m.content | trim + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{ '<assistant>' }}
{%- endif %}
"""
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": " Good day. "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Nothing."},
]
END = "<|endoftext|>"
FIRST = f"<user>Hello{END}\n<assistant>"
SECOND = f"{FIRST}Good day.{END}\n<user>And?{END}\n<assistant>"


@pytest.fixture(scope="module")
def chatty(tokenizer):
    return tokenizer.with_chat_template(TEMPLATE)


def write(path, *chats):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture
def prepared(chatty, tmp_path):
    path = write(tmp_path / "x.jsonl", CHAT, CHAT[:2])
    prepare([path], chatty, tmp_path / "out", text_field="messages")
    return Dataset(tmp_path / "out")


def test_each_response_is_a_document_behind_its_prompt(chatty):
    template = ChatTemplate(chatty)
    assert template.exchanges(CHAT) == [(FIRST, "Good day."), (SECOND, "Nothing.")]
    assert template.exchanges(CHAT, eos=False)[1] == (SECOND, f"Nothing.{END}")
    whole = f"{SECOND}Nothing."
    assert template.exchanges(CHAT[:4], loss_on="all") == [("", whole)]
    assert template.prompt(CHAT[:1]) == FIRST


def test_bos_of_the_template_is_left_to_the_row(tokenizer):
    text = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    template = ChatTemplate(tokenizer.with_chat_template(text))
    assert template.render(CHAT[:1]) == f"{END}[Hello]"
    assert template.exchanges(CHAT[:2]) == [("[Hello]", "[ Good day. ]")]
    assert template.exchanges(CHAT[1:2]) == [("", "[ Good day. ]")]


def test_a_header_that_a_template_adds_only_for_generation(tokenizer):
    text = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    template = ChatTemplate(tokenizer.with_chat_template(text))
    assert template.exchanges(CHAT[:2]) == [("<user>Hello", "<assistant> Good day.")]
    reordered = "{{ messages[-1].content }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(tokenizer.with_chat_template(reordered))
    with pytest.raises(ValueError, match=r"does not continue messages\[:1\] by messages\[1\]"):
        template.exchanges(CHAT[:2])


def test_the_responses_and_their_ends_are_noised(prepared, tokenizer):
    manifest = prepared.manifest
    assert manifest.num_documents == 3
    assert manifest.num_bytes == len("Good day." * 2 + "Nothing.")
    assert manifest.num_prompt_tokens == sum(
        map(len, map(tokenizer.encode, [FIRST, FIRST, SECOND]))
    )
    rows = Rows(prepared, seq_len=64, block_size=4, packing="best_fit")
    batch = rows.batch(np.arange(len(rows), dtype=np.uint64))
    expected = []
    for text in ("Nothing.", "Good day.", "Good day."):
        expected += [*tokenizer.encode(text), tokenizer.eos_id]
    assert sorted(batch.x0[batch.noisable].tolist()) == sorted(expected)
    assert rows.num_stream_tokens == len(expected)
    noised = Loader(rows, 8, seed=1).batch(0, NoiseSpec(Schedule("loglinear"), estimator="full"))
    hidden = noised.xt == tokenizer.mask_id
    assert torch.equal(hidden, noised.noisable)
    assert torch.equal(hidden.flatten().nonzero().flatten(), noised.masked)
    # A response reads its own prompt: they are of one document.
    for row in range(len(rows)):
        for document in noised.doc_ids[row].unique():
            inside = noised.doc_ids[row] == document
            assert document == -1 or not noised.noisable[row][inside][:5].any()


def test_loss_on_all_has_no_prompts(chatty, tmp_path):
    path = write(tmp_path / "x.jsonl", CHAT)
    (made,) = prepare([path], chatty, tmp_path / "out", text_field="messages", loss_on="all")
    assert (made.num_documents, made.num_prompt_tokens) == (1, 0)
    assert len(Rows(Dataset(tmp_path / "out"), seq_len=16, block_size=4)) > 1


def test_other_packings_are_refused(prepared):
    with pytest.raises(ConfigError, match="packing = wrap: must be best_fit: this data set has"):
        Rows(prepared, seq_len=64, block_size=4)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "its messages must be a list of objects"),
        ({"messages": {"role": "user"}}, "its messages must be a list of objects"),
        ({"messages": ["Hello"]}, r"its messages\[0\] must have a role and a content"),
        ({"messages": [{"role": "user"}]}, r"its messages\[0\] must have a role and a content"),
        ({"messages": CHAT[:1]}, "it must have a message of the role assistant"),
        ({"messages": 3}, "its field messages is not a string"),
        ({"text": "x"}, "it has no field messages"),
    ],
)
def test_records_that_are_no_chat(chatty, tmp_path, record, reason):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(FormatError, match=rf"x\.jsonl, record 1: {reason}"):
        prepare([path], chatty, tmp_path / "out", text_field="messages", strict=True)


def test_templates_that_cannot_be_used(tokenizer, tmp_path):
    path = write(tmp_path / "x.jsonl", CHAT)
    with pytest.raises(FormatError, match="needs a tokenizer with a chat template"):
        prepare([path], tokenizer, tmp_path / "out", text_field="messages")
    with pytest.raises(ConfigError, match=r"chat-template \(not given\): must be the name"):
        ChatTemplate(tokenizer)
    with pytest.raises(ConfigError, match="must be a template in Jinja"):
        ChatTemplate(tokenizer.with_chat_template("{% if %}"))
    with pytest.raises(TokenizerError, match=r"chat template .*gone: No such file"):
        tokenizer.with_chat_template(tmp_path / "gone")
    refusing = tokenizer.with_chat_template("{{ raise_exception('no system message') }}")
    with pytest.raises(FormatError, match="record 1: the chat template refuses it: no system"):
        prepare([path], refusing, tmp_path / "out", text_field="messages")
    for outside in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match="the chat template refuses it"):
            ChatTemplate(tokenizer.with_chat_template(outside)).render(CHAT)


def test_dotted_fields_and_tools(tokenizer):
    text = "{% if tools %}{{ tools | tojson }}{% endif %}"
    text += "{% for m in messages %}{{ m.content }};{% endfor %}"
    chatty = tokenizer.with_chat_template(text)
    record = json.dumps({"data": {"Chat": CHAT[:2]}, "tools": [{"name": "é"}]})
    read = chat_reader(chatty, "data.chat", "responses", eos=True)
    assert read(record) == [('[{"name": "é"}]Hello;', " Good day. ;")]


def test_a_template_travels_with_the_tokenizer(prepared, tokenizer, chatty, tmp_path):
    assert prepared.tokenizer.chat_template == TEMPLATE
    assert prepared.tokenizer.sha256 == chatty.sha256 != tokenizer.sha256
    assert prepared.tokenizer.special == tokenizer.special
    assert chatty.with_chat_template(TEMPLATE).sha256 == chatty.sha256
    for values in (
        TEMPLATE,
        [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}],
    ):
        folder = tmp_path / str(len(values))
        folder.mkdir()
        (folder / "tokenizer.json").write_text(tokenizer.json)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": values}))
        assert load_tokenizer(folder).chat_template == TEMPLATE
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder / "tokenizer.json").chat_template == "{{ messages }}"


@pytest.mark.parametrize("system", ["bd3lm", "ar"])
def test_scores_are_conditional_likelihoods(prepared, chatty, tmp_path, system):
    # At S = 1 no position behind an answer is in its last block.
    block = 1 if system == "bd3lm" else None
    shape = {"width": 16, "heads": 2, "depth": 2, "head_dim": None, "mlp_width": None}
    cfg = preset("demo", system, seq_len=96, block_size=block, model=shape | {"kv_heads": None})
    torch.manual_seed(0)
    model = Transformer(cfg.model, chatty.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    loaded = Checkpoint(cfg, model, chatty, 0, tmp_path)
    result = Scoring.prepare(loaded, prepared).likelihood()
    total = tokens = 0
    for index in range(prepared.num_documents):
        ids = prepared.document(index).tolist()
        prompt = len(chatty.encode([FIRST, SECOND, FIRST][index]))
        one = conditional_likelihood(loaded, ids[:prompt], ids[prompt:])
        total, tokens = total + one.row_nats.sum(), tokens + one.tokens
    assert result.tokens == tokens == prepared.num_tokens - prepared.manifest.num_prompt_tokens
    assert result.coverage == 1.0
    assert result.bpb == pytest.approx(result.row_nats.sum() / np.log(2) / 26)
    assert result.row_nats.sum() == pytest.approx(total, rel=1e-5)
