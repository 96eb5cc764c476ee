"""olmo3 convert: what it prints, its bar, interrupts, and destinations that cannot be."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command_line import FAR_TOO_LONG, Run, assert_one_line, facts

import convert
from olmo3_mlx.cli import main

pytestmark = pytest.mark.usefixtures("a_users_shell")


def test_convert_is_a_module_too(tiny_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "convert"]
    shown = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, check=False, timeout=FAR_TOO_LONG
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--group-size" in shown.stdout
    dest = tiny_checkpoint.with_name("dest")
    done = subprocess.run(
        [*command, str(tiny_checkpoint), str(dest), "--bits", "8", "--group-size", "32", "--no-card"],
        capture_output=True, text=True, check=False, timeout=FAR_TOO_LONG,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{dest}: ")
    assert (dest / "model.safetensors").is_file()


def test_convert_prints_what_came_out(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest", "--group-size", 32)
    assert (done.code, done.err) == (0, "")
    sizes = r"\d\.\d{3} bits per weight, 0\.\d\d MB \(was 4\.\d\d MB\), \d+\.\d s\n"
    assert re.fullmatch(re.escape(f"{tmp_path / 'dest'}: ") + sizes, done.out)
    answer = facts(olmo3("generate", "Hello", "--json", "--max-tokens", 1, "--model", tmp_path / "dest"))
    assert answer["generation_tokens"] == 1


def test_convert_measures_what_came_out_unless_told_not_to(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 256)
    text = tmp_path / "text"
    text.write_text("Olmo 3 7B has 32 layers, of which one in four sees everything. " * 200)
    dest = tmp_path / "dest"
    done = olmo3("convert", tiny_checkpoint, dest, "--group-size", 32, "--bits", 2, "--text", text)
    assert done.code == 0
    assert re.search(
        r"^quality: poor \(.*\): KL \d\.\d{5}, same top token \d+\.\d%, perplexity ", done.out, re.M
    )
    assert "the result is poor; try\n  - more bits: `--bits 3`" in done.err
    assert "--group-size" not in done.err
    figures = json.loads((dest / "quality.json").read_text())
    assert figures["verdict"] == "poor"
    assert (dest / "QUALITY.md").is_file()
    assert "**poor**" in (dest / "README.md").read_text()


def test_a_text_too_short_to_measure_on_is_refused_before_the_work(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("Too short.")
    done = olmo3("convert", tiny_checkpoint, tmp_path / "dest", "--text", text)
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "convert")
    assert "the text is too short" in done.err
    assert not list(tmp_path.glob(".dest*"))


def test_a_card_without_the_original_is_refused(olmo3: Run, tmp_path: Path) -> None:
    done = olmo3("convert", "some/model", tmp_path / "dest", "--card", "--no-keep")
    assert (done.code, done.out) == (2, "")
    assert "--no-keep" in done.err


def test_convert_names_the_layers_that_it_left_out(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert done.code == 0
    downs = ", ".join(f"model.layers.{i}.mlp.down_proj" for i in range(4))
    assert done.err == f"not quantized, as the group size does not divide their inputs: {downs}\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (4, None)),
        (["--bits", "8"], (8, None)),
        (["--dtype", "float16"], (None, "float16")),
        (["--bits", "4", "--dtype", "bfloat16"], (4, "bfloat16")),
    ],
    ids=["four bits unless told", "eight", "only cast", "both"],
)
def test_convert_takes_bits_and_dtype(
    olmo3: Run,
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    expected: tuple[int | None, str | None],
) -> None:
    dest = tmp_path / "dest"
    if expected[0]:  # a cast has no groups
        options = [*options, "--group-size", "32"]
    assert olmo3("convert", "--no-card", tiny_checkpoint, dest, *options).code == 0
    config = json.loads((dest / "config.json").read_text())
    assert (config.get("quantization", {}).get("bits"), config.get("dtype")) == expected
    tensors = mx.load(str(dest / "model.safetensors"))
    assert isinstance(tensors, dict)
    assert tensors["model.norm.weight"].dtype == getattr(mx, expected[1] or "float32")


class Terminal(io.StringIO):
    """Keeps what is shown on it."""

    def isatty(self) -> bool:
        return True


def test_a_bar_says_what_converting_is_at(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 256)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["convert", str(tiny_checkpoint), str(tmp_path / "dest")]) == 0
    said = dict.fromkeys(re.findall(r"([a-z][a-z, 0-9%]*): +\d+%\|", terminal.getvalue()))
    assert list(said)[:3] == ["beginning", "converting", "reading back"]
    assert list(said)[-1] == "measuring, 100%"


def test_an_interrupted_conversion_says_so(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupted)
    done = olmo3("convert", "--no-card", tiny_checkpoint, tiny_checkpoint.with_name("dest"))
    assert done == (130, "", "olmo3 convert: interrupted\n")


def test_an_interrupted_conversion_that_left_something_says_how_to_go_on(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = ("convert", tiny_checkpoint, tiny_checkpoint.with_name("dest"), "--dtype", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr("convert.conversion.write_model_card", interrupted)
        done = olmo3(*command)
        said = "olmo3 convert: interrupted: what was done is kept, go on with --resume\n"
        assert done == (130, "", said)
    done = olmo3(*command, "--resume")
    assert (done.code, done.err) == (0, "")


def test_resuming_what_was_never_begun_is_said(olmo3: Run, tiny_checkpoint: Path) -> None:
    dest = tiny_checkpoint.with_name("dest")
    command = ("convert", tiny_checkpoint, dest, "--dtype", "bfloat16", "--resume")
    done = olmo3(*command)
    said = f"no conversion to {dest} was begun: there is nothing to resume, this begins one\n"
    assert (done.code, done.err) == (0, said)
    done = olmo3(*command)
    assert done.code == 1
    assert_one_line(done.err, "convert")


@pytest.mark.parametrize("dest", ["/", "no/such/folder/.."])
def test_a_destination_without_a_name_is_refused_in_one_line(
    olmo3: Run, tiny_checkpoint: Path, dest: str
) -> None:
    done = olmo3("convert", tiny_checkpoint, dest)
    assert done.code == 1
    assert_one_line(done.err, "convert")
    assert f"{dest} is no name for a new folder" in done.err


def test_an_existing_destination_is_refused(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "exists already" in done.err
    assert list((tmp_path / "dest").iterdir()) == []


def test_a_destination_that_cannot_be_written_is_refused(olmo3: Run, tiny_checkpoint: Path) -> None:
    done = olmo3("convert", "--no-card", tiny_checkpoint, tiny_checkpoint / "config.json" / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "cannot write to" in done.err


def test_a_full_disk_is_refused(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Usage = namedtuple("Usage", ["total", "used", "free"])  # as shutil.disk_usage gives it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 0))
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "make room" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_result_that_cannot_chat_is_told_so(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tiny_checkpoint / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    done = olmo3("convert", tiny_checkpoint, tmp_path / "mute", "--dtype", "bfloat16")
    assert done.code == 0
    assert re.fullmatch(r"the result has no tokenizer\.json, .* \(--tokenizer MODEL .*\)\n", done.err)
    done = olmo3("convert", tiny_checkpoint, tmp_path / "quantized", "--group-size", "32")
    assert "not measured: " in done.err
    assert "the result has no tokenizer.json" in done.err
    done = olmo3("convert", tiny_checkpoint, tmp_path / "chats", "--dtype", "bfloat16", "--tokenizer", "demo")
    assert (done.code, done.err) == (0, "")
