"""A checkpoint that is calibrated on the conversations that are saved on this machine."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Told
from test_self import FEW, a_text, begun, small_checkpoint, unexpected, weights

from convert import convert as to_mlx
from convert.texts.saved import saved_conversations
from olmo3_mlx import ConvertError, OptionError, SessionError
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.cli import main
from olmo3_mlx.cli.convert import _options, add_arguments
from olmo3_mlx.errors import Olmo3Error
from olmo3_mlx.text.chat_template import ChatTemplate
from olmo3_mlx.text.tokenizer import Tokenizer

SECRET = "Zanzibar is my secret"
TEMPLATE = (
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not that') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
THINKS = TEMPLATE + "{% if add_generation_prompt %}<assistant><think>{% endif %}"


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


@pytest.fixture(autouse=True)
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("chats") / "source")


def saved(sessions: Path, name: str, *said: str) -> list[dict[str, Any]]:
    """Save a conversation in which users and assistants have said in turn what is given."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    (sessions / name).mkdir(parents=True)
    content = json.dumps({"format": 1, "messages": messages})
    (sessions / name / "conversation.json").write_text(content)
    return messages


def long_chats(sessions: Path) -> None:
    numbers = [f"{SECRET}: {i} is not {i * i}." for i in range(40)]
    saved(sessions, "diary", *numbers)
    saved(sessions, "logbook", *numbers[::-1])


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.backend, ChatTemplate(template))


# What is read.


def test_all_saved_conversations_go_through_the_checkpoints_template(
    words: Tokenizer, sessions: Path
) -> None:
    later = saved(sessions, "work", "My name is Ada.", "Hello Ada.", "What is my name?")
    first = saved(sessions, "a-walk", "Is it raining?", "No.")
    saved(sessions, "nothing-said")
    (sessions / "begun").mkdir()
    text = saved_conversations(words, unexpected)
    assert text.documents == tuple(
        words.apply_chat_template(said, add_generation_prompt=False) for said in (first, later)
    )
    assert (text.label.kind, text.label.name) == ("chats", "what was said in 2 saved conversations")
    assert text.label.sha256 == hashlib.sha256(json.dumps([first, later]).encode()).hexdigest()


@pytest.mark.parametrize(
    ("template", "expected"),
    [(TEMPLATE, "<user>Hi<assistant>Ho"), (THINKS, "<user>Hi<assistant><think>Hm.</think>\n\nHo")],
)
def test_only_a_checkpoint_that_thinks_reads_what_another_thought(
    words: Tokenizer, sessions: Path, template: str, expected: str
) -> None:
    saved(sessions, "work", "Hi", "<think>Hm.</think>\n\nHo")
    assert saved_conversations(with_template(words, template), unexpected).documents == (expected,)


def test_what_cannot_be_read_is_named_and_left_out(words: Tokenizer, sessions: Path) -> None:
    saved(sessions, "good", "Hi", "Ho")
    for place in range(7):
        saved(sessions, f"bad-{place}", "forbidden", "Ho")
    saved(sessions, "torn")
    (sessions / "torn" / "conversation.json").write_text('{"format": 1, "mess')
    notices: list[Olmo3Error] = []
    text = saved_conversations(with_template(words, TEMPLATE), notices.append)
    assert text.documents == ("<user>Hi<assistant>Ho",)
    assert text.label.name == "what was said in 1 saved conversation"
    unreadable, refused = map(str, notices)
    assert unreadable.startswith("calibrating without the conversation torn: ")
    assert "conversation.json cannot be read" in unreadable
    assert refused == (
        "calibrating without the conversations bad-0, bad-1, bad-2, bad-3, bad-4 and 2 more: "
        "the checkpoint's chat template failed: not that"
    )


def test_where_nothing_is_saved_it_is_said_where_it_would_lie(words: Tokenizer, sessions: Path) -> None:
    with pytest.raises(OptionError, match=f"^no conversations are saved .* would lie in {sessions}$"):
        saved_conversations(words, unexpected)
    saved(sessions, "bad", "forbidden")
    notices: list[Olmo3Error] = []
    with pytest.raises(
        OptionError, match=r"^none of 1 saved conversation in .*sessions can be .*: not that$"
    ):
        saved_conversations(with_template(words, TEMPLATE), notices.append)
    assert "the conversation bad" in str(notices[0])


def test_a_checkpoint_without_a_template_reads_no_saved_conversations(
    words: Tokenizer, sessions: Path
) -> None:
    saved(sessions, "work", "Hi")
    with pytest.raises(OptionError, match=r"^saved conversations: this checkpoint has no chat template"):
        saved_conversations(Tokenizer(words.backend), unexpected)


