"""olmo3 convert: what it prints, its bar, interrupts, and destinations that cannot be."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command_line import FAR_TOO_LONG, Run, assert_one_line, facts

import convert
from olmo3_mlx.cli import main
from olmo3_mlx.cli.bar import progress_bar
from olmo3_mlx.cli.interrupt import Terminated, ending_in_order

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
        r"^quality: poor \(.*\); see QUALITY.md\n  text  KL \d\.\d{5} ± \d\.\d{5}  same top token .*% .* -> ",
        done.out,
        re.M,
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
    assert "error: text is too short: 32 tokens are needed (1 sequence of 32), it has 4: give" in done.err
    assert not list(tmp_path.glob(".dest*"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--calibrate", "MODEL", "DEST"], "--calibrate took what follows it: write SOURCE DEST before"),
        (["--bits", "4", "--calibrate", "a.txt", "MODEL", "DEST"], "write SOURCE DEST before --calibrate"),
        (["MODEL", "--calibrate", "DEST"], "write DEST before --calibrate"),
        (
            ["--text", "a.txt", "MODEL", "DEST"],
            "--text took what follows it: write SOURCE DEST before --text",
        ),
    ],
)
def test_a_flag_that_took_source_and_destination_is_named(olmo3: Run, command: list[str], said: str) -> None:
    done = olmo3("convert", *command)
    assert done.code == 2
    assert said in done.err.splitlines()[-1]
    assert "took what" not in olmo3("convert", "--calibrate").err


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
        ([], (4, "float32")),
        (["--bits", "8"], (8, "float32")),
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
    expected: tuple[int | None, str],
) -> None:
    dest = tmp_path / "dest"
    if expected[0]:  # a cast has no groups
        options = [*options, "--group-size", "32"]
    assert olmo3("convert", "--no-card", tiny_checkpoint, dest, *options).code == 0
    config = json.loads((dest / "config.json").read_text())
    assert (config.get("quantization", {}).get("bits"), config.get("dtype")) == expected
    tensors = mx.load(str(dest / "model.safetensors"))
    assert isinstance(tensors, dict)
    assert tensors["model.norm.weight"].dtype == getattr(mx, expected[1])


class Terminal(io.StringIO):
    """Keeps what is shown on it."""

    def isatty(self) -> bool:
        return True


def test_a_bar_says_what_converting_is_at(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 64)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["convert", str(tiny_checkpoint), str(tmp_path / "dest")]) == 0
    said = dict.fromkeys(re.findall(r"([a-z][a-z, 0-9%]*): +\d+%\|", terminal.getvalue()))
    assert list(said) == ["beginning", "converting", "reading back", "measuring"]
    for stage in list(said)[1:]:
        shares = [int(share) for share in re.findall(rf"{stage}: +(\d+)%\|", terminal.getvalue())]
        assert shares == sorted(shares), stage
        assert (shares[0], shares[-1]) == (0, 100), stage


def test_a_bars_clock_goes_on_while_a_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("olmo3_mlx.cli.bar._TICK", 0.02)
    with progress_bar("working"):
        before = len(terminal.getvalue())
        time.sleep(0.3)
        assert len(terminal.getvalue()) > before


def test_a_log_has_a_line_now_and_then_and_each_stages_end(
    olmo3: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("olmo3_mlx.cli.bar._LOGGED", 0.0)
    done = olmo3("convert", tiny_checkpoint, tmp_path / "dest", "--group-size", 32)
    shares: dict[str, list[int]] = {}
    for stage, share in re.findall(r"^(.+): (\d+)% after \d+:\d\d$", done.err, re.M):
        shares.setdefault(stage, []).append(int(share))
    assert list(shares) == ["converting", "reading back", "measuring"]
    for stage, each in shares.items():
        assert each == sorted(each), stage
        assert (each[0], each[-1], each.count(100)) == (0, 100, 1), stage


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


KILLED = """
import os, signal, sys, time
import convert.conversion
from olmo3_mlx.cli import main
from olmo3_mlx.cli.bar import progress_bar
def killed(*_, **__):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
convert.conversion.write_model_card = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("signum", "word"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "ended by SIGTERM"),
        (signal.SIGHUP, "ended by SIGHUP"),
    ],
)
def test_a_signal_ends_a_conversion_as_ctrl_c_does(
    olmo3: Run, tiny_checkpoint: Path, signum: int, word: str
) -> None:
    command = ["convert", tiny_checkpoint, tiny_checkpoint.with_name("dest"), "--dtype", "bfloat16"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(int(signum)), *map(str, command)],
        capture_output=True, text=True, check=False, timeout=FAR_TOO_LONG,
    )  # fmt: skip
    said = f"olmo3 convert: {word}: what was done is kept, go on with --resume\n"
    assert (done.returncode, done.stdout, done.stderr) == (128 + signum, "", said)
    done_then = olmo3(*command, "--resume")
    assert (done_then.code, done_then.err) == (0, "")


