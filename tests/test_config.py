"""config.json and generation_config.json: every published form is read, whatever is not understood is
refused by name.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from olmo3_mlx import Checkpoint
from olmo3_mlx.config import FULL, SLIDING, GenerationConfig, Olmo3Config, RopeConfig
from olmo3_mlx.errors import ConfigError, Olmo3Error
from olmo3_mlx.quantization import Quantization, QuantizationConfig

# The released 7B's config.json, RoPE left out: that is what the shapes below differ in.
BASE: dict[str, Any] = {
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "vocab_size": 100278,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
    "eos_token_id": 100257,
    "dtype": "bfloat16",
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.2079441541679836,
}
RELEASED: dict[str, Any] = {**BASE, "rope_theta": 500000, "rope_scaling": YARN}

PLAIN_ROPE = RopeConfig(theta=500000.0)
YARN_ROPE = RopeConfig(
    theta=500000.0,
    rope_type="yarn",
    factor=8.0,
    original_max_position_embeddings=8192,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=1.2079441541679836,
    truncate=True,
)


def without(data: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def read(**changes: Any) -> Olmo3Config:
    """The released config with some keys changed."""
    return Olmo3Config.from_dict({**RELEASED, **changes})


def refusal(data: Mapping[str, Any]) -> str:
    """The message with which a config is refused: one line that opens with the file's name."""
    with pytest.raises(ConfigError) as caught:
        Olmo3Config.from_dict(data)
    message = str(caught.value)
    assert message.startswith("config.json")
    assert "\n" not in message
    return message


ROPE_SHAPES: dict[str, dict[str, Any]] = {
    "transformers 4": {"rope_theta": 500000, "rope_scaling": YARN},
    "5.0 to 5.12, flat": {"rope_parameters": {**YARN, "rope_theta": 500000}},
    "5.0.0.dev0, flat and theta at the top": {
        "rope_theta": 500000,
        "rope_parameters": {**YARN, "rope_theta": 500000.0},
    },
    "flat, theta at the top only": {"rope_theta": 500000, "rope_parameters": YARN},
    "5.13, per layer type": {
        "rope_parameters": {
            FULL: {**YARN, "rope_theta": 500000},
            SLIDING: {"rope_type": "default", "rope_theta": 500000},
        }
    },
    "5.13, theta at the top only": {
        "rope_theta": 500000,
        "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default"}},
    },
    "type for rope_type": {
        "rope_theta": 500000,
        "rope_scaling": {"type": "yarn", **without(YARN, "rope_type")},
    },
    "whole numbers for the betas": {
        "rope_theta": 500000,
        "rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1, "factor": 8},
    },
    "attention_factor left out": {"rope_theta": 500000, "rope_scaling": without(YARN, "attention_factor")},
    "attention_factor null": {"rope_theta": 500000, "rope_scaling": {**YARN, "attention_factor": None}},
    "betas left out": {"rope_theta": 500000, "rope_scaling": without(YARN, "beta_fast", "beta_slow")},
    "older keys null beside the newer": {
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {**YARN, "rope_theta": 500000},
    },
}


@pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES.keys())
def test_every_shape_of_the_rope_block_means_yarn_on_full_layers_only(shape: dict[str, Any]) -> None:
    config = Olmo3Config.from_dict({**BASE, **shape})
    assert dict(config.rope) == {SLIDING: PLAIN_ROPE, FULL: YARN_ROPE}


PLAIN_SHAPES: dict[str, dict[str, Any]] = {
    "null scaling": {"rope_theta": 500000, "rope_scaling": None},
    "no scaling": {"rope_theta": 500000},
    "flat": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
    "flat without a type": {"rope_parameters": {"rope_theta": 500000}},
    "per layer type": {
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 500000},
            SLIDING: {"type": "default", "rope_theta": 500000},
        }
    },
    "flat and per layer type, of one mind": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000,
            FULL: {"rope_type": "default", "rope_theta": 500000},
            SLIDING: {"rope_type": "default", "rope_theta": 500000},
        }
    },
}


