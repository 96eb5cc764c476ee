"""The checkpoint's own chat template: messages to prompt text.

Templates come with checkpoints, so they are untrusted: they run in jinja2's immutable sandbox, set
up as Hugging Face sets it up (block trimming, loop controls, order-preserving `tojson`,
`raise_exception`, `strftime_now`).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from secrets import token_hex
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olmo3_mlx.errors import TemplateError
from olmo3_mlx.text.client_messages import Message, normalized


class ChatTemplate:
    """A template, with the special tokens (`bos_token`, ...) that it may name. It is compiled when it is
    first rendered, so that a broken one stands in nobody's way who does not need it.
    """

    def __init__(self, source: str | TemplateError, special_tokens: Mapping[str, str] | None = None) -> None:
        """`source` may be the reason why there is none, which rendering then raises."""
        self._source = source
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of a conversation; `add_generation_prompt` opens the assistant's turn. With
        `continue_final_message` the text ends with the content of the last message, which is the
        assistant's, and is to be gone on with.

        A message has `role` and `content`, an assistant's perhaps `tool_calls`; client_messages.py says which
        forms are understood. Raises TemplateError, with what the template said, for a template that is not
        valid or reaches for Python's internals, and for messages that it refuses or would leave out.
        """
        checked = normalized(messages)
        _check_tools(tools)
        self._check_roles(checked, tools)
        if continue_final_message:
            return self._up_to_the_end_of(checked, tools)
        prompt = self._render(checked, tools, add_generation_prompt)
        if checked and not prompt:
            raise TemplateError("the checkpoint's chat template renders nothing: expected a prompt's text")
        return prompt

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, opened: bool
    ) -> str:
        template = self._template  # outside: what is wrong with it is said in its own words
        try:
            return template.render(
                messages=messages,
                tools=list(tools) if tools is not None else None,
                documents=None,
                add_generation_prompt=opened,
                **self._special_tokens,
            )
        except Exception as error:  # whatever the template's own code ran into
            raise TemplateError(f"the checkpoint's chat template failed: {error}") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        if isinstance(self._source, TemplateError):
            raise self._source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            return environment.from_string(self._source)
        except Exception as error:  # jinja2 lets Python's SyntaxError and RecursionError through
            raise TemplateError(f"the checkpoint's chat template is not valid: {error}") from None

    def _check_roles(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> None:
        """Raise TemplateError for a message that the template would pass over without a word, because of its
        role, or because a system message is not the first.
        """
        marked, marks = [], {}
        for place, message in enumerate(messages):
            expected = message["role"] in ("user", "assistant") or (
                place == 0 and message["role"] == "system"
            )
            if expected or "content" not in message:
                marked.append(message)
            else:
                marks[place] = token_hex()
                marked.append({**message, "content": message["content"] + marks[place]})
        if not marks:
            return
        rendered = self._render(marked, tools, False)
        for place, mark in marks.items():
            if mark not in rendered:
                raise TemplateError(
                    f"the checkpoint's chat template leaves out message {place + 1}, whose role is "
                    f"{messages[place]['role']}: expected system (as the first), user, assistant or tool"
                )

    def _up_to_the_end_of(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        last = messages[-1] if messages else {}
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise TemplateError(
                "only an assistant's message can be continued: expected one, with content, at the end"
            )
        mark = token_hex()
        marked = [*messages[:-1], {**last, "content": last["content"] + mark}]
        before, found, _ = self._render(marked, tools, False).rpartition(mark)
        if not found:
            raise TemplateError(
                "the checkpoint's chat template leaves out the message that is to be continued"
            )
        return before


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training: here it is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The nodes between the tag and its end."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _check_tools(tools: Any) -> None:
    if tools is None:
        return
    if (
        not isinstance(tools, Sequence)
        or isinstance(tools, str)
        or not all(isinstance(t, Mapping) for t in tools)
    ):
        raise TemplateError(f"expected a list of tools, each an object in JSON schema, got {tools!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML and sorts the keys.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
