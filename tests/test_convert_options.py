"""What may be asked of a conversion: anything else gets one line that says so, before any work."""

import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model, save_checkpoint

import convert
from convert import convert as to_mlx
from convert.options import check_options
from convert.recipe import named
from olmo3_mlx import Olmo3, Olmo3Config, TokenizerError
from olmo3_mlx.cli import main
from olmo3_mlx.cli.convert import EPILOG
from olmo3_mlx.errors import OptionError
from olmo3_mlx.quantization import Quantization


def refused(source: Path, words: str, /, **options: Any) -> None:
    dest = source.with_name("dest")
    with pytest.raises(OptionError, match=words):
        to_mlx(**{"source": source, "dest": dest, **options})
    assert not list(source.parent.glob("*dest*"))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("source", 5, "a folder or a hub id"),
        ("source", None, "a folder or a hub id"),
        ("dest", b"dest", "a folder"),
        ("dest", None, "a folder"),
        ("bits", 4.0, "a whole number or None"),
        ("bits", "4", "a whole number or None"),
        ("bits", True, "a whole number or None"),
        ("group_size", 64.0, "a whole number or None"),
        ("mode", None, "a name"),
        ("mode", ["affine"], "a name"),
        ("recipe", 4, "a name, a file or None"),
        ("recipe", {"bits": 4}, "a name, a file or None"),
        ("dtype", 16, "a name or None"),
        ("calibrate", None, "True, False or a text file"),
        ("calibrate", "", "True, False or a text file"),
        ("target_bpw", "4", "a number or None"),
        ("target_bpw", True, "a number or None"),
        ("revision", 1, "a branch, tag or commit, or None"),
        ("tokenizer", 1, "a folder, a hub id or None"),
        ("resume", "no", "True or False"),
        ("keep", None, "True or False"),
        ("card", "yes", "True, False or None"),
        ("text", ["text"], "a text file or None"),
        ("upload_to", Path("you/model"), "a repository's name or None"),
    ],
)
def test_an_option_of_another_type_is_refused_with_what_was_expected(
    tiny_checkpoint: Path, name: str, value: Any, expected: str
) -> None:
    refused(tiny_checkpoint, rf"^{name} must be {expected}, not ", **{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": None, "group_size": 32}, r"group_size \(--group-size\) is for quantizing: give bits"),
        ({"bits": None, "mode": "mxfp4"}, r"mode \(--mode\) is for quantizing: give bits"),
        ({"recipe": "mixed_4_6", "group_size": 32}, "a recipe says bits, group size and mode"),
        ({"recipe": "mixed_4_6", "mode": "mxfp4"}, "a recipe says bits, group size and mode"),
        ({"recipe": "mixed_4_6", "bits": 4}, "a recipe says bits, group size and mode"),
        ({"target_bpw": 4.5, "group_size": 32}, "chooses bits and group sizes itself: leave out group_size"),
        ({"target_bpw": 4.5, "bits": 4}, "chooses bits and group sizes itself: leave out bits"),
        ({"bits": 8, "mode": "mxfp4"}, r"^bits must be 4 in mode mxfp4, not 8$"),
        ({"group_size": 64, "mode": "nvfp4"}, r"^group_size must be 16 in mode nvfp4, not 64$"),
        ({"bits": 7}, r"^bits must be one of 2, 3, 4, 5, 6, 8 in mode affine, not 7$"),
        ({"card": False, "text": "a.txt"}, r"give card=True \(no --no-card\), or leave out"),
        (
            {"bits": None, "card": None, "text": "a.txt"},
            r"a cast gets none unless asked: give card=True \(--card\)",
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    tiny_checkpoint: Path, options: dict[str, Any], words: str
) -> None:
    refused(tiny_checkpoint, words, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--group-size", "32", "--dtype", "float16"), "--group-size"),
        (("--text", "a.txt", "--dtype", "float16"), "--card"),
        (("--text", "a.txt", "--no-card"), "--no-card"),
        (("--target-bpw", "5", "--mode", "mxfp4"), "and --mode"),
        (("--target-bpw", "0", "--bits", "4"), "leave out --bits"),
    ],
)
def test_the_command_line_refuses_what_it_would_ignore(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    assert main(["convert", str(tiny_checkpoint), str(tiny_checkpoint.with_name("dest")), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("olmo3 convert: error: ")
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(("mode", "bits"), [("affine", 4), ("mxfp4", 4), ("nvfp4", 4), ("mxfp8", 8)])
def test_bits_that_are_left_out_are_the_modes_usual_ones_from_python_too(
    tiny_checkpoint: Path, mode: str, bits: int
) -> None:
    dest = tiny_checkpoint.with_name("python")
    to_mlx(tiny_checkpoint, dest, mode=mode)
    assert json.loads((dest / "config.json").read_text())["quantization"]["bits"] == bits
    told = tiny_checkpoint.with_name("told")
    assert main(["convert", str(tiny_checkpoint), str(told), "--mode", mode, "--no-card"]) == 0
    assert (told / "config.json").read_bytes() == (dest / "config.json").read_bytes()


def test_a_cast_is_measured_on_a_text_where_a_card_is_asked_for(tiny_checkpoint: Path) -> None:
    text = tiny_checkpoint.with_name("text")
    text.write_text("Olmo 3 7B has 32 layers, of which one in four sees everything. " * 200)
    dest = tiny_checkpoint.with_name("dest")
    report = to_mlx(tiny_checkpoint, dest, bits=None, dtype="bfloat16", card=True, text=text)
    assert report.quality is not None


def test_a_target_is_for_affine_quantization_which_may_be_named(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise OptionError("far enough")

    monkeypatch.setattr(convert, "convert", stop)
    assert main(["convert", "source", "dest", "--target-bpw", "5", "--mode", "affine"]) == 2
    assert (asked["target_bpw"], asked["mode"]) == (5.0, "affine")


def test_the_recipe_in_the_help_is_one(tmp_path: Path) -> None:
    text = EPILOG.partition(":\n")[2].partition("\n\n")[0]
    (tmp_path / "recipe.toml").write_text(text)
    plan = (
        named(tmp_path / "recipe.toml")
        .plan(Olmo3(Olmo3Config.from_dict({**TINY, "intermediate_size": 128})))
        .layers
    )
    assert plan["model.layers.0.mlp.up_proj"] == Quantization(4, 64)
    assert "lm_head" not in plan


def test_a_tokenizer_asked_for_must_be_there(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", TINY, random_model(TINY).tensors())
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=r"empty: expected a tokenizer\.json, found none"):
        to_mlx(source, tmp_path / "dest", tokenizer=tmp_path / "empty")
    assert not list(tmp_path.glob("*dest*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--bits=4"),
        ({"bits": 8, "group_size": 32, "dtype": mx.float16}, "--bits=8 --group-size=32 --dtype=float16"),
        ({"bits": None, "dtype": "float16"}, "--dtype=float16"),
        ({"bits": None}, ""),
        ({"mode": "mxfp4", "tokenizer": "a b"}, "--bits=4 --mode=mxfp4 '--tokenizer=a b'"),
        ({"recipe": Path("my.toml"), "calibrate": True}, "--recipe=my.toml --calibrate"),
        ({"target_bpw": 4.5, "calibrate": "text"}, "--target-bpw=4.5 --calibrate=text"),
    ],
)
def test_what_was_asked_for_is_said_in_the_options_of_the_command_line(
    given: dict[str, Any], said: str
) -> None:
    usual = {name: parameter.default for name, parameter in inspect.signature(to_mlx).parameters.items()}
    assert check_options({**usual, "source": "source", "dest": "dest", **given}) == said
