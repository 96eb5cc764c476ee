"""Disks that fail and processes that die while a session is saved leave what loads right."""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from test_session_files import (  # noqa: F401  (fixtures)
    folder,
    goes_on,
    ids,
    model,
    one_line,
    open_session,
    payloads,
    right_or_refused,
    saved,
    size,
    stray,
    write_session,
)

from olmo3_mlx import Olmo3, SessionError

# The disk


def fail(error: Exception) -> Callable[..., None]:
    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    return failing


FULL_DISK = OSError(28, "No space left on device")


def break_disk(monkeypatch: pytest.MonkeyPatch, how: str, after: int = 0) -> None:
    """From now on the disk takes `after` more writes of this kind, then none."""
    left = [after]

    def failing(real: Callable[..., Any], error: Exception, half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return real(*arguments, **options)
            if half:
                Path(arguments[0]).write_bytes(b"half")
            raise error

        return call

    match how:
        case "safetensors":
            real = mx.save_safetensors
            error = RuntimeError("[write] Unable to write to file.\nNo space left on device")
            monkeypatch.setattr(mx, "save_safetensors", failing(real, error, half=True))
        case "rename":
            monkeypatch.setattr(Path, "replace", failing(Path.replace, FULL_DISK))
        case "index":
            monkeypatch.setattr(Path, "write_text", failing(Path.write_text, FULL_DISK))
        case "mkstemp":
            import tempfile

            monkeypatch.setattr(tempfile, "mkstemp", failing(tempfile.mkstemp, FULL_DISK))
        case "fsync":
            import os

            monkeypatch.setattr(os, "fsync", failing(os.fsync, OSError(5, "Input/output error")))
        case "mkdir":
            monkeypatch.setattr(Path, "mkdir", failing(Path.mkdir, PermissionError(13, "Permission denied")))


DISK = ["safetensors", "rename", "index", "mkstemp", "fsync", "mkdir"]


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("how", DISK)
def test_a_disk_that_fails_while_saving_leaves_what_was_saved_and_the_session(
    model: Olmo3, folder: Path, how: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(model, folder)
    session.resume()
    session.prefill(ids(60, 5))
    session.snapshot()
    session.prefill(ids(60, 6))
    tokens = list(session.tokens)
    with monkeypatch.context() as broken:
        break_disk(broken, how, after)
        try:
            session.save()
            failed = False
        except SessionError as error:
            failed = True
            one_line(error)
        assert failed or after
        assert list(session.tokens) == tokens
        assert goes_on(model, session)
    assert stray(folder) == []
    copied = Path(shutil.copytree(folder, folder.parent / "copy"))
    again = open_session(model, copied)
    again.resume()
    assert list(again.tokens) in (
        [ids(140), tokens] if how == "fsync" else [ids(140)] if failed else [tokens]
    )
    assert goes_on(model, again)
    session.save()  # the disk is well again
    again = open_session(model, folder)
    again.resume()
    assert list(again.tokens) == list(session.tokens)
    assert goes_on(model, again)


@pytest.mark.parametrize("how", DISK)
def test_a_disk_that_fails_while_memory_is_full_does_not_stop_the_conversation(
    model: Olmo3, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves memory then is gone; the budget still holds, and nobody asked for files."""
    break_disk(monkeypatch, how)
    session = open_session(model, tmp_path, snapshot_bytes=20_000)
    session.prefill(ids(300))
    session.snapshot()
    session.match([*ids(40), 1])
    assert session.snapshot_bytes <= 20_000
    assert goes_on(model, session)
    assert stray(tmp_path) == []


@pytest.mark.parametrize("limit", [100, 20_000, 100_000])
def test_a_disk_that_is_really_full_is_a_session_error(model: Olmo3, folder: Path, limit: int) -> None:
    """The system refuses to write files beyond a length; in a process of its own."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_session_files import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = random_model(CONFIG)
session = open_session(model, Path({str(folder)!r}))
session.resume()
session.prefill(ids(200, 5))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
try:
    session.save()
except SessionError as error:
    print("refused", error)
assert len(session.tokens) == 340 and goes_on(model, session)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("refused")
    assert stray(folder) == []
    assert right_or_refused(model, folder)


def test_a_folder_that_cannot_be_made_is_a_session_error(model: Olmo3, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    session = open_session(model, tmp_path / "file" / "session")
    session.prefill(ids(30))
    with pytest.raises(SessionError) as error:
        session.save()
    one_line(error.value)
    assert list(session.tokens) == ids(30)
    assert goes_on(model, session)


def test_files_stay_under_their_limit_and_those_of_the_conversation_never_go(
    model: Olmo3, tmp_path: Path
) -> None:
    limit = 400_000
    session = open_session(model, tmp_path, snapshot_bytes=0, limit=limit)
    for seed in range(8):
        branch = [*ids(100), *ids(100, seed + 1)]
        session.prefill(branch[session.match(branch) :])
        session.save()
        assert size(tmp_path) <= limit + 10_000  # the index
        again = open_session(model, Path(shutil.copytree(tmp_path, tmp_path.parent / f"copy {seed}")))
        again.resume()
        assert list(again.tokens) == branch
    assert goes_on(model, again)


@pytest.mark.parametrize("limit", [0, 1000, 150_000])
def test_a_conversation_larger_than_the_limit_is_still_saved_whole(
    model: Olmo3, tmp_path: Path, limit: int
) -> None:
    write_session(model, tmp_path, limit=limit)
    session = open_session(model, tmp_path, limit=limit)
    session.resume()
    assert list(session.tokens) == ids(140)
    assert goes_on(model, session)


def test_while_another_branch_is_saved_the_last_one_stays_whole(
    model: Olmo3, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even at the limit: what the index names goes only once another index is there."""
    session = open_session(model, folder, limit=1000)
    session.resume()
    session.match(ids(300, 4))
    session.prefill(ids(300, 4))
    break_disk(monkeypatch, "index")
    with pytest.raises(SessionError):
        session.save()
    monkeypatch.undo()
    assert right_or_refused(model, folder)


def test_a_session_that_never_resumed_does_not_take_the_saved_ones_files_away(
    model: Olmo3, folder: Path
) -> None:
    session = open_session(model, folder, limit=1000, snapshot_bytes=0)
    session.prefill(ids(300, 4))
    session.snapshot()
    session.match([1, 2])
    assert right_or_refused(model, folder)


def test_files_of_abandoned_branches_go(model: Olmo3, folder: Path) -> None:
    session = open_session(model, folder)
    session.resume()
    session.match([1, 2])
    session.prefill(ids(30, 4))
    session.save()
    session = open_session(model, folder)
    session.resume()
    assert list(session.tokens) == ids(30, 4)
    assert len(payloads(folder)) == 2
    session.clear()
    session.save()
    session = open_session(model, folder)
    session.resume()
    assert payloads(folder) == []


# A process that dies


@pytest.mark.parametrize("leftover", ["unfinished", "not renamed"])
def test_what_a_killed_process_left_behind_is_cleared_away_and_not_believed(
    model: Olmo3, folder: Path, leftover: str
) -> None:
    path = next(path for path in payloads(folder) if ".full." in path.name)
    if leftover == "unfinished":
        (folder / ".unfinished-abcd1234.safetensors").write_bytes(path.read_bytes()[:1000])
    else:
        other = open_session(model, folder.parent / "other")
        other.prefill(ids(50, 8))
        other.save()
        for new in payloads(folder.parent / "other"):
            name, kind, *_ = new.name.split(".")
            shutil.copy(new, folder / f"{name}.{kind}.safetensors")
    session = open_session(model, folder)
    session.resume()
    assert list(session.tokens) == ids(140)
    assert stray(folder) == []
    session.match(ids(50, 8))
    session.prefill(ids(50, 8))
    session.save()
    session = open_session(model, folder)
    session.resume()
    assert list(session.tokens) == ids(50, 8)


def test_a_first_save_that_was_killed_between_two_renames_can_be_repeated(
    model: Olmo3, tmp_path: Path
) -> None:
    other = open_session(model, tmp_path / "other")
    other.prefill(ids(50))
    other.save()
    (tmp_path / "session").mkdir()
    for new in payloads(tmp_path / "other"):
        name, kind, *_ = new.name.split(".")
        shutil.copy(new, tmp_path / "session" / f"{name}.{kind}.safetensors")
    session = open_session(model, tmp_path / "session")
    session.prefill(ids(50))
    session.save()
    session = open_session(model, tmp_path / "session")
    session.resume()
    assert list(session.tokens) == ids(50)
    assert goes_on(model, session)


KILLED = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_session_files import *
model = random_model(CONFIG)
session = open_session(model, Path(sys.argv[1]))
session.resume()
print("ready", flush=True)
seed = len(session.tokens)
while True:
    session.goto(0 if seed % 5 == 0 else len(session.tokens))
    session.prefill(ids(40, seed))
    print(*session.tokens, flush=True)
    session.save()
    print("saved", flush=True)
    seed += 1
"""


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_killed_while_saving_leaves_what_loads_right(
    model: Olmo3, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "session"
    for _ in range(2 if seed < 2 else 20):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        seen = "".join(process.stdout.readline() for _ in range(rng.randint(1, 9)))
        process.send_signal(signal.SIGKILL)
        lines = (seen + process.stdout.read()).split("\n")
        process.wait()
        process.stdout.close()
        said = [[int(token) for token in line.split()] for line in lines[:-1] if line != "saved"]
        saves = lines[:-1].count("saved")
        session = open_session(model, folder)
        session.resume()
        if saves:  # the last save that ended, or the one that was being made
            assert list(session.tokens) in said[max(0, saves - 1) : saves + 1]
        assert goes_on(model, session)
        assert not folder.exists() or stray(folder) == []  # it may have been killed before the first save
