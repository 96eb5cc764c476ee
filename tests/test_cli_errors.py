"""Bad checkpoints, names and options: one line that says what is wrong, and the exit code."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from command_line import Run, assert_one_line
from conftest import TINY, random_model, save_checkpoint
from fake_hub import FakeHub

import convert

pytestmark = pytest.mark.usefixtures("a_users_shell")


def change_config(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        tensors = mx.load(str(folder / "model.safetensors"))
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)

    return rewrite


def cut_weights(keep: Callable[[int], int]) -> Callable[[Path], Any]:
    """Cut the weights' file short; `keep` gets its size and says how much stays."""

    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: keep(len(data))])

    return cut


def remove(*names: str) -> Callable[[Path], Any]:
    def gone(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return gone


def template(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def as_it_is(folder: Path) -> None:
    """A checkpoint with nothing wrong."""


def quantize(folder: Path) -> None:
    shutil.move(folder, folder.with_name("plain"))
    convert.convert(folder.with_name("plain"), folder, group_size=32)


def swap(key: str, value: Any) -> Callable[[dict[str, mx.array]], Any]:
    return lambda tensors: tensors.update({key: value})


NORM = "model.norm.weight"
NO_TEMPLATE = remove("chat_template.jinja")
YARN = TINY["rope_scaling"]
GENERATE = ["generate", "Hello", "--max-tokens", "1"]
TOO_LONG = ["generate", "word " * 300, "--raw"]
CHAT = ["chat"]
INSPECT = ["inspect"]
CONVERT = ["convert", "SOURCE", "DEST", "--group-size", "32"]
# What is done to a checkpoint, the command given it, and what the error says.
BAD: dict[str, tuple[Callable[[Path], Any], list[str], tuple[str, ...]]] = {
    "no config.json": (remove("config.json"), GENERATE, ("config.json",)),
    "no config.json, inspect": (remove("config.json"), INSPECT, ("config.json",)),
    "no config.json, convert": (remove("config.json"), CONVERT, ("config.json",)),
    "another architecture": (change_config(model_type="llama"), GENERATE, ("model_type", "olmo3", "llama")),
    "another architecture, inspect": (change_config(model_type="llama"), INSPECT, ("model_type", "llama")),
    "weights cut in the header": (cut_weights(lambda size: 100), GENERATE, ("model.safetensors",)),
    "weights cut in the body": (cut_weights(lambda size: size // 2), GENERATE, ("model.safetensors",)),
    "weights cut, convert": (cut_weights(lambda size: size - 1), CONVERT, ("model.safetensors",)),
    "a missing tensor": (change_tensors(lambda t: t.pop(NORM)), GENERATE, ("lacks", NORM)),
    "an extra tensor": (change_tensors(swap("lm_head.bias", mx.zeros(8192))), GENERATE, ("lm_head.bias",)),
    "a misshapen tensor": (change_tensors(swap(NORM, mx.ones(65))), CHAT, (NORM, "[64]", "[65]")),
    "NaN": (change_tensors(swap(NORM, mx.full(64, math.nan))), GENERATE, (NORM, "NaN")),
    "NaN, convert": (change_tensors(swap(NORM, mx.full(64, math.nan))), CONVERT, (NORM, "NaN")),
    "infinite weights, convert": (change_tensors(swap(NORM, mx.full(64, math.inf))), CONVERT, (NORM,)),
    "an unknown RoPE type": (
        change_config(rope_scaling={**YARN, "rope_type": "ntk"}), GENERATE, ("rope_type", "yarn", "ntk"),
    ),
    "an unknown RoPE type, inspect": (
        change_config(rope_scaling={**YARN, "rope_type": "ntk"}), INSPECT, ("rope_type", "ntk"),
    ),
    "an unknown layer type": (
        change_config(layer_types=["full_attention"] * 3 + ["linear_attention"]),
        GENERATE,
        ("layer_types[3]", "linear_attention"),
    ),
    "heads that do not divide": (
        change_config(num_attention_heads=5, num_key_value_heads=5), INSPECT, ("num_attention_heads", "64"),
    ),
    "a group size that divides no layer": (
        as_it_is, ["convert", "SOURCE", "DEST", "--group-size", "128"], ("group size 128", "64, 96"),
    ),
    "quantizing again": (quantize, CONVERT, ("quantized already", "original")),
    "no tokenizer": (remove("tokenizer.json"), GENERATE, ("tokenizer.json",)),
    "no chat template": (NO_TEMPLATE, GENERATE, ("chat template", "--raw")),
    "no chat template, chat": (NO_TEMPLATE, CHAT, ("chat template",)),
    "a token outside the vocabulary": (
        lambda folder: save_checkpoint(folder, TINY, random_model(TINY).tensors()),
        ["generate", "Hello there", "--raw"],
        ("token id", "vocabulary of 128"),
    ),
    "an empty prompt": (as_it_is, ["generate", ""], ("prompt is empty",)),
    "a prompt of spaces": (as_it_is, ["generate", " \n"], ("prompt is empty",)),
    "an empty raw prompt": (as_it_is, ["generate", "", "--raw"], ("prompt is empty",)),
    "empty standard input": (as_it_is, ["generate", "-"], ("prompt is empty",)),
    "a prompt longer than the context": (as_it_is, TOO_LONG, ("tokens", "context is 256")),
    "a prompt that is no Unicode": (as_it_is, ["generate", "\udcff"], ("Unicode",)),
    "a template that reaches for Python": (
        template("{{ ().__class__.__base__.__subclasses__() }}"), GENERATE, ("chat template", "unsafe"),
    ),
    "a template that refuses": (
        template("{{ raise_exception('only\nhaiku') }}"), GENERATE, ("chat template", "only haiku"),
    ),
    "a template that is none": (template("{% if %}"), GENERATE, ("chat template",)),
    "a template that never ends": (
        template("{% for i in range(10 ** 10) %}x{% endfor %}"), GENERATE, ("chat template",),
    ),
    "a revision of a folder": (as_it_is, [*GENERATE, "--revision", "step1"], ("step1", "folder")),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "arguments", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line_and_exit_code_1(
    olmo3: Run,
    tiny_checkpoint: Path,
    damage: Callable[[Path], Any],
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    damage(tiny_checkpoint)
    dest = tiny_checkpoint.with_name("dest")
    places = {"SOURCE": str(tiny_checkpoint), "DEST": str(dest)}
    given = [places.get(argument, argument) for argument in arguments]
    if arguments[0] != "convert":
        given += ["--model", str(tiny_checkpoint)]
    done = olmo3(*given)
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, arguments[0])
    for word in words:
        assert word in done.err
    assert {path.name for path in dest.parent.iterdir()} <= {"tiny", "plain"}


BAD_NAMES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no such folder": (["generate", "hi", "--model", "no/such/folder"], ("no/such/folder", "hub id")),
    "a size for a model": (["generate", "hi", "--model", "7b"], ("7b", "hub id")),
    "a file for a folder": (["inspect", "--model", __file__], ("is a file",)),
    "a revision of the demo": (["generate", "hi", "--max-tokens", "1", "--revision", "x"], ("demo",)),
    "a source that is not there": (["convert", "no/such/folder", "DEST"], ("no/such/folder",)),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_a_model_that_is_not_there_gets_one_line_and_exit_code_1(
    olmo3: Run, tmp_path: Path, arguments: list[str], words: tuple[str, ...]
) -> None:
    done = olmo3(*(str(tmp_path / "dest") if a == "DEST" else a for a in arguments))
    assert (done.code, done.out) == (1, "")
    assert_one_line(done.err, arguments[0])
    for word in words:
        assert word in done.err


BAD_OPTIONS: dict[str, list[str]] = {
    "max_tokens": ["--max-tokens", "0"],
    "max_tokens, negative": ["--max-tokens", "-5"],
    "temperature": ["--temperature", "-1"],
    "temperature, absurd": ["--temperature", "1e9"],
    "temperature, not a number": ["--temperature", "nan"],
    "temperature, infinite": ["--temperature", "inf"],
    "top_p": ["--top-p", "0"],
    "top_p, above 1": ["--top-p", "1.5"],
    "top_k": ["--top-k", "-1"],
    "min_p": ["--min-p", "-0.1"],
    "min_p, above 1": ["--min-p", "2"],
    "repetition_penalty": ["--repetition-penalty", "0"],
    "repetition_penalty, not a number": ["--repetition-penalty", "nan"],
    "seed": ["--seed", "-1"],
    "seed, too large": ["--seed", str(2**64)],
    "stop": ["--stop", ""],
}


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_an_absurd_option_gets_one_line_and_exit_code_2_before_any_work(
    olmo3: Run, verb: str, option: str
) -> None:
    done = olmo3(verb, *BAD_OPTIONS[option], "--model", "no/such/folder", stdin="hello\n")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, verb)
    name = option.partition(",")[0].replace("_", "-")
    assert ("a stop string must not be empty" if name == "stop" else f"--{name} must be ") in done.err


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(("flag", "value"), [("--kv-start", 100), ("--kv-group-size", 64)])
def test_what_only_quantized_caches_have_is_not_dropped_without_them(
    olmo3: Run, verb: str, flag: str, value: int
) -> None:
    done = olmo3(verb, flag, value, "--model", "no/such/folder", stdin="hello\n")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, verb)
    assert f"{flag} {value} is for quantized caches: give --kv-bits too" in done.err


def test_what_the_hub_does_not_give_gets_one_line(
    olmo3: Run, hub: FakeHub, stop_hub: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def assert_told(words: Sequence[str], *arguments: str) -> None:
        done = olmo3("inspect", "--model", *arguments)
        assert (done.code, done.out) == (1, "")
        assert_one_line(done.err, "inspect")
        for word in words:
            assert word in done.err

    assert_told(("olmo/other", "the hub knows no such model"), "olmo/other")
    assert_told(("olmo/tiny", "no revision 'stage9'"), "olmo/tiny", "--revision", "stage9")
    for stop in stop_hub:
        stop()
    assert_told(("network",), "olmo/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_told(("not downloaded yet",), "olmo/tiny")