@pytest.mark.parametrize("shape", PLAIN_SHAPES.values(), ids=PLAIN_SHAPES.keys())
def test_every_shape_without_scaling_means_plain_rope_everywhere(shape: dict[str, Any]) -> None:
    config = Olmo3Config.from_dict({**BASE, **shape, "max_position_embeddings": 8192})
    assert dict(config.rope) == {SLIDING: PLAIN_ROPE, FULL: PLAIN_ROPE}


NEWER: dict[str, Any] = {
    **without(RELEASED, "rope_theta", "rope_scaling"),
    "rope_parameters": {
        FULL: {**YARN, "rope_theta": 500000},
        SLIDING: {"rope_type": "default", "rope_theta": 500000},
    },
}


@pytest.mark.parametrize(
    ("older", "key", "kind"),
    [
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling", FULL),
        ({"rope_scaling": {**YARN, "factor": 4.0}}, "rope_scaling", FULL),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 4096}}, "rope_scaling", FULL),
        ({"rope_theta": 10000}, "rope_theta", FULL),
        ({"rope_theta": 10000, "rope_scaling": YARN}, "rope_theta", FULL),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_older_keys_that_say_something_else_than_the_newer_are_refused(
    older: dict[str, Any], key: str, kind: str, flat: bool
) -> None:
    newer = {**NEWER, "rope_parameters": {**YARN, "rope_theta": 500000}} if flat else NEWER
    message = refusal({**newer, **older})
    assert f"contradicts itself: {key} and rope_parameters differ for {kind}" in message


def test_yarn_on_sliding_layers_beside_older_keys_that_have_it_on_full_ones_is_refused() -> None:
    swapped = {FULL: {"rope_type": "default", "rope_theta": 5e5}, SLIDING: {**YARN, "rope_theta": 5e5}}
    message = refusal({**RELEASED, "rope_parameters": swapped})
    assert "rope_scaling and rope_parameters differ" in message


@pytest.mark.parametrize(
    "older",
    [{"rope_theta": 500000}, {"rope_scaling": YARN}, {"rope_theta": 500000.0, "rope_scaling": YARN}],
)
def test_older_keys_that_say_the_same_as_the_newer_are_taken(older: dict[str, Any]) -> None:
    assert Olmo3Config.from_dict({**NEWER, **older}) == Olmo3Config.from_dict(RELEASED)


def test_yarn_lost_by_saving_a_flat_file_again_is_refused() -> None:
    plain = {"rope_type": "default", "rope_theta": 500000}
    message = refusal({**BASE, "rope_parameters": {**YARN, **plain, **YARN, FULL: plain, SLIDING: plain}})
    assert "rope_parameters" in message
    assert "'yarn'" in message
    assert "'default'" in message


def test_layer_types_may_have_a_theta_each() -> None:
    parameters = {FULL: {**YARN, "rope_theta": 1e6}, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}
    config = Olmo3Config.from_dict({**BASE, "rope_parameters": parameters})
    assert config.rope[FULL].theta == 1e6
    assert config.rope[SLIDING] == RopeConfig(1e4)


def test_an_attention_factor_that_is_given_wins_over_the_derived_one() -> None:
    assert read(rope_scaling={**YARN, "attention_factor": 1.0}).rope[FULL].attention_factor == 1.0


def test_the_derived_attention_factor_follows_the_scaling_factor() -> None:
    rope = read(rope_scaling={**without(YARN, "attention_factor"), "factor": 4.0}).rope[FULL]
    assert rope.attention_factor == pytest.approx(1.1386294361119891, abs=1e-15)


def test_truncate_false_is_kept() -> None:
    assert read(rope_scaling={**YARN, "truncate": False}).rope[FULL].truncate is False


def test_yarn_without_an_original_length_starts_from_the_context() -> None:
    config = read(rope_scaling=without(YARN, "original_max_position_embeddings"))
    assert config.rope[FULL].original_max_position_embeddings == 65536


