"""Saved conversations at a glance, and removed; from Python and by `olmo3 sessions`."""

import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from command_line import ANSWER, Run, asks_a_parrot, assert_one_line, facts

from olmo3_mlx import (
    CacheOptions,
    Chat,
    Olmo3,
    OptionError,
    Session,
    SessionError,
    Tokenizer,
    list_conversations,
    open_conversation,
    remove_conversation,
)
from olmo3_mlx.conversation.listing import read_conversations

pytestmark = pytest.mark.usefixtures("a_users_shell")


@pytest.fixture(autouse=True)
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path / "sessions"))
    return tmp_path / "sessions"


def converse(olmo3: Run, name: str, *lines: str) -> None:
    done = olmo3("chat", "--session", name, "--temperature", 0, stdin="".join(f"{line}\n" for line in lines))
    assert done.code == 0


def test_a_conversation_from_python_is_listed_with_what_is_known_of_it(
    demo: tuple[Olmo3, Tokenizer], sessions: Path
) -> None:
    model, tokenizer = demo
    assert list_conversations() == []
    with open_conversation("work") as saved:
        session = Session(model, files=saved.files(model, CacheOptions()))
        chat = Chat(model, tokenizer, session=session, temperature=0, max_tokens=8)
        list(chat.send("My name is Ada."))
        saved.save(chat.messages, session)
        held = len(session.tokens)
    (found,) = list_conversations()
    assert (found.name, found.messages, found.tokens, found.model) == ("work", 2, held, None)
    assert found.problem is None
    assert abs(found.last_used.timestamp() - (sessions / "work" / "conversation.json").stat().st_mtime) < 1
    assert found.nbytes == sum(path.stat().st_size for path in sessions.rglob("*") if path.is_file()) > 10_000
    with open_conversation("work") as saved:
        saved.model = "the demo"
        saved.save(saved.messages, Session(model, files=saved.files(model, CacheOptions())))
    (again,) = list_conversations()
    assert (again.model, again.messages, again.tokens) == ("the demo", 2, None)  # nothing was held then


@asks_a_parrot
def test_sessions_are_listed_with_the_newest_first(olmo3: Run, sessions: Path) -> None:
    assert olmo3("sessions") == (0, "", f"no conversations are saved in {sessions}\n")
    converse(olmo3, "old", "Hi")
    converse(olmo3, "new", "Hi", "Ho")
    os.utime(sessions / "old" / "conversation.json", (10**9, 10**9))
    os.utime(sessions / "old", (10**9, 10**9))
    done = olmo3("sessions")
    assert (done.code, done.err) == (0, "")
    title, new, old = done.out.splitlines()
    assert re.split(r" {2,}", title) == ["session", "messages", "last used", "tokens", "size", "model"]
    assert re.fullmatch(r"new  +4  \d{4}-\d\d-\d\d \d\d:\d\d  +\d+  \d+\.\d\d MiB  parrot", new)
    assert re.fullmatch(r"old  +2  2001-09-0\d \d\d:\d\d  +\d+  \d+\.\d\d MiB  parrot", old)
    listed = facts(olmo3("sessions", "--json"))
    assert listed["folder"] == str(sessions)
    first, second = listed["sessions"]
    assert list(first) == ["name", "messages", "last_used", "model", "tokens", "nbytes", "problem"]
    assert (first["name"], first["messages"], first["model"], first["problem"]) == ("new", 4, "parrot", None)
    assert datetime.fromisoformat(second["last_used"]).timestamp() == 10**9


DAMAGE = {
    "no JSON": ("{not json", "conversation.json cannot be read"),
    "another format": ('{"format": 99}', "expected a conversation in format 1"),
    "no messages": ('{"format": 1, "messages": [1]}', "expected messages"),
    "no text": ("\udcff", "conversation.json cannot be read"),
    "a list": ("[]", "expected a conversation in format 1"),
}


