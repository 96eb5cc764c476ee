"""The script of a chat template: the pieces that it writes around what is said, found by rendering marks.

What a model says between the pieces is drawn from the model, the user's part too: a template's opening of a
user's turn is a prompt to write one (Xu et al. 2024, "Magpie", arXiv:2406.08464).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from olmo3_mlx.errors import OptionError, TemplateError
from olmo3_mlx.text.client_messages import Message
from olmo3_mlx.text.tokenizer import Tokenizer

Ids = tuple[int, ...]
Tools = Sequence[Mapping[str, Any]]

# In the place of what is said; of characters that no template looks for.
_ASKED, _THOUGHT, _SAID, _ASKED_AGAIN, _GIVEN = (f"\ue000{mark}\ue001" for mark in "uvwxy")
_NAME = "name_of_a_function"
_BEGIN, _END = "<think>", "</think>"
_USER = {"role": "user", "content": _ASKED}


@dataclass(frozen=True)
class Script:
    """What a template writes, as token ids: between two pieces somebody speaks until an end token.

    start   up to the user's first words
    answer  from a user's words to the assistant's
    end     behind the last answer
    again   from an answer to the user's next words; None if a conversation has one answer
    result  from an answer that calls to what the tool gives; None if tools are not answered
    after   from there to the next answer
    call    the text that an answer calls by, if tools are
    ends    tokens that end what somebody says, as the template closes their turns
    """

    start: Ids
    answer: Ids
    end: Ids
    again: Ids | None = None
    result: Ids | None = None
    after: Ids = ()
    call: str | None = None
    ends: frozenset[int] = frozenset()

    @property
    def ids(self) -> list[int]:
        """The ids of all pieces."""
        pieces = (self.start, self.answer, self.end, self.again or (), self.result or (), self.after)
        return list(chain(*pieces))


def script_of(tokenizer: Tokenizer, tools: Tools | None = None) -> Script:
    """The script of a checkpoint's template, for conversations with these tools. Where the template shows
    later turns otherwise than it asked for them (without their thinking, say), conversations have one answer.

    Raises OptionError for a template that does not show what is said, TemplateError for one that fails.
    """
    rendering = _Rendering(tokenizer, tools)
    whole = _between(rendering.of(_USER, opened=True), _ASKED)
    plain = _between(rendering.of(_USER, _assistant(_SAID)), _ASKED, _SAID)
    if whole is None or plain is None:
        raise OptionError(
            "the checkpoint's chat template does not show what is said as it is said, so that the model "
            "cannot write conversations by it: calibrate on texts"
        )
    start, answer = whole
    opening = answer.removeprefix(plain[1])  # of the answer itself, such as <think>
    opening = "" if opening == answer else opening
    said = f"{_THOUGHT}{_END}{_SAID}" if _BEGIN in opening else _SAID
    before, turns = f"{start}{_ASKED}{answer}{said}", (_USER, _assistant(opening + said))
    end = rendering.behind(before, *turns)
    again = _between(rendering.behind(before, *turns, _user(_ASKED_AGAIN), opened=True), _ASKED_AGAIN)
    given = _between(rendering.behind(before, *turns, _tool(_GIVEN), opened=True), _GIVEN)
    call = None if given is None else rendering.call()

    def ids(piece: str) -> Ids:
        return tuple(tokenizer.encode(piece))

    script = Script(
        start=ids(start),
        answer=ids(answer),
        end=ids(plain[2] if end is None else end),
        again=ids(again[0]) if again is not None and again[1] == answer else None,
        result=ids(given[0]) if given is not None and call is not None else None,
        after=ids(given[1]) if given is not None else (),
        call=call,
    )
    special = tokenizer.backend.get_added_tokens_decoder()
    closing = [piece[0] for piece in (script.answer, script.end, script.again, script.result) if piece]
    return replace(script, ends=frozenset(i for i in closing if i in special))


class _Rendering:
    def __init__(self, tokenizer: Tokenizer, tools: Tools | None) -> None:
        self._tokenizer, self._tools = tokenizer, tools

    def of(self, *messages: Message, opened: bool = False) -> str:
        """The text of messages; with `opened` up to an answer."""
        return self._tokenizer.apply_chat_template(messages, tools=self._tools, add_generation_prompt=opened)

    def behind(self, before: str, *messages: Message, opened: bool = False) -> str | None:
        """What stands behind `before` in the text of messages; None if that is not what it begins with, or if
        the template refuses them.
        """
        try:
            text = self.of(*messages, opened=opened)
        except TemplateError:
            return None
        return text.removeprefix(before) if text.startswith(before) else None

    def call(self) -> str | None:
        """What the template begins calls with; None if it shows none."""
        calls = [{"type": "function", "id": "call00001", "function": {"name": _NAME, "arguments": {}}}]
        try:
            parts = _between(self.of(_USER, {**_assistant(_SAID), "tool_calls": calls}), _SAID, _NAME)
        except TemplateError:
            return None
        return next(iter(parts[1].split()), None) if parts else None


def _between(text: str | None, *marks: str) -> list[str] | None:
    """The parts of a text around marks; None unless each stands there once, in their order."""
    parts, rest = [], text or ""
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        part, _, rest = rest.partition(mark)
        parts.append(part)
    return [*parts, rest]


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}