BAD_ROPE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown type": ({"rope_scaling": {**YARN, "rope_type": "llama3"}}, ("rope_type", '"yarn"', "'llama3'")),
    "unknown older type": (
        {"rope_scaling": {**without(YARN, "rope_type"), "type": "linear"}},
        ("rope_scaling: type", "'linear'"),
    ),
    "a type that is no name": ({"rope_scaling": {**YARN, "rope_type": ["yarn"]}}, ("rope_type", "['yarn']")),
    "unknown key": ({"rope_scaling": {**YARN, "mscale": 1.0}}, ("rope_scaling", "mscale")),
    "unknown key, per type": (
        {"rope_parameters": {FULL: {**YARN, "rope_theta": 1e4, "low_freq_factor": 1.0}, SLIDING: {}}},
        (FULL, "low_freq_factor"),
    ),
    "part of a head": (
        {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}},
        ("partial_rotary_factor", "0.5"),
    ),
    "no factor": ({"rope_scaling": without(YARN, "factor")}, ("rope_scaling: factor", "nothing")),
    "factor a text": ({"rope_scaling": {**YARN, "factor": "8"}}, ("factor", "a number", "'8'")),
    "factor below 1": ({"rope_scaling": {**YARN, "factor": 0.5}}, ("factor", "at least 1", "0.5")),
    "factor true": ({"rope_scaling": {**YARN, "factor": True}}, ("factor", "a number", "True")),
    "factor NaN": ({"rope_scaling": {**YARN, "factor": float("nan")}}, ("factor", "finite", "nan")),
    "original length a fraction": (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 8192.5}},
        ("original_max_position_embeddings", "whole number", "8192.5"),
    ),
    "truncate a number": ({"rope_scaling": {**YARN, "truncate": 1}}, ("truncate", "true or false", "1")),
    "theta zero": ({"rope_theta": 0}, ("rope_theta", "at least 1", "0")),
    "theta infinite": ({"rope_theta": float("inf")}, ("rope_theta", "finite", "inf")),
    "theta true": ({"rope_theta": True}, ("rope_theta", "a number", "True")),
    "no theta": ({"rope_theta": None}, ("rope_theta", "there")),
    "scaling a text": ({"rope_scaling": "yarn"}, ("rope_scaling", "an object", "'yarn'")),
    "flat without theta": ({"rope_theta": None, "rope_parameters": YARN}, ("rope_parameters: rope_theta",)),
    "only one of both layer types": (
        {"rope_parameters": {FULL: {**YARN, "rope_theta": 500000}}},
        (SLIDING, "an object", "nothing"),
    ),
    "a layer type that is no object": (
        {"rope_parameters": {FULL: "yarn", SLIDING: {"rope_theta": 500000}}},
        (FULL, "an object", "'yarn'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD_ROPE.values(), ids=BAD_ROPE.keys())
def test_a_rope_block_that_is_not_understood_is_refused_by_name(
    changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refusal({**RELEASED, **changes})
    for word in words:
        assert word in message


def test_the_released_7b_is_read_whole() -> None:
    assert read() == Olmo3Config(
        vocab_size=100278,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        layer_types=(SLIDING, SLIDING, SLIDING, FULL) * 8,
        sliding_window=4096,
        rope={SLIDING: PLAIN_ROPE, FULL: YARN_ROPE},
        rms_norm_eps=1e-6,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        eos_token_ids=(100257,),
        quantization=None,
    )


def test_the_released_32b_has_five_query_heads_to_a_key_value_head() -> None:
    config = read(
        hidden_size=5120, intermediate_size=27648, num_attention_heads=40, num_key_value_heads=8,
        num_hidden_layers=64, layer_types=[SLIDING, SLIDING, SLIDING, FULL] * 16,
    )  # fmt: skip
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (40, 8, 128)


def test_head_dim_is_derived_where_it_is_absent_or_null_and_honoured_where_it_is_given() -> None:
    assert read(head_dim=None).head_dim == 128
    assert read(head_dim=64).head_dim == 64


def test_a_given_head_dim_makes_up_for_heads_that_do_not_divide() -> None:
    config = read(num_attention_heads=24, num_key_value_heads=24, head_dim=96)
    assert (config.num_attention_heads, config.head_dim) == (24, 96)


def test_absent_key_value_heads_mean_multi_head() -> None:
    assert Olmo3Config.from_dict(without(RELEASED, "num_key_value_heads")).num_key_value_heads == 32


def test_absent_layer_types_make_every_fourth_layer_a_full_one() -> None:
    config = Olmo3Config.from_dict({**without(RELEASED, "layer_types"), "num_hidden_layers": 6})
    assert config.layer_types == (SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING)


def test_layers_may_all_be_full_and_then_need_no_window() -> None:
    config = read(num_hidden_layers=2, layer_types=[FULL, FULL], sliding_window=None)
    assert config.layer_types == (FULL, FULL)
    assert config.sliding_window == 0
    assert dict(config.rope) == {FULL: YARN_ROPE}


def test_layers_may_all_slide() -> None:
    config = read(num_hidden_layers=2, layer_types=[SLIDING, SLIDING])
    assert config.sliding_window == 4096
    assert dict(config.rope) == {SLIDING: PLAIN_ROPE}


def test_rope_per_layer_type_may_leave_out_a_type_that_does_not_occur() -> None:
    parameters = {FULL: {**YARN, "rope_theta": 500000}}
    config = Olmo3Config.from_dict(
        {**BASE, "num_hidden_layers": 1, "layer_types": [FULL], "rope_parameters": parameters}
    )
    assert dict(config.rope) == {FULL: YARN_ROPE}


def test_the_eos_token_may_be_one_several_null_or_absent() -> None:
    assert read(eos_token_id=7).eos_token_ids == (7,)
    assert read(eos_token_id=[9, 7]).eos_token_ids == (9, 7)
    assert read(eos_token_id=None).eos_token_ids == ()
    assert Olmo3Config.from_dict(without(RELEASED, "eos_token_id")).eos_token_ids == ()


def test_whole_numbers_written_as_floats_are_whole_numbers() -> None:
    config = read(vocab_size=100278.0)
    assert config.vocab_size == 100278
    assert isinstance(config.vocab_size, int)


def test_keys_that_do_not_change_the_numbers_are_ignored() -> None:
    assert (
        read(attention_dropout=0.1, use_cache=False, transformers_version="9", whatever={"a": []}) == read()
    )


BAD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another architecture": ({"model_type": "olmo2"}, ("model_type", '"olmo3"', "'olmo2'", "mlx-lm")),
    "the hybrid": ({"model_type": "olmo_hybrid"}, ("model_type", "'olmo_hybrid'")),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act", "'silu'", "'gelu'")),
    "attention bias": ({"attention_bias": True}, ("attention_bias", "False", "True")),
    "heads that do not divide": (
        {"num_attention_heads": 30, "num_key_value_heads": 30},
        ("num_attention_heads", "4096", "30"),
    ),
    "key-value heads that do not divide": ({"num_key_value_heads": 5}, ("num_key_value_heads", "32", "5")),
    "more key-value heads than heads": ({"num_key_value_heads": 64}, ("num_key_value_heads", "32", "64")),
    "odd head_dim": ({"head_dim": 127}, ("head dimension", "even", "127")),
    "odd derived head_dim": ({"hidden_size": 96}, ("head dimension", "even", "3")),
    "layer_types too short": ({"layer_types": [SLIDING, FULL]}, ("layer_types", "num_hidden_layers is 32")),
    "layer_types too long": ({"layer_types": [FULL] * 33}, ("layer_types", "num_hidden_layers is 32")),
    "layer_types a text": ({"layer_types": FULL}, ("layer_types", "a list", FULL)),
    "unknown layer type": (
        {"layer_types": [SLIDING] * 31 + ["full_atention"]},
        ("layer_types[31]", SLIDING, FULL, "'full_atention'"),
    ),
    "a layer type that is no name": ({"layer_types": [FULL] * 31 + [{}]}, ("layer_types[31]", "{}")),
    "window 0": ({"sliding_window": 0}, ("sliding_window", "at least 1", "0")),
    "window null": ({"sliding_window": None}, ("sliding_window", "None")),
    "window negative": ({"sliding_window": -1}, ("sliding_window", "at least 1", "-1")),
    "window true": ({"sliding_window": True}, ("sliding_window", "whole number", "True")),
    "context -1": ({"max_position_embeddings": -1}, ("max_position_embeddings", "-1", "65536", "8192")),
    "context 0": ({"max_position_embeddings": 0}, ("max_position_embeddings", "at least 1", "0")),
    "context null": ({"max_position_embeddings": None}, ("max_position_embeddings", "None")),
    "eps a text": ({"rms_norm_eps": "1e-6"}, ("rms_norm_eps", "a number", "'1e-6'")),
    "eps negative": ({"rms_norm_eps": -1e-6}, ("rms_norm_eps", "at least 1e-12", "-1e-06")),
    "eps true": ({"rms_norm_eps": True}, ("rms_norm_eps", "a number", "True")),
    "vocabulary false": ({"vocab_size": False}, ("vocab_size", "whole number", "False")),
    "vocabulary a list": ({"vocab_size": [100278]}, ("vocab_size", "whole number", "[100278]")),
    "hidden size a fraction": ({"hidden_size": 4096.5}, ("hidden_size", "whole number", "4096.5")),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers", "at least 1", "0")),
    "tied a number": ({"tie_word_embeddings": 1}, ("tie_word_embeddings", "true or false", "1")),
    "eos a text": ({"eos_token_id": "<|endoftext|>"}, ("eos_token_id", "token id", "endoftext")),
    "eos negative": ({"eos_token_id": [-1]}, ("eos_token_id", "token id", "-1")),
    "eos true": ({"eos_token_id": True}, ("eos_token_id", "token id", "True")),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD.keys())
def test_a_value_that_cannot_be_is_refused_with_its_key_and_what_was_expected(
    changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refusal({**RELEASED, **changes})
    for word in words:
        assert word in message


def test_a_number_that_no_float_can_hold_is_refused() -> None:
    assert "rms_norm_eps" in refusal({**RELEASED, "rms_norm_eps": 10**400})


@pytest.mark.parametrize(
    "key",
    [
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "sliding_window", "rms_norm_eps", "max_position_embeddings", "rope_theta",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(key: str) -> None:
    message = refusal(without(RELEASED, key))
    assert f"config.json: {key} must be " in message
    assert message.endswith("not nothing")


def test_errors_name_the_file_that_was_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**RELEASED, "vocab_size": 0}))
    with pytest.raises(ConfigError) as caught:
        Checkpoint.in_folder(tmp_path)
    assert str(caught.value).startswith(f"{path}: vocab_size")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"not json", b'"olmo3"', b'{"model_type": "\xff"}', b"[" * 100_000],
    ids=["empty", "cut short", "a list", "null", "prose", "a text", "not UTF-8", "too deep"],
)
def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="expected a JSON object") as caught:
        Checkpoint.in_folder(tmp_path)
    assert str(path) in str(caught.value)