@asks_a_parrot
@pytest.mark.parametrize(("text", "problem"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_conversation_is_listed_with_what_is_wrong_and_can_be_removed(
    olmo3: Run, sessions: Path, text: str, problem: str
) -> None:
    converse(olmo3, "good", "Hi")
    converse(olmo3, "bad", "Hi")
    (sessions / "bad" / "conversation.json").write_bytes(text.encode(errors="surrogateescape"))
    done = olmo3("sessions")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert re.search(r"^bad +damaged  ", done.out, re.MULTILINE)
    assert lines[-1].startswith("bad: ")
    assert problem in lines[-1]
    by_name = {each["name"]: each for each in facts(olmo3("sessions", "--json"))["sessions"]}
    assert by_name["bad"]["messages"] is None
    assert by_name["good"]["problem"] is None
    assert olmo3("sessions", "--remove", "bad") == (0, "removed bad\n", "")
    assert [each.name for each in list_conversations()] == ["good"]


@asks_a_parrot
@pytest.mark.parametrize(
    "index", ["{", "[]", '{"blocks": 7}', '{"blocks": [{"tokens": 7}]}', '{"blocks": [3]}']
)
def test_damaged_caches_are_listed_as_what_they_are(olmo3: Run, sessions: Path, index: str) -> None:
    converse(olmo3, "work", "Hi")
    (sessions / "work" / "caches" / "caches.json").write_text(index)
    (found,) = list_conversations()
    assert (found.messages, found.tokens) == (2, None)
    assert found.problem is not None
    assert found.problem.endswith("caches.json is damaged: what was said will be read again")


@asks_a_parrot
def test_a_conversation_that_may_not_be_read_is_listed(olmo3: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    converse(olmo3, "work", "Hi")

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    (found,) = list_conversations()
    assert (found.name, found.messages) == ("work", None)
    assert "Permission denied" in str(found.problem)


@asks_a_parrot
def test_a_removed_session_is_gone_and_the_others_stay(olmo3: Run, sessions: Path) -> None:
    for name in ("a", "b", "c"):
        converse(olmo3, name, "Hi")
    done = olmo3("sessions", "--remove", "a", "--remove", "c", "--remove", "a", "--json")
    assert facts(done) == {"removed": ["a", "c"]}
    assert [path.name for path in sessions.iterdir()] == ["b"]
    again = olmo3("chat", "--session", "a", "--temperature", 0, stdin="Hi\n")
    assert (again.out, "going on" in again.err) == (f"{ANSWER}\n", False)


@asks_a_parrot
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("wrok", 1, "there is no session wrok; did you mean work?"),
        ("zzz", 1, "there is no session zzz"),
        ("../work", 2, "a session's name must be"),
        ("", 2, "a session's name must be"),
    ],
)
def test_a_wrong_name_removes_nothing(olmo3: Run, sessions: Path, name: str, code: int, said: str) -> None:
    converse(olmo3, "work", "Hi")
    done = olmo3("sessions", "--remove", "work", "--remove", name)
    assert (done.code, done.out) == (code, "")
    assert_one_line(done.err, "sessions")
    assert said in done.err
    assert [each.name for each in list_conversations()] == ["work"]


@asks_a_parrot
def test_a_session_that_a_process_has_open_is_not_removed(olmo3: Run, sessions: Path) -> None:
    converse(olmo3, "work", "Hi")
    with open_conversation("work"):
        done = olmo3("sessions", "--remove", "work")
        assert (done.code, done.out) == (1, "")
        assert "the session work is not removed: another process has it open" in done.err
        assert (sessions / "work" / "lock").exists()
    remove_conversation("work")
    assert list(sessions.iterdir()) == []


def test_from_python_what_is_not_there_is_not_removed(sessions: Path, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="there is no session work in"):
        remove_conversation("work")
    with pytest.raises(OptionError, match="a session's name must be"):
        remove_conversation("a/b")
    (tmp_path / "elsewhere").mkdir()
    sessions.mkdir(exist_ok=True)
    (sessions / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SessionError, match="is a link: remove it"):
        remove_conversation("link")
    assert (tmp_path / "elsewhere").exists()


def test_a_removal_that_is_cut_short_leaves_no_half_of_a_session(
    sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sessions / "work").mkdir(parents=True)
    (sessions / "work" / "lock").touch()
    (sessions / "work" / "conversation.json").write_text('{"format": 1, "messages": []}')

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            (path / "lock").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_conversation("work")
    assert [path.name for path in sessions.iterdir()] == [".removed-work"]
    assert list_conversations() == []  # which removes the rest
    assert list(sessions.iterdir()) == []


def test_a_conversation_that_is_removed_while_it_is_opened_is_not_opened(
    sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is taken of a file that lies nowhere any more: what was said would be lost."""
    from olmo3_mlx.conversation import saved
    from olmo3_mlx.durable import lock

    def late(stream: object) -> bool:
        shutil.rmtree(sessions / "work")
        return lock(stream)  # type: ignore[arg-type]

    monkeypatch.setattr(saved, "lock", late)
    with pytest.raises(SessionError, match="another process has the session work open"):
        open_conversation("work").__enter__()


@asks_a_parrot
def test_a_name_as_long_as_the_disk_takes_is_removed_too(olmo3: Run, sessions: Path) -> None:
    name = "日" * 84  # 252 bytes
    converse(olmo3, name, "Hi")
    assert [path.name for path in sessions.iterdir()] == [name]
    assert olmo3("sessions", "--remove", name).code == 0
    assert list(sessions.iterdir()) == []


def test_all_that_was_said_is_read_at_once(sessions: Path) -> None:
    said = [{"role": "user", "content": "Hi"}]
    for name, content in {
        "work": json.dumps({"format": 1, "messages": said}),
        "a-walk": json.dumps({"format": 1, "messages": [*said, *said]}),
        "empty": json.dumps({"format": 1, "messages": []}),
        "torn": "{",
    }.items():
        (sessions / name).mkdir(parents=True)
        (sessions / name / "conversation.json").write_text(content)
    with open_conversation("work"):  # by another process, say
        found, problems = read_conversations()
    assert list(found.items()) == [(sessions / "a-walk", [*said, *said]), (sessions / "work", said)]
    assert list(problems) == [sessions / "torn"]