def test_a_file_where_the_folder_should_be_is_an_error(words: Tokenizer, sessions: Path) -> None:
    sessions.write_text("")
    with pytest.raises(SessionError, match="is a file: expected the folder of saved conversations"):
        saved_conversations(words, unexpected)


# A conversion.


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on them in one go, and measured."""
    folder = tmp_path_factory.mktemp("whole")
    long_chats(folder / "sessions")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**FEW, "convert.preparing._TOKENS": 32}.items():
            patch.setattr(name, value)
        patch.setenv("OLMO3_SESSIONS", str(folder / "sessions"))
        to_mlx(source, folder / "dest", calibrate="chats", bits=4, card=True)
    return folder / "dest"


def test_cards_say_how_many_conversations_and_nothing_that_was_said(whole: Path) -> None:
    said = (
        "512 tokens of what was said in 2 saved conversations (through the checkpoint's template) (SHA-256 `"
    )
    assert f"Calibrated on {said}" in (whole / "README.md").read_text()
    assert f"calibrated on {said}" in (whole / "QUALITY.md").read_text()
    (text,) = json.loads((whole / "quality.json").read_text())["calibration"]["texts"]
    assert (text["kind"], text["sequences"]) == ("chats", 8)
    for path in whole.rglob("*"):
        if path.is_file() and path.name != "tokenizer.json":
            assert not any(word in path.read_bytes() for word in (b"Zanzibar", b"diary", b"logbook")), path


def test_a_run_that_goes_on_reads_the_same_conversations_and_keeps_none(
    source: Path, whole: Path, sessions: Path, tmp_path: Path
) -> None:
    long_chats(sessions)
    journal = begun(source, tmp_path / "dest", Told("calibrating"), "chats")
    for path in journal.parent.rglob("*"):
        if path.is_file() and path.name != "tokenizer.json":
            assert not any(word in path.read_bytes() for word in (b"Zanzibar", b"diary", b"logbook")), path
    to_mlx(source, tmp_path / "dest", calibrate="chats", bits=4, resume=True)
    assert weights(tmp_path / "dest") == weights(whole)


def test_a_run_does_not_go_on_with_other_conversations(source: Path, sessions: Path, tmp_path: Path) -> None:
    long_chats(sessions)
    begun(source, tmp_path / "dest", Told("choosing bits"), "chats")
    saved(sessions, "new", *["Nothing that was said before."] * 40)
    with pytest.raises(ConvertError, match="the text of calibrate has changed"):
        to_mlx(source, tmp_path / "dest", calibrate="chats", bits=4, resume=True)


def test_beside_others_conversations_have_a_share_like_any_text(
    source: Path, sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_chats(sessions)
    shares: list[tuple[str, ...]] = []

    def chosen(*_: Any, kinds: Sequence[str], **__: Any) -> None:
        shares.append(tuple(sorted(kinds)))
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.preparing.choose", chosen)
    begun(source, tmp_path / "dest", Told(), ["chats", "self", str(a_text(tmp_path, "notes.txt"))])
    assert shares == [("chats",) * 3 + ("notes.txt",) * 2 + ("self",) * 3]


def test_too_little_was_said(source: Path, sessions: Path, tmp_path: Path) -> None:
    saved(sessions, "work", "Hi", "Ho")
    said = (
        r"^what was said in 1 saved conversation is too short: 256 tokens .*, "
        r"it has \d+: give a longer one, or others too$"
    )
    with pytest.raises(OptionError, match=said):
        to_mlx(source, tmp_path / "dest", calibrate="chats", bits=4)


@pytest.mark.parametrize("calibrate", [True, "self", "./chats", Path("chats")])
def test_nobodys_conversations_are_read_unasked(
    source: Path, sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrate: Any
) -> None:
    long_chats(sessions)
    monkeypatch.chdir(tmp_path)
    a_text(tmp_path, "chats")
    for reads in ("olmo3_mlx.conversation.listing.ready_folder", "convert.texts.saved.read_conversations"):
        monkeypatch.setattr(reads, unexpected)
    begun(source, tmp_path / "dest", Told("choosing bits"), calibrate)


# Options.


def test_the_command_line_takes_chats(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = _options(parser.parse_args(["A", "B", "--calibrate", "chats", "self", "notes.txt"]))
    assert options.calibrates_on_chats
    assert options.calibrates_on_itself
    assert options.calibration_files == (Path("notes.txt"),)
    assert main(["convert", "A", "B", "--calibrate", "chats", "a", "chats"]) != 0
    assert '--calibrate has "chats" twice' in capsys.readouterr().err
