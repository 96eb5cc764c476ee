"""Recipes: names and TOML files to a plan, and what cannot be, said in one line."""

from pathlib import Path

import pytest
from conftest import TINY

from convert.recipe import RECIPES, Recipe, from_file, named, uniform
from olmo3_mlx import ConfigError, ConvertError, Olmo3, Olmo3Config, OptionError
from olmo3_mlx.quantization import Quantization

EVEN = {**TINY, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model() -> Olmo3:
    return Olmo3(Olmo3Config.from_dict(EVEN))


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_one_way_for_all_covers_every_matrix_and_no_norm(model: Olmo3) -> None:
    plan = Recipe(uniform(4)).plan(model)
    assert set(plan.layers) == {n.removesuffix(".weight") for n, a in model.tensors().items() if a.ndim == 2}
    assert set(plan.layers.values()) == {Quantization(4, 64)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_gives_more_bits_to_values_and_outputs(model: Olmo3, name: str) -> None:
    plan = named(name).plan(model)
    few, more = (int(n) for n in name.split("_")[1:])
    for index in range(4):
        path = f"model.layers.{index}.self_attn"
        assert plan.layers[f"{path}.v_proj"].bits == plan.layers[f"{path}.o_proj"].bits == more
        assert plan.layers[f"{path}.q_proj"].bits == few
    assert plan.layers["lm_head"].bits == few


def test_the_last_pattern_that_fits_decides(model: Olmo3, tmp_path: Path) -> None:
    recipe = from_file(
        written(
            tmp_path,
            'bits = 3\ngroup_size = 32\n[layers]\n"*.mlp.*" = 5\n'
            '"*.down_proj" = { bits = 6, group_size = 64 }\n"model.layers.0.*" = 8\n'
            'lm_head = "none"\n"model.embed_tokens" = { mode = "mxfp4" }\n',
        )
    )
    plan = recipe.plan(model)
    assert plan.layers["model.layers.0.mlp.down_proj"] == Quantization(8, 32)
    assert plan.layers["model.layers.1.mlp.down_proj"] == Quantization(6, 64)
    assert plan.layers["model.layers.1.mlp.up_proj"] == Quantization(5, 32)
    assert plan.layers["model.layers.1.self_attn.q_proj"] == Quantization(3, 32)
    assert plan.layers["model.embed_tokens"] == Quantization(4, 32, "mxfp4")
    assert "lm_head" not in plan.layers


def test_an_empty_file_is_the_usual_four_bits(tmp_path: Path) -> None:
    assert from_file(written(tmp_path, "")) == Recipe(Quantization(4, 64))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bits = ", OptionError, "is not TOML"),
        ("bits = 7", ConfigError, "bits must be one of"),
        ('bits = "4"', ConfigError, "bits must be a whole number"),
        ("group_size = 48", ConfigError, "group_size must be one of"),
        ('mode = "int4"', ConfigError, "mode must be one of"),
        ("bitz = 4", ConfigError, "expected bits, group_size, mode and layers, got bitz"),
        ("layers = 4", ConfigError, "layers must be a table of patterns"),
        ('[layers]\n"*" = "some"', ConfigError, "expected bits, a table such as"),
        ('[layers]\n"*" = true', ConfigError, "expected bits, a table such as"),
        ('[layers]\n"*" = 4.5', ConfigError, "expected bits, a table such as"),
        ('[layers]\n"*" = 7', ConfigError, "bits must be one of"),
        ('[layers]\n"*" = { bits = 4, groups = 32 }', ConfigError, "expected bits, group_size and mode"),
    ],
)
def test_what_a_file_cannot_say_is_refused(
    tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_file(written(tmp_path, text))


def test_a_pattern_that_fits_nothing_is_refused(model: Olmo3, tmp_path: Path) -> None:
    recipe = from_file(written(tmp_path, '[layers]\n"*.norm" = 8\n'))
    with pytest.raises(ConvertError, match=r"pattern '\*\.norm' fits no layer: paths look like .*, lm_head"):
        recipe.plan(model)


def test_a_group_size_asked_for_by_name_must_divide(tmp_path: Path) -> None:
    recipe = from_file(written(tmp_path, 'group_size = 32\n[layers]\n"*.down_proj" = { group_size = 64 }\n'))
    with pytest.raises(
        ConvertError, match=r"group size 64 for model\.layers\.0\.mlp\.down_proj, .* 96 inputs"
    ):
        recipe.plan(Olmo3(Olmo3Config.from_dict(TINY)))


def test_a_name_that_is_no_recipe_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError,
        match=r"no recipe 'mixed_9': expected a file, .*'s folder, or one of mixed_3_5, mixed_4_5",
    ):
        named("mixed_9")
    with pytest.raises(OptionError, match="no recipe"):
        named(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="is not TOML"):
        from_file(path)


@pytest.mark.parametrize("patterns", ['"*" = "none"', '"model.*" = "none"\nlm_head = "none"'])
def test_a_recipe_that_quantizes_nothing_is_told_so(model: Olmo3, tmp_path: Path, patterns: str) -> None:
    recipe = from_file(written(tmp_path, f"bits = 4\n[layers]\n{patterns}\n"))
    with pytest.raises(ConvertError, match='quantizes nothing, its patterns say "none" of every layer'):
        recipe.plan(model)


def test_a_group_size_that_divides_none_of_the_layers_that_are_left_is_named(tmp_path: Path) -> None:
    heads = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    narrow = Olmo3(Olmo3Config.from_dict({**EVEN, **heads}))  # down_proj alone has 128 inputs
    recipe = from_file(written(tmp_path, '[layers]\n"*.down_proj" = "none"\n'))
    with pytest.raises(ConvertError, match=r"group size 64 divides the inputs of no layer \(96\)"):
        recipe.plan(narrow)


@pytest.mark.parametrize("name", ["~nosuchuser/recipe.toml", "x" * 300])
def test_a_file_name_that_cannot_be_is_no_recipe(name: str) -> None:
    with pytest.raises(OptionError, match="no recipe"):
        named(name)
