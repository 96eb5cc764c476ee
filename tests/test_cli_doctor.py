"""olmo3 doctor: a line for each check, --json, exit codes."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, assert_one_line, facts, finish, read_until, start

from olmo3_mlx.doctor import Finding

pytestmark = pytest.mark.usefixtures("a_users_shell")

FINDINGS = [
    Finding("versions", "passed", "olmo3-mlx 0.1.0, mlx 0.32.4", seconds=0.01234),
    Finding("4-bit products", "failed", "float32 off by 7.0e-02 of at most 2.0e-06", "install it anew", 0.5),
    Finding("large products", "skipped", "for GPUs"),
]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets the doctor find just that, and tells what it was asked for."""
    asked: list[Any] = []

    def examine(model: str | None, **keywords: Any) -> Iterator[Finding]:
        asked.append((model, keywords))
        return iter(FINDINGS[: 3 if model is None else 1])

    monkeypatch.setattr("olmo3_mlx.doctor.examine", examine)
    return asked


def test_each_finding_is_a_line_and_a_failure_says_what_to_do(olmo3: Run, found: list[Any]) -> None:
    code, out, err = olmo3("doctor")
    assert (code, err) == (1, "")
    *lines, last = out.splitlines()
    assert lines == [
        "passed  versions                    olmo3-mlx 0.1.0, mlx 0.32.4",
        "FAILED  4-bit products              float32 off by 7.0e-02 of at most 2.0e-06",
        "        what to do: install it anew",
        "skipped large products              for GPUs",
    ]
    assert last.startswith("1 passed, 1 failed, 1 skipped, in ")


def test_nothing_found_is_exit_code_0(olmo3: Run, found: list[Any]) -> None:
    assert olmo3("doctor", "--model", "x", "--revision", "r").code == 0
    ((model, keywords),) = found
    assert (model, keywords["revision"]) == ("x", "r")


def test_json_is_one_object_with_every_finding(olmo3: Run, found: list[Any]) -> None:
    code, out, _ = olmo3("doctor", "--json")
    assert (code, out.count("\n")) == (1, 1)
    said = json.loads(out)
    assert said["ok"] is False
    assert said["findings"][0] == {
        "name": "versions", "status": "passed", "detail": "olmo3-mlx 0.1.0, mlx 0.32.4", "advice": "",
        "seconds": 0.012,
    }  # fmt: skip
    assert len(said["findings"]) == 3
    assert facts(olmo3("doctor", "--json", "--model", "x"))["ok"] is True


def test_the_conversion_that_is_looked_at_is_converts(
    olmo3: Run, found: list[Any], tiny_original: Path, tmp_path: Path
) -> None:
    olmo3("doctor")
    ((_, keywords),) = found
    keywords["convert"](tiny_original, tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["quantization"]["bits"] == 8


def test_a_model_that_there_is_not_is_one_line(olmo3: Run) -> None:
    code, out, err = olmo3("doctor", "--model", "no such model")
    assert (code, out) == (1, "")
    assert_one_line(err, "doctor")


def test_a_folder_without_weights_is_a_finding(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for others in ("_of_demo", "kernel_checks"):
        monkeypatch.setattr(f"olmo3_mlx.doctor.examination.{others}", lambda: [])
    (tiny_checkpoint / "model.safetensors").unlink()
    code, out, err = olmo3("doctor", "--model", tiny_checkpoint)
    assert (code, err) == (1, "")
    assert "FAILED  tiny: memory plan" in out
    assert "no safetensors" in out or "model.safetensors" in out
    assert "skipped tiny: loading" in out


def test_ctrl_c_ends_it_in_a_line() -> None:
    process = start("doctor")
    assert process.stdout is not None
    read_until(process.stdout.fileno(), rb"RoPE")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.err) == (130, "olmo3 doctor: interrupted\n")
