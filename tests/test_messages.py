"""Messages: one system message, wherever it is given."""

import pytest

from olmo3_mlx import OptionError
from olmo3_mlx.conversation.messages import system_message, with_system
from olmo3_mlx.text.client_messages import Message

USER: Message = {"role": "user", "content": "Hello"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}


def test_a_system_message_goes_first_and_leaves_the_others_alone() -> None:
    messages = [USER]
    assert with_system(messages, "Be brief.") == [SYSTEM, USER]
    assert with_system(messages, None) == [USER] == messages
    assert with_system([], "Be brief.") == [SYSTEM]


def test_two_system_messages_are_refused() -> None:
    with pytest.raises(OptionError, match="expected one system message"):
        with_system([SYSTEM, USER], "Be long.")


def test_the_system_message_is_the_first_or_none() -> None:
    assert system_message([SYSTEM, USER]) == "Be brief."
    assert system_message([USER, SYSTEM]) is None
    assert system_message([]) is None
    assert system_message(["no message"]) is None  # type: ignore[list-item]
