"""Saved conversations, from Python as the chat uses them."""

from pathlib import Path
from typing import Any

import pytest

from olmo3_mlx import (
    CacheOptions,
    CachesNotSavedError,
    Chat,
    Olmo3,
    OptionError,
    Session,
    SessionError,
    Tokenizer,
    open_conversation,
)


@pytest.fixture(autouse=True)
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path))
    return tmp_path


def talk(demo: tuple[Olmo3, Tokenizer], *texts: str) -> tuple[int, int]:
    """Go on with the conversation "work"; the messages it has then, and the tokens that were held before."""
    model, tokenizer = demo
    with open_conversation("work") as saved:
        session = Session(model, files=saved.files(model, CacheOptions()))
        session.resume()
        held = len(session.tokens)
        chat = Chat(model, tokenizer, messages=saved.messages, session=session, temperature=0, max_tokens=8)
        for text in texts:
            list(chat.send(text))
            saved.save(chat.messages, session)
        return len(chat.messages), held


def test_a_conversation_goes_on_from_python_as_it_does_in_the_chat(demo: tuple[Olmo3, Tokenizer]) -> None:
    assert talk(demo, "My name is Ada.") == (2, 0)
    messages, held = talk(demo, "What is my name?")
    assert messages == 4
    assert held > 10


def test_a_conversation_in_which_nothing_was_said_leaves_nothing_behind(sessions: Path) -> None:
    with open_conversation("work") as saved:
        assert saved.folder.is_dir()
    with pytest.raises(KeyError), open_conversation("work"):
        raise KeyError
    assert list(sessions.iterdir()) == []


def test_what_could_not_be_saved_is_told_by_the_type(
    demo: tuple[Olmo3, Tokenizer], monkeypatch: pytest.MonkeyPatch, sessions: Path
) -> None:
    model, _ = demo
    with open_conversation("work") as saved:
        session = Session(model, files=saved.files(model, CacheOptions()))

        def full(*_: object, **__: object) -> None:
            raise SessionError("no space left")

        monkeypatch.setattr("olmo3_mlx.sessions.session.Session.save", full)
        with pytest.raises(CachesNotSavedError, match="no space left"):
            saved.save([{"role": "user", "content": "Hello"}], session)
    assert "Hello" in (sessions / "work" / "conversation.json").read_text()

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("olmo3_mlx.conversation.saved.replace_file", broken)
    with open_conversation("work") as saved, pytest.raises(SessionError, match="No space left") as caught:
        saved.save([], session)
    assert not isinstance(caught.value, CachesNotSavedError)


UNREADABLE: dict[str, Any] = {
    "an image": [{"role": "user", "content": [{"type": "image_url"}]}],
    "no content": [{"role": "user"}],
    "a role that is no text": [{"role": 1, "content": "Hello"}],
    "lone surrogates": [{"role": "user", "content": "\ud800"}],
    "what JSON does not have": [{"role": "user", "content": "Hello", "tags": {1}}],
    "a text": "Hello",
    "a text among messages": [{"role": "user", "content": "Hello"}, "Hello"],
    "a number": 7,
}


@pytest.mark.parametrize("messages", UNREADABLE.values(), ids=UNREADABLE)
def test_what_could_not_be_read_back_does_not_replace_what_was_saved(
    demo: tuple[Olmo3, Tokenizer], messages: Any
) -> None:
    model, _ = demo
    good = [{"role": "user", "content": "Hello", "mood": 3}]
    with open_conversation("work") as saved:
        session = Session(model, files=saved.files(model, CacheOptions()))
        saved.save(good, session)
        with pytest.raises(OptionError, match="a text for role and for content"):
            saved.save(messages, session)
    with open_conversation("work") as saved:
        assert saved.messages == good


def test_saving_over_caches_that_were_not_resumed_keeps_them_usable(demo: tuple[Olmo3, Tokenizer]) -> None:
    """The files of the same tokens are there already: they are used, and not said to hold nothing."""
    model, _ = demo
    text = list(range(100, 160))
    for part in (text, text, [*text, 5, 6]):
        with open_conversation("work") as saved:
            session = Session(model, files=saved.files(model, CacheOptions()))
            session.prefill(part)
            saved.save([], session)
    with open_conversation("work") as saved:
        session = Session(model, files=saved.files(model, CacheOptions()))
        session.resume()
        assert list(session.tokens) == [*text, 5, 6]


def test_messages_are_saved_in_every_form_that_a_chat_takes(demo: tuple[Olmo3, Tokenizer]) -> None:
    model, _ = demo
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Add."}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    with open_conversation("work") as saved:
        saved.save(said, Session(model, files=saved.files(model, CacheOptions())))
    with open_conversation("work") as saved:
        assert saved.messages[0] == {"role": "user", "content": "Add."}
        assert saved.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert [message["role"] for message in saved.messages] == ["user", "assistant", "tool"]
