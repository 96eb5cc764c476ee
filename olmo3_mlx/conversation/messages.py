"""Messages of a conversation: what chat templates take, `role` and `content` each."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

from olmo3_mlx.errors import OptionError
from olmo3_mlx.text.client_messages import Message


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages, begun with the system message `system` unless that is None.

    Raises OptionError if they have one of their own.
    """
    if system is None:
        return list(messages)
    if system_message(messages) is not None:
        raise OptionError("expected one system message: give it as system or in the messages, not both")
    return [{"role": "system", "content": system}, *messages]


def system_message(messages: Sequence[Message]) -> str | None:
    """The content of the system message that a conversation begins with; None if it has none."""
    first = messages[0] if messages else None
    is_system = isinstance(first, Mapping) and first.get("role") in ("system", "developer")
    return cast(str | None, first.get("content")) if first is not None and is_system else None


def are_messages(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    """True for a list of messages in JSON's types, of which each has a text for `role`, and for `content`
    unless it calls tools.
    """
    return isinstance(value, list) and all(
        isinstance(m, dict)
        and isinstance(m.get("role"), str)
        and (isinstance(m.get("content"), str) or ("content" not in m and bool(m.get("tool_calls"))))
        for m in value
    )