def test_configs_are_frozen() -> None:
    for config, name in (
        (read(), "vocab_size"),
        (PLAIN_ROPE, "theta"),
        (GenerationConfig(), "temperature"),
        (Quantization(4, 64), "bits"),
        (QuantizationConfig(Quantization(4, 64)), "default"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 1)


def test_config_errors_belong_to_the_one_tree() -> None:
    assert issubclass(ConfigError, Olmo3Error)


# generation_config.json


def test_an_empty_generation_config_is_greedy() -> None:
    assert GenerationConfig.from_dict({}) == GenerationConfig(temperature=0.0, top_p=1.0, top_k=0)


def test_a_temperature_without_do_sample_asks_for_sampling() -> None:
    config = GenerationConfig.from_dict({"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 32768})
    assert (config.temperature, config.top_p, config.max_new_tokens) == (0.6, 0.95, 32768)


def test_a_top_p_alone_asks_for_sampling_at_temperature_1() -> None:
    config = GenerationConfig.from_dict({"top_p": 0.9})
    assert (config.temperature, config.top_p) == (1.0, 0.9)


def test_do_sample_true_alone_samples_at_temperature_1() -> None:
    config = GenerationConfig.from_dict({"do_sample": True})
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (1.0, 1.0, 0, 0.0)


def test_do_sample_true_takes_every_filter() -> None:
    config = GenerationConfig.from_dict(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1}
    )
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.7, 0.8, 20, 0.1)


def test_do_sample_false_is_greedy_whatever_else_is_there() -> None:
    config = GenerationConfig.from_dict({"do_sample": False, "temperature": 0.6, "top_p": 0.95, "top_k": 50})
    assert (config.temperature, config.top_p, config.top_k) == (0.0, 1.0, 0)


def test_do_sample_null_counts_as_absent() -> None:
    assert GenerationConfig.from_dict({"do_sample": None}).temperature == 0.0
    assert GenerationConfig.from_dict({"do_sample": None, "temperature": 0.6}).temperature == 0.6


def test_a_null_filter_filters_nothing() -> None:
    config = GenerationConfig.from_dict({"do_sample": True, "top_k": None, "top_p": None, "min_p": None})
    assert (config.top_k, config.top_p, config.min_p) == (0, 1.0, 0.0)


def test_a_repetition_penalty_counts_without_sampling_too() -> None:
    config = GenerationConfig.from_dict({"do_sample": False, "repetition_penalty": 1.1})
    assert config.repetition_penalty == 1.1


def test_end_tokens_of_both_files_are_joined_in_order_without_repeats() -> None:
    both = GenerationConfig.from_dict({"eos_token_id": [100265, 100257]}, eos_token_ids=(100257, 7))
    assert both.eos_token_ids == (100265, 100257, 7)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"eos_token_id": 100265}, (100265, 100257)),
        ({"eos_token_id": None}, (100257,)),
        ({}, (100257,)),
        ({"eos_token_id": []}, (100257,)),
        ({"eos_token_id": 0}, (0, 100257)),
    ],
    ids=["one", "null", "absent", "none", "id 0"],
)
def test_end_tokens_may_be_one_null_or_absent(data: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert GenerationConfig.from_dict(data, eos_token_ids=(100257,)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"do_sample": "yes"}, ("do_sample", "true or false", "'yes'")),
        ({"temperature": "hot"}, ("temperature", "a number", "'hot'")),
        ({"temperature": True}, ("temperature", "a number", "True")),
        ({"temperature": -0.5}, ("temperature", "at least 0", "-0.5")),
        ({"do_sample": True, "top_k": 2.5}, ("top_k", "whole number", "2.5")),
        ({"do_sample": True, "top_k": -1}, ("top_k", "at least 0", "-1")),
        ({"max_new_tokens": 0}, ("max_new_tokens", "at least 1", "0")),
        ({"eos_token_id": [1, "2"]}, ("eos_token_id", "token id", "'2'")),
        ({"repetition_penalty": []}, ("repetition_penalty", "a number", "[]")),
    ],
)
def test_a_bad_value_in_the_generation_config_is_named(data: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationConfig.from_dict(data)
    message = str(caught.value)
    assert message.startswith("generation_config.json: ")
    for word in words:
        assert word in message


# quantization

EIGHT_OVER_FOUR: dict[str, Any] = {
    "group_size": 64,
    "bits": 4,
    "mode": "affine",
    "lm_head": {"bits": 8, "group_size": 32},
    "model.embed_tokens": {"bits": 6},
    "model.layers.0.self_attn.q_proj": {"mode": "mxfp8"},
    "model.layers.0.self_attn.k_proj": False,
    "model.layers.0.self_attn.v_proj": True,
}


def quantization(block: Any) -> QuantizationConfig:
    found = read(quantization=block).quantization
    assert found is not None
    return found


def test_no_quantization_block_means_plain_weights() -> None:
    assert read().quantization is None
    assert read(quantization=None, quantization_config=None).quantization is None


def test_affine_is_the_mode_where_none_is_named() -> None:
    assert quantization({"group_size": 64, "bits": 4}).default == Quantization(4, 64, "affine")


def test_layers_may_differ_from_the_default_or_stay_plain() -> None:
    found = quantization(EIGHT_OVER_FOUR)
    assert found.default == Quantization(4, 64, "affine")
    assert found.of("model.layers.5.mlp.up_proj") == Quantization(4, 64, "affine")
    assert found.of("lm_head") == Quantization(8, 32, "affine")
    assert found.of("model.embed_tokens") == Quantization(6, 64, "affine")
    assert found.of("model.layers.0.self_attn.q_proj") == Quantization(8, 32, "mxfp8")
    assert found.of("model.layers.0.self_attn.k_proj") is None
    assert found.of("model.layers.0.self_attn.v_proj") == found.default


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
)
def test_the_floating_point_modes_have_one_size_given_or_not(mode: str, bits: int, group_size: int) -> None:
    expected = Quantization(bits, group_size, mode)
    assert quantization({"mode": mode}).default == expected
    assert quantization({"mode": mode, "bits": bits, "group_size": group_size}).default == expected


