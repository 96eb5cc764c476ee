"""Files are whole or not there, whatever fails and whenever the process dies."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olmo3_mlx.durable import flush, replace_file


def writing(text: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(text), None)[1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_file(path, writing("one"))
    assert path.read_text() == "one"
    replace_file(path, writing("two"))
    assert path.read_text() == "two"
    assert names(tmp_path) == {"a.json"}


def test_the_new_file_lies_beside_its_place_and_ends_alike(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        assert not (tmp_path / "a.safetensors").exists()

    replace_file(tmp_path / "a.safetensors", write)
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".safetensors"
    assert (tmp_path / "a.safetensors").read_bytes() == b""


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(new: Path) -> None:
        new.write_text("half of")
        raise error

    with pytest.raises(error):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.json"}


@pytest.mark.parametrize(("where", "name"), [(os, "fsync"), (Path, "replace"), (tempfile, "mkstemp")])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, name, fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, writing("new"))
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.json"}


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "a.json", []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        order.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    replace_file(path, writing("new"))
    if Path("/proc/self/fd").is_dir():
        assert order == ["file", "name", "folder"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        replace_file(tmp_path / "nowhere" / "a.json", writing("new"))
    with pytest.raises(OSError, match="nowhere"):
        flush(tmp_path / "nowhere")


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        replace_file(tmp_path / "a", writing("new"))
        with pytest.raises(IsADirectoryError):
            replace_file(tmp_path, writing("new"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


KILLED = """
import sys
from pathlib import Path
from olmo3_mlx.durable import replace_file
path = Path(sys.argv[1])
n = 0
while True:
    replace_file(path, lambda new: new.write_text(str(n % 10) * 200_000) and None)
    print("written", flush=True)
    n += 1
"""


def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for attempt in range(4):
        command = [sys.executable, "-c", KILLED, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(1 + 2 * attempt):
            assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        text = path.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1
