"""Plans as recipes: written, read back to the same plan, off a checkpoint's folder too."""

import errno
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, Told, random_model
from test_calibrated import EVEN, WORDS, even_checkpoint
from test_target import FEW, four_bits

from convert import convert as to_mlx
from convert.options import ConvertOptions
from convert.recipe import RECIPES, Plan, Recipe, from_file, named
from convert.saved_recipe import in_toml, recipe_of
from olmo3_mlx import ConfigError, ConvertError, Olmo3, Olmo3Config, OptionError
from olmo3_mlx.cli import main
from olmo3_mlx.quantization import MODES, Quantization

SCHEMES = [Quantization(b, g, mode) for mode, (bits, groups) in MODES.items() for b in bits for g in groups]
AFFINE = [scheme for scheme in SCHEMES if scheme.mode == "affine"]
FOUR = Quantization(4, 32)
WIDE = {**TINY, "intermediate_size": 128}


def inputs(model: Olmo3) -> dict[str, int]:
    return {path: width for path, (_, width) in model.quantizable().items()}


def read_back(plan: Plan, model: Olmo3, folder: Path) -> tuple[Plan, Recipe]:
    """The plan that comes out of the file of another."""
    file = folder / "recipe.toml"
    file.write_text(in_toml(recipe_of(plan, inputs(model)), "a model", ["a fact"]), encoding="utf-8")
    return from_file(file).plan(model), from_file(file)


def random_plan(model: Olmo3, draw: random.Random, schemes: Sequence[Quantization] = SCHEMES) -> Plan:
    """As bits are chosen, but of all schemes: kinds mostly agree, some layers are left as they are."""
    usual: dict[str, Quantization | None] = {}
    schemes = draw.sample(schemes, draw.randint(1, 6))
    layers, left_out = {}, []
    for path, width in inputs(model).items():
        fitting = [scheme for scheme in schemes if width % scheme.group_size == 0]
        kind = path.rpartition(".")[2]
        if width % 32:
            left_out.append(path)
        elif fitting:
            usual.setdefault(kind, draw.choice([*fitting, *fitting, None]))
            scheme = usual[kind] if draw.random() < 0.7 else draw.choice([*fitting, None])
            if scheme is not None:
                layers[path] = scheme
    return Plan(layers, tuple(sorted(left_out)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"intermediate_size": 80}])
