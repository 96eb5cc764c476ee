"""Conversations as text: each through the checkpoint's own chat template, tools and thinking included.

A file has one conversation a line, {"messages": [...], "tools": [...]} or a list of messages alone, in
OpenAI's form; an assistant's message may have its thinking as `reasoning_content`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from olmo3_mlx.errors import OptionError, TemplateError
from olmo3_mlx.text.client_messages import Message, normalized
from olmo3_mlx.text.tokenizer import Tokenizer

_BEGIN, _END = "<think>", "</think>"
_FORM = 'expected {"messages": [...]} or a list of messages'


@dataclass(frozen=True)
class Conversation:
    """Messages, the tools that they may call, and the place where they stand, FILE:LINE."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None
    place: str


class Conversations:
    """A checkpoint's way to write conversations down."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def written(self, conversation: Conversation) -> str:
        """The text of a conversation. An assistant's thinking stands before its answer if the checkpoint
        thinks, and is left out if not.

        Raises TemplateError for messages that the template refuses, and for messages, tools or calls that it
        would leave out.
        """
        messages = [self._with_thinking(message) for message in normalized(conversation.messages)]
        tools = conversation.tools or None
        text = self._rendered(messages, tools)
        if tools and text == self._rendered(messages, None):
            raise TemplateError("the checkpoint's chat template leaves out the tools")
        silent = [{"content": "", **{k: v for k, v in m.items() if k != "tool_calls"}} for m in messages]
        calls = any(message.get("tool_calls") for message in messages)
        if calls and text == self._rendered(silent, tools):
            raise TemplateError("the checkpoint's chat template leaves out the assistant's tool_calls")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise TemplateError("expected valid Unicode text, got lone surrogates") from None
        return text

    @cached_property
    def _thinks(self) -> bool:
        """Whether the template has the checkpoint begin its answers with thinking."""
        prompt = self._tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        return prompt.rstrip().endswith(_BEGIN)

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=False)

    def _with_thinking(self, message: dict[str, Any]) -> dict[str, Any]:
        thinking = message.pop("reasoning_content", None)
        if not thinking or message["role"] != "assistant":
            return message
        if not self._thinks:  # the lines between thinking and answer go, too
            return (
                {**message, "content": message["content"].lstrip("\n")} if "content" in message else message
            )
        if not isinstance(thinking, str):
            raise TemplateError(f"expected a text as reasoning_content, got {thinking!r}")
        return {**message, "content": f"{_BEGIN}{thinking}{_END}{message.get('content', '')}"}


def check_template(tokenizer: Tokenizer, what: str) -> None:
    """Raise OptionError, which begins with `what` was to be read, for a checkpoint without a template."""
    if not tokenizer.chat_templates:
        raise OptionError(
            f"{what}: this checkpoint has no chat template (base models have none), so that it reads no "
            "conversations: give plain text"
        )


def parsed(text: str, name: str) -> list[Conversation]:
    """The conversations in a text of JSON lines; empty lines count for nothing. `name` is the file's.

    Raises OptionError, with the line, for what is no JSON and no conversation.
    """
    lines = enumerate(text.split("\n"), start=1)  # splitlines() knows ends that may stand in a JSON string
    return [_conversation(line, f"{name}:{number}") for number, line in lines if line.strip()]


def _conversation(line: str, place: str) -> Conversation:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise OptionError(f"{place}: no valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{place}: no valid JSON ({error})") from None
    entry = {"messages": found} if isinstance(found, list) else found
    if not isinstance(entry, Mapping) or "messages" not in entry:
        got = f"an object of {', '.join(entry) or 'nothing'}" if isinstance(entry, Mapping) else repr(found)
        raise OptionError(f"{place}: {_FORM}, got {_short(got)}")
    messages, tools = entry["messages"], entry.get("tools")
    if not isinstance(messages, list) or not messages:
        raise OptionError(f"{place}: expected a list of one message or more, got {_short(repr(messages))}")
    return Conversation(messages, tools, place)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"
