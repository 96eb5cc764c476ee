"""Messages as clients write them, brought into the one form that chat templates were written for.

OpenAI's clients send null for what a message lacks, content in parts, arguments of calls as JSON text, and
`developer` for a system message; its Python library hands out objects. Templates know none of that, and would
render "None", a list, or nothing at all.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from olmo3_mlx.errors import TemplateError

Message = Mapping[str, Any]

_TEXT_PARTS = ("text", "input_text", "output_text")
_ALIASES = {"developer": "system"}


def normalized(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Copies of the messages: without keys that are null, as transformers renders them; content in parts
    joined as it stands; arguments of calls as dicts. Raises TemplateError for what is no message, or no text.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable):
        raise TemplateError(f"expected a list of messages, got {messages!r}")
    return [_normalized(message) for message in messages]


def _normalized(message: Any) -> dict[str, Any]:
    message = _dumped(message)
    if not isinstance(message, Mapping):
        raise TemplateError(f"expected messages with a role and content, got {message!r}")
    found = {key: value for key, value in message.items() if value is not None}
    role = found.get("role")
    if not isinstance(role, str):
        raise TemplateError(f"expected a message with a role, such as user, got {message!r}")
    found["role"] = _ALIASES.get(role, role)
    if "content" in found:
        found["content"] = _text(found["content"], role)
    elif role != "assistant":
        raise TemplateError(f"expected a text as content of the {role}'s message, got none")
    if "tool_calls" in found:
        found["tool_calls"] = _calls(found["tool_calls"])
    return found


def _dumped(value: Any) -> Any:
    """An object of OpenAI's library as the dict that it stands for; whatever else it is, as it stands."""
    dump = None if isinstance(value, Mapping) else getattr(value, "model_dump", None)
    return dump() if callable(dump) else value


def _text(content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise TemplateError(f"expected a text as content of the {role}'s message, got {content!r}")
    return "".join(_part(part) for part in content)


def _part(part: Any) -> str:
    part = _dumped(part)
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(text, str):
        return text
    raise TemplateError(
        f"Olmo 3 reads text alone: expected parts of content with a text, got {kind or part!r}"
    )


def _calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise TemplateError(f"expected a list of tool_calls, got {calls!r}")
    return [_call(call) for call in calls]


def _call(call: Any) -> dict[str, Any]:
    call = _dumped(call)
    function = _dumped(call.get("function", call)) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"expected tool_calls with a function's name and arguments, got {call!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise TemplateError(
                f"expected a JSON object as arguments of {function.get('name')!r}: {error}"
            ) from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise TemplateError(
            f"expected a JSON object as arguments of {function.get('name')!r}, got {arguments!r}"
        )
    return {**call, "function": {**function, "arguments": arguments}}
