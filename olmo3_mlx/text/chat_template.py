"""The checkpoint's own chat template: messages to prompt text.

Templates come with checkpoints, so they are untrusted: they run in jinja2's immutable sandbox, set
up as Hugging Face sets it up (block trimming, loop controls, order-preserving `tojson`,
`raise_exception`, `strftime_now`).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olmo3_mlx.errors import TemplateError

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template, with the special tokens (`bos_token`, ...) that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises TemplateError if `source` is no valid template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # jinja2 lets Python's SyntaxError and RecursionError through
            raise TemplateError(f"the checkpoint's chat template is not valid: {error}") from None
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation; `add_generation_prompt` opens the assistant's turn.

        A message has `role` and `content`, an assistant's perhaps `tool_calls`, whose arguments may
        be a dict or a JSON object as text. Raises TemplateError, with what the template said, for
        messages that it refuses and for a template that reaches for Python's internals.
        """
        checked = [_with_dict_arguments(message) for message in messages]
        try:
            return self._template.render(
                messages=checked,
                tools=list(tools) if tools is not None else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # whatever the template's own code ran into
            raise TemplateError(f"the checkpoint's chat template failed: {error}") from None


def _with_dict_arguments(message: Message) -> dict[str, Any]:
    """OpenAI's clients send tool arguments as JSON text; the templates walk through a dict."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"expected messages with a role and content, got {message!r}")
    copy = dict(message)
    if not copy.get("tool_calls"):
        return copy
    calls = []
    if not isinstance(copy["tool_calls"], Sequence):
        raise TemplateError(f"expected a list of tool_calls, got {copy['tool_calls']!r}")
    for call in copy["tool_calls"]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise TemplateError(f"expected tool_calls with a function's name and arguments, got {call!r}")
        function = dict(function)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError as error:
                raise TemplateError(
                    f"expected a JSON object as arguments of {function.get('name')!r}: {error}"
                ) from None
        calls.append({**call, "function": function})
    return {**copy, "tool_calls": calls}


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
