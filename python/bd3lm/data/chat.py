"""Chats: lists of messages, rendered to prompts and responses by a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from bd3lm.data.tokenizers import Tokenizer
from bd3lm.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Template

LossOn = Literal["responses", "all"]
"""Tokens of a chat that are noised and scored."""
Message = Mapping[str, Any]
"""``role`` and ``content``, and what else the template reads."""


class ChatTemplate:
    """A chat template in Jinja, rendered as transformers renders it.

    Args:
        tokenizer: one with a template; its BOS and EOS are ``bos_token`` and ``eos_token`` there.

    Raises:
        ConfigError: the tokenizer has no template, or its template is not Jinja.

    Examples:
        >>> from bd3lm.data import load_tokenizer
        >>> text = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        >>> tokenizer = load_tokenizer("default").with_chat_template(text)
        >>> ChatTemplate(tokenizer).render([{"role": "user", "content": "Hello"}])
        'user: Hello<|endoftext|>'
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        text = tokenizer.chat_template
        if text is None:
            allowed = f"the name of a file: tokenizer {tokenizer.name} has no chat template"
            raise ConfigError("chat-template", None, allowed)
        self.text, self.bos, self.eos = text, tokenizer.bos_token, tokenizer.eos_token
        _ = self._compiled  # refused now

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **values: Any
    ) -> str:
        """Render messages to text, as ``apply_chat_template(messages, tokenize=False)`` does.

        Args:
            messages: in their order.
            add_generation_prompt: end with the header of a response.
            values: other variables of the template, e.g. ``tools``.

        Raises:
            ValueError: the template refuses the messages.
        """
        import jinja2

        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                **values,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from None
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"the chat template fails on it: {error!r}") from None

    def prompt(self, messages: Sequence[Message], **values: Any) -> str:
        """Render the prompt of the next response, without BOS, with which a row begins anyway.

        Raises:
            ValueError: the template refuses the messages.
        """
        return self._headed(messages, values)[0].removeprefix(self.bos)

    def exchanges(
        self, messages: Any, *, loss_on: LossOn = "responses", eos: bool = True, **values: Any
    ) -> list[tuple[str, str]]:
        """Divide a chat into documents: the prompt and the text that is scored.

        With ``loss_on="responses"`` each response is a document of its own, behind all messages
        before it and the header of a response, as when it is generated. So a response never sees
        a later message in its last block. With ``all`` the chat is one document without a prompt.
        BOS in front, white space at the end and, with ``eos``, an EOS there are left out: a row and
        a document bring their own.

        Args:
            messages: a list of objects with ``role`` and ``content``.
            loss_on: responses or all.
            eos: documents end with EOS.
            values: other variables of the template.

        Raises:
            ValueError: no list of messages, no response among them, or messages that the template
                refuses.
        """
        _check_messages(messages)
        if loss_on == "all":
            return [("", self._trimmed(self.render(messages, **values), eos))]
        found = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            whole = self.render(messages[: index + 1], **values)
            heads = self._headed(messages[:index], values)
            head = next((head for head in heads if whole.startswith(head)), None)
            if head is None:
                raise ValueError(
                    f"the chat template does not continue messages[:{index}] by messages[{index}]"
                )
            response = self._trimmed(whole[len(head) :], eos)
            found.append((head.removeprefix(self.bos), response))
        if not found:
            raise ValueError("it must have a message of the role assistant")
        return found

    def _headed(self, messages: Sequence[Message], values: Mapping[str, Any]) -> list[str]:
        """The text before a response: with its header and, where that differs, without."""
        if not messages:
            return [""]
        with_header = self.render(messages, add_generation_prompt=True, **values)
        return [with_header, self.render(messages, **values)]

    def _trimmed(self, text: str, eos: bool) -> str:
        text = text.removeprefix(self.bos).rstrip()
        return text.removesuffix(self.eos) if eos else text

    @cached_property
    def _compiled(self) -> Template:
        import jinja2

        try:
            return _environment().from_string(self.text)
        except jinja2.TemplateError as error:
            raise ConfigError("chat-template", str(error), "a template in Jinja") from None


def chat_reader(
    tokenizer: Tokenizer, field: str, loss_on: LossOn, *, eos: bool
) -> Callable[[str], list[tuple[str, str]]]:
    """Make a function from a JSON record to the documents of the chat in it.

    Args:
        tokenizer: has the template.
        field: of the messages; ``a.b`` is field ``b`` of field ``a``. A field ``tools`` of the
            record is the template's.
        loss_on: as of :meth:`ChatTemplate.exchanges`.
        eos: likewise.

    Raises:
        ConfigError: as of :class:`ChatTemplate`. The function raises ValueError.
    """
    template = ChatTemplate(tokenizer)

    def read(record: str) -> list[tuple[str, str]]:
        values = json.loads(record)
        tools = {"tools": values["tools"]} if values.get("tools") else {}
        return template.exchanges(_find(values, field), loss_on=loss_on, eos=eos, **tools)

    return read


def _find(record: Any, field: str) -> Any:
    """The value under a dotted name; names in another case serve where none is exact."""
    if not isinstance(record, dict):
        return None
    for same in (str, str.lower):
        for key, value in record.items():
            if same(key) == same(field):
                return value
    for key, value in record.items():
        found = _find(value, field[len(key) + 1 :]) if field.startswith(f"{key}.") else None
        if found is not None:
            return found
    return None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("its messages must be a list of objects with role and content")
    for index, message in enumerate(messages):
        whole = isinstance(message, dict) and isinstance(message.get("role"), str)
        content = message.get("content") if whole else None
        if not whole or not (isinstance(content, str) or "tool_calls" in message):
            raise ValueError(
                f"its messages[{index}] must have a role and a content, both of them strings"
            )


def _environment() -> Any:
    """The environment of transformers' chat templates; nothing outside of it can be reached."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Accepts ``{% generation %}``, by which some templates mark the responses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """Return the statements inside."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, loopcontrols]
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = fail
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made
