"""Where conversations lie, and that none is lost on the way from where they lay before."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Run, assert_one_line

from olmo3_mlx import SessionError, list_conversations, open_conversation
from olmo3_mlx.conversation import place
from olmo3_mlx.conversation.place import move_conversations, sessions_folder
from olmo3_mlx.durable import flush


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose data folder is elsewhere now, as on a Mac; where conversations lay."""
    for name in ("OLMO3_SESSIONS", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(place, "_data_folder", lambda: tmp_path / "Library")
    return tmp_path / ".local" / "share" / "olmo3-mlx" / "sessions"


def put(folder: Path, name: str, said: str) -> Path:
    """A conversation on disk, with something for its caches."""
    (folder / name / "caches").mkdir(parents=True)
    messages = [{"role": "user", "content": said}]
    (folder / name / "conversation.json").write_text(json.dumps({"format": 1, "messages": messages}))
    (folder / name / "caches" / "keys").write_bytes(said.encode() * 1000)
    (folder / name / "lock").touch()
    return folder / name


def held(folder: Path) -> dict[str, str]:
    """What each conversation of a folder says, whose caches are whole."""
    found = {}
    for path in sorted(folder.glob("[!.]*")):
        said = json.loads((path / "conversation.json").read_text())["messages"][0]["content"]
        assert (path / "caches" / "keys").read_bytes() == said.encode() * 1000
        found[path.name] = said
    return found


def test_the_variables_name_the_folder_and_then_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import platformdirs

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OLMO3_SESSIONS", "~nobody-of-that-name/mine")
    assert sessions_folder() == Path("~nobody-of-that-name/mine")
    monkeypatch.setenv("OLMO3_SESSIONS", "~/mine")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert sessions_folder() == tmp_path / "mine"
    monkeypatch.delenv("OLMO3_SESSIONS")
    assert sessions_folder() == Path("/data/olmo3-mlx/sessions")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert sessions_folder() == platformdirs.user_data_path() / "olmo3-mlx" / "sessions"
    assert str(sessions_folder()).startswith(str(tmp_path))


def test_conversations_move_when_one_is_opened_first(former: Path) -> None:
    put(former, ".removed-old", "gone")  # by a process that was killed before it had removed all of it
    put(former, "ada", "Hi")
    put(former, "bob", "Ho")
    (former / "empty").mkdir()
    (former / "empty" / "lock").touch()  # opened once, and nothing was said
    with open_conversation("ada") as saved:
        assert saved.messages == [{"role": "user", "content": "Hi"}]
        assert saved.folder == sessions_folder() / "ada"
    assert held(sessions_folder()) == {"ada": "Hi", "bob": "Ho"}
    assert not former.exists()


@pytest.mark.parametrize("variable", ["OLMO3_SESSIONS", "XDG_DATA_HOME"])
def test_nothing_moves_where_a_variable_names_the_folder(
    former: Path, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(former, "ada", "Hi")
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    assert list_conversations() == []
    assert held(former) == {"ada": "Hi"}


def test_a_conversation_whose_name_is_taken_gets_a_number(former: Path) -> None:
    put(sessions_folder(), "ada", "newer")
    put(sessions_folder(), "ada-2", "another")
    put(former, "ada", "older")
    assert {each.name for each in list_conversations()} == {"ada", "ada-2", "ada-3"}
    assert held(sessions_folder()) == {"ada": "newer", "ada-2": "another", "ada-3": "older"}


def test_a_conversation_that_a_process_has_open_stays_until_it_is_closed(
    former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(former, "ada", "Hi")
    put(former, "bob", "Ho")
    with monkeypatch.context() as before:  # as an earlier version has it open
        before.setenv("OLMO3_SESSIONS", str(former))
        with open_conversation("ada"):
            before.delenv("OLMO3_SESSIONS")
            with pytest.raises(SessionError, match="another process has the session ada open"):
                open_conversation("ada").__enter__()
            with open_conversation("bob") as saved:
                assert len(saved.messages) == 1
            problems = {each.name: each.problem or "" for each in list_conversations()}
            assert problems["bob"] == ""
            assert problems["ada"].endswith(": another process has it open")
            assert held(former) == {"ada": "Hi"}
    with open_conversation("ada") as saved:
        assert len(saved.messages) == 1
    assert held(sessions_folder()) == {"ada": "Hi", "bob": "Ho"}


@pytest.fixture
def another_file_system(former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be renamed from where conversations lay to where they lie."""
    rename = Path.rename

    def within_one(self: Path, target: Path) -> Path:
        if (former in self.parents) != (former in target.parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", within_one)


@pytest.mark.usefixtures("another_file_system")
def test_conversations_move_to_another_file_system(former: Path) -> None:
    put(former, "ada", "Hi")
    put(sessions_folder(), "bob", "newer")
    put(former, "bob", "older")
    assert len(list_conversations()) == 3
    assert held(sessions_folder()) == {"ada": "Hi", "bob": "newer", "bob-2": "older"}
    assert not former.exists()
    assert [path.name for path in sessions_folder().glob(".*")] == []


@pytest.mark.usefixtures("another_file_system")
def test_a_conversation_that_cannot_be_copied_stays_where_it_was(
    former: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(former, "ada", "Hi")

    def full(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    copying = SimpleNamespace(copytree=full, rmtree=shutil.rmtree, Error=shutil.Error)
    monkeypatch.setattr(place, "shutil", copying)
    with pytest.raises(SessionError, match=r"ada cannot be moved from .*: No space left on device"):
        open_conversation("ada").__enter__()
    assert held(former) == {"ada": "Hi"}
    assert list(sessions_folder().iterdir()) == []
    with open_conversation("new") as saved:
        assert saved.messages == []


class Killed(BaseException):
    """The process is no more."""


def dying(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """After so many steps of a move, nothing is done any more."""
    left = steps
    rename = Path.rename

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def before(do: Callable[..., Any]) -> Callable[..., Any]:
        def done(*arguments: Any, **options: Any) -> Any:
            step()
            return do(*arguments, **options)

        return done

    def remove(path: Path, **options: Any) -> None:
        if path.exists():
            step()
            next(file for file in sorted(path.rglob("*")) if file.is_file()).unlink()
            step()
        shutil.rmtree(path, **options)

    def copy(source: Path, target: Path) -> None:
        step()
        target.mkdir()
        shutil.copy2(source / "conversation.json", target)
        step()
        shutil.copytree(source, target, dirs_exist_ok=True)

    monkeypatch.setattr(Path, "rename", before(rename))
    monkeypatch.setattr(place, "flush", before(flush))
    moving = SimpleNamespace(copytree=copy, rmtree=remove, Error=shutil.Error)
    monkeypatch.setattr(place, "shutil", moving)


@pytest.mark.parametrize("across", [False, True])
def test_a_move_that_is_killed_at_any_step_loses_nothing_and_is_finished_later(
    former: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, across: bool
) -> None:
    if across:
        request.getfixturevalue("another_file_system")
    expected = {"ada": "Hi", "bob": "newer", "bob-2": "older"}
    for steps in range(100):
        for folder in (former, sessions_folder()):
            shutil.rmtree(folder, ignore_errors=True)
        put(former, "ada", "Hi")
        put(former, "bob", "older")
        put(sessions_folder(), "bob", "newer")
        with monkeypatch.context() as patch:
            dying(patch, steps)
            try:
                move_conversations(former, sessions_folder())
                ended = True
            except Killed:
                ended = False
        said = {*held(former).values(), *held(sessions_folder()).values()} if former.exists() else set()
        assert ended or said >= set(expected.values()) or held(sessions_folder()) == expected, steps
        assert move_conversations(former, sessions_folder()) == {}
        assert held(sessions_folder()) == expected, steps
        assert not former.exists()
        assert [path.name for path in sessions_folder().glob(".*")] == [], steps
        if ended:
            break
    else:
        pytest.fail("it never ended")
    assert steps > (20 if across else 1)


def test_a_link_from_one_place_to_the_other_loses_nothing(former: Path) -> None:
    put(former, "ada", "Hi")
    sessions_folder().parent.mkdir(parents=True)
    sessions_folder().symlink_to(former)
    with open_conversation("ada") as saved:
        assert len(saved.messages) == 1
    assert held(former) == {"ada": "Hi"}


@pytest.mark.usefixtures("a_users_shell")
@pytest.mark.parametrize(
    "arguments", [["chat", "--session", "ada"], ["sessions"], ["sessions", "--remove", "a"]]
)
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_folder_should_be_is_told_in_one_line(
    olmo3: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], below: str
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("OLMO3_SESSIONS", str(tmp_path / "file" / below))
    done = olmo3(*arguments)
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, arguments[0])
    assert f"{tmp_path / 'file'} is a file: expected the folder of saved conversations" in done.err
    assert (tmp_path / "file").read_text() == "mine"
