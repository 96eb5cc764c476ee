"""Saved conversations, from Python as the chat uses them."""

from pathlib import Path

import pytest

from olmo3_mlx import CacheOptions, Chat, Olmo3, Session, SessionError, Tokenizer
from olmo3_mlx.conversation.saved import open_conversation
from olmo3_mlx.errors import CachesNotSavedError


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