def test_quantization_config_alone_is_read() -> None:
    found = read(quantization_config={"group_size": 32, "bits": 8}).quantization
    assert found == QuantizationConfig(Quantization(8, 32, "affine"))


BAD_QUANTIZATION: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bits": ({"bits": 7, "group_size": 64}, ("bits", "affine", "7")),
    "bits of mxfp4": ({"mode": "mxfp4", "bits": 8}, ("bits", "mxfp4", "8")),
    "bits a text": ({"bits": "4", "group_size": 64}, ("bits", "whole number", "'4'")),
    "bits true": ({"bits": True, "group_size": 64}, ("bits", "whole number", "True")),
    "no bits": ({"group_size": 64}, ("bits",)),
    "group size": ({"bits": 4, "group_size": 48}, ("group_size", "32, 64, 128", "48")),
    "group size of nvfp4": ({"mode": "nvfp4", "group_size": 32}, ("group_size", "nvfp4", "32")),
    "no group size": ({"bits": 4}, ("group_size",)),
    "mode": ({"mode": "gguf", "bits": 4, "group_size": 64}, ("mode", "affine", "nvfp4", "'gguf'")),
    "mode a list": ({"mode": ["affine"], "bits": 4, "group_size": 64}, ("mode", "['affine']")),
    "a layer's bits": (
        {"bits": 4, "group_size": 64, "lm_head": {"bits": 9}},
        ("quantization: lm_head: bits", "9"),
    ),
    "a layer's mode without its group size": (
        {"bits": 4, "group_size": 64, "lm_head": {"mode": "nvfp4", "group_size": 64}},
        ("lm_head: group_size", "nvfp4", "64"),
    ),
    "not an object": (4, ("quantization", "an object", "4")),
}  # fmt: skip


@pytest.mark.parametrize(("block", "words"), BAD_QUANTIZATION.values(), ids=BAD_QUANTIZATION.keys())
def test_a_quantization_that_mlx_does_not_have_is_refused_by_name(block: Any, words: tuple[str, ...]) -> None:
    message = refusal({**RELEASED, "quantization": block})
    for word in words:
        assert word in message


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantization_by_others_is_refused_with_the_way_out(method: str) -> None:
    message = refusal({**RELEASED, "quantization_config": {"quant_method": method, "bits": 4}})
    assert "quantization_config" in message
    assert repr(method) in message
    assert "convert" in message
