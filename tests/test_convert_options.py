"""What may be asked of a conversion: anything else gets one line that says so, before any work."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model, save_checkpoint

import convert
from convert import convert as to_mlx
from convert.options import ConvertKeywords, ConvertOptions
from convert.recipe import named
from olmo3_mlx import Olmo3, Olmo3Config, TokenizerError
from olmo3_mlx.cli import main
from olmo3_mlx.cli.convert import EPILOG
from olmo3_mlx.cli.wording import flag
from olmo3_mlx.errors import OptionError, Setting
from olmo3_mlx.quantization import Quantization


def refused(source: Path, message: str, /, **options: Any) -> None:
    dest = source.with_name("dest")
    with pytest.raises(OptionError, match=message):
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
        ("recipe", 4, "a name, a file, a folder or None"),
        ("recipe", {"bits": 4}, "a name, a file, a folder or None"),
        ("dtype", 16, "a name or None"),
        ("calibrate", None, "True, False, a text file or several"),
        ("calibrate", "", "True, False, a text file or several"),
        ("target_bpw", "4", "a number or None"),
        ("target_bpw", True, "a number or None"),
        ("target_gb", "4", "a number or None"),
        ("save_recipe", True, "a file or None"),
        ("revision", 1, "a branch, tag or commit, or None"),
        ("tokenizer", 1, "a folder, a hub id or None"),
        ("resume", "no", "True or False"),
        ("keep", None, "True or False"),
        ("card", "yes", "True, False or None"),
        ("text", ["text", 5], "a text file, several or None"),
        ("upload_to", Path("you/model"), "a repository's name or None"),
    ],
)
def test_an_option_of_another_type_is_refused_with_what_was_expected(
    tiny_checkpoint: Path, name: str, value: Any, expected: str
) -> None:
    refused(tiny_checkpoint, rf"^{name} must be {expected}, not ", **{name: value})


LEFT_OUT = (
    "^target_(bpw|gb) chooses bits and .*, in mode affine: leave out bits, group_size, recipe and mode$"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": None, "group_size": 32}, r"^group_size is for quantizing: give bits too, or leave it out"),
        ({"bits": None, "mode": "mxfp4"}, r"^mode is for quantizing: give bits too, or leave it out"),
        ({"recipe": "mixed_4_6", "group_size": 32}, "^recipe says bits, group size and mode"),
        ({"recipe": "mixed_4_6", "mode": "mxfp4"}, "^recipe says bits, group size and mode"),
        ({"recipe": "mixed_4_6", "bits": 4}, "^recipe says bits, group size and mode"),
        ({"target_bpw": 4.5, "group_size": 32}, LEFT_OUT),
        ({"target_bpw": 4.5, "bits": 4}, LEFT_OUT),
        ({"target_bpw": 4.5, "bits": None}, LEFT_OUT),
        ({"target_bpw": 4.5, "recipe": "mixed_4_6"}, LEFT_OUT),
        ({"target_bpw": 4.5, "mode": "mxfp4"}, LEFT_OUT),
        ({"target_gb": 4, "bits": 4}, LEFT_OUT),
        ({"target_gb": 4, "group_size": 32}, LEFT_OUT),
        ({"target_gb": 4, "recipe": "mixed_4_6"}, LEFT_OUT),
        ({"target_gb": 4, "mode": "mxfp4"}, LEFT_OUT),
        (
            {"calibrate": True, "mode": "mxfp4"},
            "^calibration is for affine .*: leave out mode, or calibrate$",
        ),
        ({"card": True, "keep": False}, "give either card=True or keep=False$"),
        ({"card": None, "text": "a.txt", "keep": False}, "give either text or keep=False$"),
        ({"bits": 8, "mode": "mxfp4"}, r"^bits must be 4 in mode mxfp4, not 8$"),
        ({"group_size": 64, "mode": "nvfp4"}, r"^group_size must be 16 in mode nvfp4, not 64$"),
        ({"bits": 7}, r"^bits must be one of 2, 3, 4, 5, 6, 8 in mode affine, not 7$"),
        ({"card": False, "text": "a.txt"}, "give card=True instead of card=False, or leave out the text$"),
        ({"bits": None, "card": None, "text": "a.txt"}, "a cast gets none unless asked: give card=True, or"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    tiny_checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    refused(tiny_checkpoint, message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", "32", "--dtype", "float16"), "--group-size is for quantizing: give --bits too"),
        (("--text", "a.txt", "--dtype", "float16"), "unless asked: give --card, or leave out"),
        (("--text", "a.txt", "--no-card"), "give --card instead of --no-card"),
        (("--card", "--no-keep"), "give either --card or --no-keep"),
        (("--calibrate", "--no-keep"), "leave out --no-keep"),
        (("--recipe", "mixed_4_6", "--bits", "4"), "--recipe says bits, group size and mode"),
        (("--recipe", "mixed_4_6", "--mode", "affine"), "--recipe says bits, group size and mode"),
        (("--bits", "3", "--mode", "mxfp4"), "--bits must be 4 in mode mxfp4, not 3"),
        (("--target-bpw", "5", "--mode", "mxfp4"), "and --mode"),
        (("--target-bpw", "0", "--bits", "4"), "leave out --bits"),
        (("--target-gb", "4", "--bits", "4"), "--target-gb chooses bits and group sizes itself"),
        (("--target-gb", "4", "--target-bpw", "5"), "give either --target-bpw 5.0 or --target-gb 4.0"),
        (("--target-gb", "0"), "--target-gb must be above 0 and finite, not 0.0"),
        (("--dtype", "float16", "--save-recipe", "r"), "give --bits, or leave out --save-recipe"),
    ],
)
def test_the_command_line_refuses_what_it_would_ignore(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["convert", str(tiny_checkpoint), str(tiny_checkpoint.with_name("dest")), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("olmo3 convert: error: ")
    assert message in said.err
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
    asked: list[ConvertOptions] = []

    def stop(source: str, dest: str, options: ConvertOptions, **_: Any) -> None:
        asked.append(options)
        raise OptionError("far enough")

    monkeypatch.setattr(convert, "convert", stop)
    assert main(["convert", "source", "dest", "--target-bpw", "5", "--mode", "affine"]) == 2
    assert asked == [ConvertOptions(target_bpw=5.0, mode="affine", card=None)]


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
    ("given", "settings", "flags"),
    [
        ({}, {"bits": 4}, "--bits 4"),
        (
            {"bits": 8, "group_size": 32, "dtype": mx.float16},
            {"bits": 8, "group_size": 32, "dtype": "float16"},
            "--bits 8 --group-size 32 --dtype float16",
        ),
        ({"bits": None, "dtype": "float16"}, {"dtype": "float16"}, "--dtype float16"),
        ({"bits": None}, {}, ""),
        (
            {"mode": "mxfp8", "tokenizer": "a/b"},
            {"bits": 8, "mode": "mxfp8", "tokenizer": "a/b"},
            "--bits 8 --mode mxfp8 --tokenizer a/b",
        ),
        (
            {"recipe": "mixed_4_6", "calibrate": True},
            {"recipe": "mixed_4_6", "calibrate": True},
            "--recipe mixed_4_6 --calibrate",
        ),
        ({"target_gb": 4, "save_recipe": "recipe.toml"}, {"target_gb": 4}, "--target-gb 4"),
        (
            {"target_bpw": 4.5, "calibrate": Path("text")},
            {"target_bpw": 4.5, "calibrate": "text"},
            "--target-bpw 4.5 --calibrate text",
        ),
        ({"resume": True, "keep": False, "upload_to": "you/model"}, {"bits": 4}, "--bits 4"),
    ],
)
def test_the_options_that_shape_a_result_are_data_which_each_face_spells(
    given: ConvertKeywords, settings: dict[str, Any], flags: str
) -> None:
    options = ConvertOptions(**given)
    assert options.settings == json.loads(json.dumps(options.settings)) == settings
    assert " ".join(flag(Setting(name, value)) for name, value in options.settings.items()) == flags


def test_options_are_one_value_that_keywords_change(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ConvertOptions(bits=8, group_size=32)
    changes: dict[str, ConvertKeywords] = {"value": {}, "changed": {"bits": 4}}
    for name, keywords in changes.items():
        to_mlx(tiny_checkpoint, tmp_path / name, options, **keywords)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization"] == {"group_size": 32, "bits": keywords.get("bits", 8), "mode": "affine"}
    with pytest.raises(OptionError, match=r"^options must be ConvertOptions or None, not 4$"):
        to_mlx(tiny_checkpoint, tmp_path / "dest", 4)  # type: ignore[arg-type]


def test_a_keyword_that_is_no_option_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^unknown option bitz: expected bits, group_size, mode, .*upload_to$"
    ):
        to_mlx("source", tmp_path / "dest", bitz=4)  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


def test_the_keywords_are_the_options() -> None:
    given = [field.name for field in dataclasses.fields(ConvertOptions) if field.init]
    assert given == list(ConvertKeywords.__annotations__)


def test_options_say_what_they_mean(tmp_path: Path) -> None:
    assert ConvertOptions(bits=None).only_casts
    assert not ConvertOptions(bits=None, recipe="mixed_4_6").only_casts
    assert ConvertOptions(recipe="mixed_4_6").schemes == named("mixed_4_6")
    assert ConvertOptions(mode="mxfp8").schemes.default == Quantization(8, 32, "mxfp8")
    assert ConvertOptions(dtype="bfloat16").cast == mx.bfloat16
    assert not ConvertOptions().calibrates
    assert ConvertOptions(target_bpw=5).calibrates
    assert ConvertOptions(calibrate=tmp_path).calibration_files == (tmp_path,)
    assert ConvertOptions(calibrate=["a", tmp_path], card=True).calibration_files == (Path("a"), tmp_path)
    assert ConvertOptions(calibrate=True).calibration_files is None
    assert ConvertOptions(text=("a", "b"), card=True).text_files == (Path("a"), Path("b"))
    assert ConvertOptions(card=True).text_files is None
    assert ConvertOptions(calibrate=("a", "b")).settings["calibrate"] == "a b"