def test_one_signal_is_enough_and_what_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_in_order():
            os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
            with pytest.raises(Terminated) as ended:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert ended.value.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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


@pytest.mark.parametrize(
    ("source", "dest", "said"),
    [
        ("tiny", "tiny", "is {source}, which is to be read"),
        ("tiny", "tiny/.", "is {source}, which is to be read"),
        ("tiny", "tiny/dest", "lies inside {source}, which is to be read"),
        ("tiny", "tiny/a/b/dest", "lies inside {source}, which is to be read"),
        ("tiny", "link/dest", "lies inside {source}, which is to be read"),
        ("link", "tiny/dest", "lies inside {source}, which is to be read"),
        ("link", "link", "is {source}, which is to be read"),
        ("outer/tiny", "outer", "outer/tiny, which is to be read, lies in "),
        ("outer/tiny", "outer-link", "outer/tiny, which is to be read, lies in "),
        (".dest.unfinished/tiny", "dest", ".dest.unfinished/tiny, which is to be read, lies in "),
    ],
)
def test_a_destination_and_a_source_that_lie_in_each_other_are_refused_before_anything_is_made(
    olmo3: Run, tiny_checkpoint: Path, source: str, dest: str, said: str
) -> None:
    folder = tiny_checkpoint.parent
    (folder / "link").symlink_to(tiny_checkpoint)
    (folder / "outer-link").symlink_to(folder / "outer")
    for outer in ("outer", ".dest.unfinished"):
        shutil.copytree(tiny_checkpoint, folder / outer / "tiny")
    before = sorted(folder.rglob("*"))
    for options in ([], ["--resume"]):
        done = olmo3("convert", folder / source, folder / dest, *options)
        assert (done.code, done.out) == (1, "")
        assert said.format(source=folder / source) in done.err
        assert sorted(folder.rglob("*")) == before
    other = shutil.copytree(tiny_checkpoint, folder / "other")
    done = olmo3("convert", other, folder / dest, "--tokenizer", folder / source)
    assert said.format(source=folder / source) in done.err


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize(
    "options", [["--dtype", "bfloat16"], ["--group-size", "32"]], ids=["cast", "quantized"]
)
def test_what_cannot_be_read_is_the_sources_fault(
    olmo3: Run, tiny_checkpoint: Path, name: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_checkpoint / "generation_config.json").write_text("{}")
    opened = io.open

    def refuse(file: Any, *args: Any, **keywords: Any) -> Any:
        if file == tiny_checkpoint / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **keywords)

    monkeypatch.setattr(io, "open", refuse)
    done = olmo3("convert", tiny_checkpoint, tiny_checkpoint.with_name("dest"), *options)
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert f"{tiny_checkpoint / name}: cannot be read (Permission denied)" in done.err
    assert "dest" not in done.err
    assert [path.name for path in tiny_checkpoint.parent.iterdir()] == ["tiny"]


def test_a_folder_that_cannot_be_looked_into_is_the_sources_fault(
    olmo3: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Path.stat

    def refuse(path: Path, **keywords: Any) -> os.stat_result:
        if path.parent == tiny_checkpoint:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return looked(path, **keywords)

    monkeypatch.setattr(Path, "stat", refuse)
    done = olmo3("convert", tiny_checkpoint, tiny_checkpoint.with_name("dest"))
    assert_one_line(done.err, "convert")
    assert f"{tiny_checkpoint}/" in done.err
    assert "cannot be read (Permission denied)" in done.err


def test_an_existing_destination_is_refused(olmo3: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "dest").mkdir()
    done = olmo3("convert", "--no-card", tiny_checkpoint, tmp_path / "dest")
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, "convert")
    assert "exists already" in done.err
    assert list((tmp_path / "dest").iterdir()) == []


def test_a_destination_that_cannot_be_written_is_refused(olmo3: Run, tiny_checkpoint: Path) -> None:
    (tiny_checkpoint.parent / "file").touch()
    done = olmo3("convert", "--no-card", tiny_checkpoint, tiny_checkpoint.parent / "file" / "dest")
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


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "tokenizer.json",
            "{",
            "the result's tokenizer cannot be used (.*: not a tokenizer that can be read: ",
        ),
        ("chat_template.jinja", "{% if", "the result's tokenizer cannot be used ("),
        ("tokenizer.json", None, "the result has no tokenizer.json, as its source has none"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, file: str, content: str | None, said: str
) -> None:
    (tiny_checkpoint / file).unlink()
    if content is not None:
        (tiny_checkpoint / file).write_text(content)
    told: list[str] = []
    report = convert.convert(
        tiny_checkpoint, tmp_path / "dest", bits=None,
        stage=told.append, notice=lambda error: told.append(str(error)),
    )  # fmt: skip
    assert re.match(re.escape(said).replace(r"\.\*", ".*"), told[0])
    assert told[0].endswith("copied into it (tokenizer='MODEL' says from where)")
    assert told[1:] == ["converting", "reading back"]
    assert not report.tokenizer