def test_any_plan_comes_back_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, draw, seen = Olmo3(Olmo3Config.from_dict({**TINY, **changes})), random.Random(0), 0
    for _ in range(60):
        plan = random_plan(model, draw)
        if not plan.layers:
            continue
        found, recipe = read_back(plan, model, tmp_path)
        assert found == plan
        assert len(recipe.rules) <= len(inputs(model))
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("config", [TINY, WIDE])
def test_plans_of_recipes_come_back_with_what_their_group_size_leaves_out(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    model = Olmo3(Olmo3Config.from_dict(config))
    rules = tuple((p, Quantization(s.bits, 32)) for p, s in RECIPES[name].rules if s is not None)
    plan = Recipe(RECIPES[name].default, rules).plan(model)
    assert bool(plan.left_out) == (config is TINY and name == "mixed_4_6")
    assert read_back(plan, model, tmp_path)[0] == plan


def test_a_kind_of_which_most_have_a_group_size_that_divides_keeps_the_rest_left_out(tmp_path: Path) -> None:
    model = Olmo3(Olmo3Config.from_dict(TINY))
    plan = Recipe(Quantization(4, 64), (("model.layers.[012].mlp.*", FOUR),)).plan(model)
    assert plan.left_out == ("model.layers.3.mlp.down_proj",)
    assert read_back(plan, model, tmp_path)[0] == plan


def test_what_agrees_is_said_once(tmp_path: Path) -> None:
    model = Olmo3(Olmo3Config.from_dict(WIDE))
    _, recipe = read_back(Recipe(Quantization(4, 64)).plan(model), model, tmp_path)
    assert recipe == Recipe(Quantization(4, 64))
    _, recipe = read_back(named("mixed_4_6").plan(model), model, tmp_path)
    assert recipe == named("mixed_4_6")
    layers = dict(named("mixed_4_6").plan(model).layers)
    layers["model.layers.2.self_attn.v_proj"] = Quantization(8, 32)
    del layers["lm_head"]
    read_back(Plan(layers), model, tmp_path)
    assert (tmp_path / "recipe.toml").read_text().partition("\n\n")[2] == (
        '[layers]\n"*.v_proj" = 6\n"*.o_proj" = 6\n'
        '"model.layers.2.self_attn.v_proj" = { bits = 8, group_size = 32 }\n"lm_head" = "none"\n'
    )


def test_a_name_that_would_end_a_comment_does_not() -> None:
    text = in_toml(Recipe(FOUR), "a\nbits = 8 # \x00", ["b\rbits = 2"])
    assert text.splitlines()[2:] == ["bits = 4", "group_size = 32"]
    assert "\x00" not in text


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setattr(name, value)


def test_a_sibling_is_calibrated_by_what_was_chosen_for_the_first_and_nothing_is_chosen_again(
    tmp_path: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = even_checkpoint(tmp_path / "first", random_model(EVEN).tensors())
    sibling = even_checkpoint(tmp_path / "sibling", random_model(EVEN, seed=1).tensors())
    text, saved = tmp_path / "text.txt", tmp_path / "saved.toml"
    text.write_text("".join(WORDS.format(7 * i, i * i) for i in range(50)))
    model = Olmo3(Olmo3Config.from_dict(EVEN))
    plan = {**dict.fromkeys(inputs(model), FOUR), **random_plan(model, random.Random(0), AFFINE).layers}
    monkeypatch.setattr("convert.preparing.choose", lambda *_, **__: plan)
    to_mlx(first, tmp_path / "a", target_bpw=5.5, calibrate=text, dtype="bfloat16", save_recipe=saved)
    assert saved.read_text().startswith(
        "# Which layers of first got how many bits.\n# Asked for: target_bpw=5.5; in all 0."
    )
    assert "# Calibrated on 256 tokens of text.txt (SHA-256 `" in saved.read_text()
    assert "# Written by olmo3-mlx " in saved.read_text()
    monkeypatch.setattr("convert.preparing.choose", lambda *_, **__: pytest.fail("bits were chosen"))
    for number, recipe in enumerate((saved, tmp_path / "a")):
        dest, again = tmp_path / f"b{number}", tmp_path / f"again{number}.toml"
        to_mlx(sibling, dest, recipe=recipe, calibrate=text, dtype="bfloat16", save_recipe=again)
        written, wanted = (json.loads((f / "config.json").read_text()) for f in (dest, tmp_path / "a"))
        assert written["quantization"] == wanted["quantization"]
        shapes, same = (
            {name: (a.shape, a.dtype) for name, a in mx.load(str(f / "model.safetensors")).items()}  # type: ignore[union-attr]
            for f in (dest, tmp_path / "a")
        )
        assert shapes == same
        assert again.read_text().partition("bits =")[1:] == saved.read_text().partition("bits =")[1:]
        assert f"recipe={recipe.name};" in again.read_text()
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b0", "b1")]
    assert files[1] == files[2] != files[0]


def test_a_checkpoint_of_any_mode_is_a_recipe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'mode = "mxfp4"\n[layers]\n"*.v_proj" = { mode = "affine", bits = 6, group_size = 32 }\n'
        '"model.layers.1.*" = { mode = "mxfp8" }\nlm_head = "none"\n"*.3.mlp.up_proj" = "none"\n'
    )
    to_mlx(tiny_checkpoint, tmp_path / "one", recipe=recipe)
    to_mlx(tiny_checkpoint, tmp_path / "other", recipe=str(tmp_path / "one"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert main(["convert", str(tiny_checkpoint), str(tmp_path / "third"), "--recipe", str(tmp_path / "one"),
                 "--no-card"]) == 0  # fmt: skip
    assert (tmp_path / "third" / "config.json").read_bytes() == (
        tmp_path / "one" / "config.json"
    ).read_bytes()


def test_what_a_checkpoints_group_size_leaves_out_is_told_again(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    one = to_mlx(tiny_checkpoint, tmp_path / "one", bits=4)
    assert one.left_out == to_mlx(tiny_checkpoint, tmp_path / "other", recipe=tmp_path / "one").left_out != ()


def config_only(folder: Path, quantization: dict[str, Any] | None, **changes: Any) -> Path:
    """A checkpoint's folder whose weights are not there."""
    folder.mkdir()
    config = {**WIDE, **changes} | ({} if quantization is None else {"quantization": quantization})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mlx_lms_config_is_a_recipe(tmp_path: Path) -> None:
    entry = {
        "group_size": 64,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 6},
        "model.layers.0.mlp.down_proj": False,
        "model.layers.1.self_attn.q_proj": True,
        "model.layers.9.self_attn.q_proj": False,  # nothing that the model has
    }
    model = Olmo3(Olmo3Config.from_dict(WIDE))
    layers = dict(Recipe(Quantization(4, 64)).plan(model).layers)
    layers["model.embed_tokens"] = Quantization(6, 32)
    del layers["model.layers.0.mlp.down_proj"]
    assert named(config_only(tmp_path / "a", entry)).plan(model) == Plan(layers)


def test_what_a_config_does_not_say_is_read_off_the_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('group_size = 32\n[layers]\n"*.up_proj" = "none"\n')
    to_mlx(tiny_checkpoint, tmp_path / "one", recipe=recipe)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {"group_size": 32, "bits": 4}
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    model = Olmo3(Olmo3Config.from_dict({**TINY, "vocab_size": 8192}))
    assert named(tmp_path / "one").plan(model) == from_file(recipe).plan(model)


def test_a_recipe_of_another_depth_is_refused(tmp_path: Path) -> None:
    usual = {"group_size": 64, "bits": 4}
    model = Olmo3(Olmo3Config.from_dict(WIDE))
    for layers in (2, 6):
        recipe = named(config_only(tmp_path / str(layers), usual, num_hidden_layers=layers))
        with pytest.raises(
            ConvertError, match=rf"another shape: it has {layers} blocks, this model 4, and mo"
        ):
            recipe.plan(model)
    tied = named(config_only(tmp_path / "tied", usual, tie_word_embeddings=True))
    with pytest.raises(ConvertError, match="and lm_head is in one of them only"):
        tied.plan(model)
    plan = Plan({"model.layers.5.mlp.up_proj": FOUR, "lm_head": Quantization(8, 32)})
    recipe = recipe_of(plan, inputs(Olmo3(Olmo3Config.from_dict({**WIDE, "num_hidden_layers": 6}))))
    with pytest.raises(ConvertError, match=r"'model\.layers\.\d\..*' fits no layer: .* has 4 blocks, from 0"):
        recipe.plan(model)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (None, OptionError, "is a checkpoint that is not quantized: expected one that is, or a TOML file"),
        ({"group_size": 64, "bits": 7}, ConfigError, "bits must be one of"),
        ({"quant_method": "gptq", "bits": 4}, ConfigError, "expected MLX's own quantization"),
    ],
)
def test_a_folder_that_is_no_recipe_is_refused_before_any_work(
    tmp_path: Path, entry: dict[str, Any] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ConvertOptions(recipe=config_only(tmp_path / "folder", entry))


def test_a_recipe_is_no_option_of_a_cast() -> None:
    with pytest.raises(OptionError, match=r"nothing is quantized, .*: give bits, or leave out save_recipe$"):
        ConvertOptions(bits=None, save_recipe="recipe.toml")


def test_a_file_that_is_there_is_refused_before_the_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "there": "there exists already: choose another file to save the recipe in, or remove it$",
        "link": "link exists already",
        "tiny": "tiny exists already",
        "none/recipe.toml": "there is no folder .*none$",
        "dest": "where the result is to be",
    }.items():
        with pytest.raises(ConvertError, match=message):
            to_mlx(tiny_checkpoint, tmp_path / "dest", save_recipe=tmp_path / name)
    with pytest.raises(ConvertError, match=r"cannot be saved as ~nosuchuser/x \("):
        to_mlx(tiny_checkpoint, tmp_path / "dest", save_recipe="~nosuchuser/x")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.saved_recipe.os.access", lambda *_: False)
    with pytest.raises(ConvertError, match=r"recipe\.toml: .* cannot be written$"):
        to_mlx(tiny_checkpoint, tmp_path / "dest", save_recipe=tmp_path / "recipe.toml")
    assert not list(tmp_path.glob("*dest*"))


def test_a_run_that_goes_on_takes_the_recipe_that_it_saved_and_no_other(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    saved, dest = tmp_path / "recipe.toml", tmp_path / "dest"
    with pytest.raises(KeyboardInterrupt):
        to_mlx(tiny_checkpoint, dest, bits=3, save_recipe=saved, **Told("converting", 3).callbacks)
    text = saved.read_text()
    assert "bits = 3" in text
    with pytest.raises(ConvertError, match="exists already"):
        to_mlx(tiny_checkpoint, dest, bits=3, save_recipe=saved)
    saved.write_text("mine")
    with pytest.raises(ConvertError, match="exists already"):
        to_mlx(tiny_checkpoint, dest, bits=3, save_recipe=saved, resume=True)
    saved.write_text(text.replace("bits = 3", "bits = 5"))
    with pytest.raises(
        ConvertError, match=r"another recipe is there; move it away, then go on with resume=T"
    ):
        to_mlx(tiny_checkpoint, dest, bits=3, save_recipe=saved, resume=True)
    inside = tmp_path / ".dest.unfinished" / "recipe.toml"
    with pytest.raises(ConvertError, match="where the result is to be"):
        to_mlx(tiny_checkpoint, dest, bits=3, save_recipe=inside, resume=True)
    saved.write_text(text)
    to_mlx(tiny_checkpoint, dest, bits=3, save_recipe=saved, resume=True)
    assert saved.read_text() == text
    assert from_file(saved) == Recipe(Quantization(3, 64))


def test_a_recipe_that_the_disk_does_not_take_leaves_what_was_measured(
    tmp_path: Path, few_tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = even_checkpoint(tmp_path / "source", random_model(EVEN).tensors())
    text, saved = tmp_path / "text.txt", tmp_path / "recipe.toml"
    text.write_text("".join(WORDS.format(7 * i, i * i) for i in range(50)))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("convert.preparing.choose", four_bits)
        patch.setattr("convert.saved_recipe.replace_file", full)
        message = r"dest: the recipe .*toml: No space left on device; make room, then go on with resume=True"
        with pytest.raises(ConvertError, match=message):
            to_mlx(source, tmp_path / "dest", calibrate=text, save_recipe=saved)
    journal = (tmp_path / ".dest.unfinished" / "journal.jsonl").read_text()
    assert '{"costs": ' in journal
    assert not saved.exists()


def test_a_saved_recipe_may_be_read_by_whom_other_files_may(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    to_mlx(tiny_checkpoint, tmp_path / "dest", save_recipe=tmp_path / "recipe.toml")
    assert (tmp_path / "recipe.toml").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert not list(tmp_path.glob(".unfinished*"))


def test_the_command_line_saves_a_recipe(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(tiny_checkpoint), str(tmp_path / "dest"), "--no-card", "--recipe", "mixed_4_6"]
    assert main([*command, "--save-recipe", str(tmp_path / "recipe.toml")]) == 0
    assert "# Asked for: recipe=mixed_4_6; in all " in (tmp_path / "recipe.toml").read_text()
    shutil.rmtree(tmp_path / "dest")
    assert main([*command, "--save-recipe", str(tmp_path / "recipe.toml")]) == 1
    assert "recipe.toml exists already: choose another file" in capsys.readouterr().err
