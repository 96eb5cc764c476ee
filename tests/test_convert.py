"""Converting: the result is the same model in fewer bits, mlx-lm agrees with it, and whatever happens
its name only ever stands for a complete checkpoint.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, Told, kill_until_there, random_model, save_checkpoint

import convert.writer.layout
from convert import convert as to_mlx
from convert.card.verdict import verdict
from olmo3_mlx import Olmo3, load
from olmo3_mlx.cli import main
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import CheckpointError, ConfigError, ConvertError, OptionError
from olmo3_mlx.generation.loop import decode, prefill

Tensors = dict[str, mx.array]
Damage = Callable[[Tensors], Any]

# TINY with inputs that 64 divides, and a vocabulary for the demo's tokenizer, which mlx-lm loads too.
EVEN: dict[str, Any] = {
    **TINY,
    "vocab_size": 8192,
    "intermediate_size": 128,
    "eos_token_id": [8190, 8188],
    "dtype": "bfloat16",
}
EVEN_WEIGHTS = 2 * 8192 * 64 + 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)  # in matrices
EVEN_NORMS = 4 * (3 * 64 + 32) + 64
EMBEDDING = "model.embed_tokens.weight"
IDS = [(7 * i * i + 3 * i) % 8192 for i in range(40)]
TOKENS = mx.array([IDS])


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """So that results can be compared bit for bit and in float32."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def even() -> Tensors:
    """The tensors of EVEN, in bfloat16 as checkpoints come."""
    return {name: array.astype(mx.bfloat16) for name, array in random_model(EVEN).tensors().items()}


@pytest.fixture
def source(tmp_path: Path, even: Tensors) -> Path:
    """EVEN as a checkpoint's folder, alone in its parent."""
    return save_checkpoint(tmp_path / "from" / "source", EVEN, even)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """A destination, with nothing beside it."""
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "dest"


def stored(folder: Path) -> Tensors:
    """All tensors in a folder's safetensors files."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = mx.load(str(file))
        assert isinstance(found, dict)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def assert_same_tensors(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array).item(), name


def largest_difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def assert_same_files(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        own = (expected / name).read_bytes()
        if name == "README.md":  # which has the model's name in it
            own = own.replace(expected.name.encode(), found.name.encode())
        assert (found / name).read_bytes() == own, name


def to_mlx_elsewhere(source: Path, dest: Path) -> Path:
    """The same conversion in one go."""
    whole = dest.parents[1] / "elsewhere" / "whole"
    to_mlx(source, whole)
    return whole


def in_float32(folder: Path) -> Olmo3:
    return load(folder, dtype="float32")[0]


# what comes out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_matrices_are_quantized_and_norms_stay(
    source: Path, dest: Path, even: Tensors, bits: int, group_size: int
) -> None:
    report = to_mlx(source, dest, bits=bits, group_size=group_size)
    expected: Tensors = {}
    for name, array in even.items():
        if "norm" in name:
            expected[name] = array
            continue
        path = name.removesuffix(".weight")
        parts = mx.quantize(array, group_size=group_size, bits=bits)
        expected |= dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=True))
    assert_same_tensors(stored(dest), expected)
    block = {"group_size": group_size, "bits": bits, "mode": "affine"}
    assert config_of(dest) == {**EVEN, "quantization": block, "quantization_config": block}
    assert report.left_out == ()


@pytest.mark.parametrize(("bits", "group_size", "per_weight"), [(4, 64, 4.5), (8, 64, 8.5), (4, 32, 5.0)])
def test_the_report_counts_what_the_files_hold(
    source: Path, dest: Path, bits: int, group_size: int, per_weight: float
) -> None:
    report = to_mlx(source, dest, bits=bits, group_size=group_size)
    assert report.parameters == EVEN_WEIGHTS + EVEN_NORMS
    assert report.source_bytes == sum(array.nbytes for array in stored(source).values())
    assert report.source_bytes == 2 * report.parameters
    assert report.bytes == sum(array.nbytes for array in stored(dest).values())
    whole = (EVEN_WEIGHTS * per_weight + EVEN_NORMS * 16) / (EVEN_WEIGHTS + EVEN_NORMS)
    assert report.bits_per_weight == pytest.approx(whole, rel=1e-12)
    assert report.seconds > 0
    assert json.loads((dest / "model.safetensors.index.json").read_text())["metadata"] == {
        "total_size": report.bytes,
        "total_parameters": report.parameters,
    }


def test_a_dtype_alone_only_casts(source: Path, dest: Path, even: Tensors) -> None:
    report = to_mlx(source, dest, bits=None, dtype="float32")
    assert_same_tensors(stored(dest), {name: array.astype(mx.float32) for name, array in even.items()})
    assert config_of(dest) == {**EVEN, "dtype": "float32"}
    assert report.bits_per_weight == 32
    assert largest_difference(in_float32(dest)(TOKENS), in_float32(source)(TOKENS)) == 0


def test_a_dtype_with_bits_casts_norms_and_scales(source: Path, dest: Path, even: Tensors) -> None:
    to_mlx(source, dest, bits=4, dtype="float16")
    tensors = stored(dest)
    assert {array.dtype for array in tensors.values()} == {mx.uint32, mx.float16}
    assert config_of(dest)["dtype"] == "float16"
    weight = even["lm_head.weight"].astype(mx.float16)
    parts = [tensors[f"lm_head.{part}"] for part in ("weight", "scales", "biases")]
    for found, expected in zip(parts, mx.quantize(weight, group_size=64, bits=4), strict=True):
        assert mx.array_equal(found, expected).item()


DTYPE_KEYS = ("dtype", "torch_dtype")


SAID = [*({key: "bfloat16"} for key in DTYPE_KEYS), dict.fromkeys(DTYPE_KEYS, "float32"), {"dtype": None}, {}]


@pytest.mark.parametrize("said", SAID, ids=str)
@pytest.mark.parametrize("options", [{"bits": None}, {"bits": 4}, {"dtype": "float16"}], ids=str)
def test_the_config_says_in_the_keys_of_the_source_which_dtype_the_tensors_have(
    tmp_path: Path, even: Tensors, said: dict[str, str | None], options: dict[str, Any]
) -> None:
    config = {k: v for k, v in EVEN.items() if k not in DTYPE_KEYS} | said
    for dtype in (mx.bfloat16, mx.float32):
        tensors = {name: array.astype(dtype) for name, array in even.items()}
        source, dest = (tmp_path / f"{kind} {dtype}" for kind in ("source", "dest"))
        to_mlx(save_checkpoint(source, config, tensors), dest, **options)
        (true,) = {array.dtype for array in stored(dest).values()} - {mx.uint32}
        result = {key: value for key, value in config_of(dest).items() if key in DTYPE_KEYS}
        assert result == dict.fromkeys(said or ("dtype",), str(true).rpartition(".")[2])


def test_of_several_dtypes_the_config_says_that_of_most_numbers(
    tmp_path: Path, dest: Path, even: Tensors
) -> None:
    mixed = {
        name: array.astype(mx.float32 if "norm" in name else mx.bfloat16) for name, array in even.items()
    }
    to_mlx(save_checkpoint(tmp_path / "source", {**EVEN, "dtype": "float32"}, mixed), dest, bits=None)
    assert config_of(dest)["dtype"] == "bfloat16"


def assert_the_config_says_what_the_files_hold(folder: Path) -> None:
    """What of a result's small files can contradict its tensors."""
    config, tensors = config_of(folder), stored(folder)
    scales = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    block = config.get("quantization", {})
    layers = {name.removesuffix(".weight") for name in tensors if tensors[name].ndim == 2} - {
        f"{path}.{part}" for path in scales for part in ("scales", "biases")
    }
    assert {path for path in layers if block.get(path, bool(block))} == scales
    for path in scales:
        scheme = block.get(path, block)
        codes, groups = tensors[f"{path}.weight"].shape[1] * 32, tensors[f"{path}.scales"].shape[1]
        assert codes == groups * scheme["group_size"] * scheme["bits"]
    assert config.get("quantization_config") == config.get("quantization")
    assert config.get("tie_word_embeddings", False) == ("lm_head.weight" not in tensors)
    assert config["vocab_size"] == tensors["model.embed_tokens.weight"].shape[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        None,
        'bits = 4\n[layers]\n"*.down_proj" = "none"\n"*.q_proj" = 8\n',
        'bits = 4\n[layers]\n"model.embed_tokens" = "none"\n',
    ],
    ids=["rounded alike", "some left out", "no embedding"],
)
def test_the_small_files_say_what_the_tensors_are(
    tmp_path: Path, dest: Path, tied: bool, recipe: str | None
) -> None:
    config = {**EVEN, "intermediate_size": 96, "tie_word_embeddings": tied}  # no group size divides that
    source = save_checkpoint(tmp_path / "source", config, random_model(config).tensors())
    if recipe is not None:
        (tmp_path / "recipe.toml").write_text(recipe)
    to_mlx(source, dest, recipe=tmp_path / "recipe.toml" if recipe else None)
    assert_the_config_says_what_the_files_hold(dest)
    assert config_of(dest)["quantization"]["model.layers.0.mlp.down_proj"] is False
    assert load(dest)[0].config.tie_word_embeddings == tied
    to_mlx(dest, dest.with_name("back"), bits=None, dtype="bfloat16")
    assert_the_config_says_what_the_files_hold(dest.with_name("back"))


def test_neither_bits_nor_dtype_copies_the_tensors(source: Path, dest: Path, even: Tensors) -> None:
    to_mlx(source, dest, bits=None)
    assert_same_tensors(stored(dest), even)
    assert config_of(dest) == EVEN


def test_the_small_files_come_along_and_nothing_else(source: Path, dest: Path) -> None:
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    (source / "special_tokens_map.json").write_text("{}")
    (source / "LICENSE").write_text("Apache License")
    (source / "README.md").write_text("A card for the original.")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    to_mlx(source, dest)
    copied = (
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "special_tokens_map.json", "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    )  # fmt: skip
    for name in copied:
        assert (dest / name).read_bytes() == (source / name).read_bytes(), name
    written = {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json"}
    found = {str(path.relative_to(dest)) for path in dest.rglob("*") if path.is_file()}
    assert found == {*copied, *written}


@pytest.mark.parametrize("own", [True, False])
def test_another_tokenizer_brings_no_generation_defaults_or_licence_of_its_own_if_the_source_has_them(
    source: Path, dest: Path, tmp_path: Path, own: bool
) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ 'another' }}")
    for folder, said in ((other, "other"), (source, "own"))[: 2 if own else 1]:
        (folder / "generation_config.json").write_text(json.dumps({"note": said}))
        (folder / "LICENSE.txt").write_text(said)
    to_mlx(source, dest, tokenizer=other)
    assert (dest / "chat_template.jinja").read_text() == "{{ 'another' }}"
    assert json.loads((dest / "generation_config.json").read_text()) == {"note": "own" if own else "other"}
    assert (dest / "LICENSE.txt").exists() == own  # the tokenizer's is not the model's


def test_the_source_stays_as_it_was(source: Path, dest: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    to_mlx(source, dest)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_each_stage_is_told_from_its_beginning_to_its_end(source: Path, dest: Path) -> None:
    told = Told()
    report = to_mlx(source, dest, card=True, **told.callbacks)
    assert told.titles == ["converting", "reading back", "measuring"]
    told.assert_each_stage_went_to_its_end()
    assert [moves[0][0] for moves in told.moves.values()] == [0, 0, 0]
    assert [moves[-1][0] for moves in told.moves.values()] == [
        report.bytes,
        report.bytes,
        2 * report.parameters,
    ]


def test_missing_parents_of_the_destination_are_made(source: Path, tmp_path: Path) -> None:
    to_mlx(source, tmp_path / "a" / "b" / "dest")
    assert in_float32(tmp_path / "a" / "b" / "dest")(TOKENS).shape == (1, 40, 8192)


def test_the_destination_has_the_permissions_that_the_umask_leaves(source: Path, dest: Path) -> None:
    before = os.umask(0o027)
    try:
        to_mlx(source, dest)
        assert os.umask(0o027) == 0o027  # and the conversion left it alone
    finally:
        os.umask(before)
    assert stat.S_IMODE(dest.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in dest.iterdir()} == {0o640}


# several files


def test_a_large_result_is_written_in_shards_with_an_index(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dest.with_name("whole")
    to_mlx(source, whole)
    monkeypatch.setattr(convert.writer.layout, "SHARD_BYTES", 30_000)
    report = to_mlx(source, dest)
    files = sorted(path.name for path in dest.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((dest / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes
    holds = {name: mx.load(str(dest / name)) for name in files}
    assert {name: file for file, tensors in holds.items() for name in tensors} == index["weight_map"]
    for tensors in holds.values():
        assert isinstance(tensors, dict)
        layers = {name.rpartition(".")[0] for name in tensors}
        assert len(layers) == 1 or sum(array.nbytes for array in tensors.values()) <= 30_000
    assert_same_tensors(stored(dest), stored(whole))
    assert largest_difference(in_float32(dest)(TOKENS), in_float32(whole)(TOKENS)) == 0


def test_a_sharded_source_becomes_one_file(lab: Path, dest: Path) -> None:
    report = to_mlx(lab, dest)
    assert (lab / "model-00002-of-00002.safetensors").is_file()
    assert [path.name for path in dest.glob("*.safetensors")] == ["model.safetensors"]
    index = json.loads((dest / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert index["weight_map"].keys() == stored(dest).keys()
    assert report.source_bytes == sum(array.nbytes for array in stored(lab).values())


# quality


def test_eight_bits_stay_near_the_original_and_nearer_than_four(lab: Path, tmp_path: Path) -> None:
    original, tokenizer = load(lab, dtype="float32")
    text = "Olmo 3 7B has 32 layers. Three of four attend over a sliding window of 4096 tokens."
    tokens = mx.array([tokenizer.encode(text)])
    expected = original(tokens)
    differences = {}
    for bits in (4, 8):
        to_mlx(lab, tmp_path / str(bits), bits=bits)
        differences[bits] = largest_difference(in_float32(tmp_path / str(bits))(tokens), expected)
    assert differences[8] < 0.06
    assert differences[4] < 0.6
    assert differences[8] < differences[4] / 4


# mlx-lm


class InFloat32:
    """An embedding, which in the floating-point modes gives bfloat16 whatever the model's dtype."""

    def __init__(self, embedding: Any) -> None:
        self.embedding = embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        vectors: mx.array = self.embedding(tokens)
        return vectors.astype(mx.float32)

    def as_linear(self, hidden: mx.array) -> mx.array:
        logits: mx.array = self.embedding.as_linear(hidden)
        return logits


def mlx_lm_model(folder: Path) -> Any:
    """mlx-lm's own model of a folder, in float32."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    model.model.embed_tokens = InFloat32(model.model.embed_tokens)
    return model


def mlx_lm_convert(source: Path, dest: Path, **options: Any) -> None:
    import mlx_lm

    mlx_lm.convert(str(source), str(dest), quantize=True, **options)


def greedy(model: Olmo3, prompt: list[int], count: int) -> list[int]:
    caches = model.make_caches(rewind=1)
    logits = prefill(model, prompt, caches)
    return list(decode(model, logits, caches, lambda logits: mx.argmax(logits, axis=-1), count))


def greedy_in_mlx_lm(model: Any, prompt: list[int], count: int) -> list[int]:
    from mlx_lm.generate import generate_step

    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def test_interop_mlx_lm_runs_the_result_with_the_same_ids(lab: Path, dest: Path) -> None:
    bits, group_size = (8, 32) if lab.name.endswith("gqa") else (4, 64)
    to_mlx(lab, dest, bits=bits, group_size=group_size)
    ours, theirs = in_float32(dest), mlx_lm_model(dest)
    prompt = IDS * 4  # 160 tokens, more than the window of 128
    ids = greedy(ours, prompt, 30)
    assert len(set(ids)) > 5
    assert ids == greedy_in_mlx_lm(theirs, prompt, 30)


@pytest.mark.parametrize("size", [{}, {"q_bits": 8, "q_group_size": 32}], ids=["4 bits", "8 bits"])
def test_interop_mlx_lm_converts_to_the_same_bits(
    source: Path, dest: Path, size: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = dest.with_name("theirs")
    mlx_lm_convert(source, theirs, **size)
    report = to_mlx(source, dest, bits=size.get("q_bits", 4), group_size=size.get("q_group_size", 64))
    assert_same_tensors(stored(dest), stored(theirs))
    assert config_of(dest)["quantization"] == config_of(theirs)["quantization"]
    assert f"{report.bits_per_weight:.3f} bits per weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"q_bits": 8},
        {"quant_predicate": "mixed_4_6"},
        {"q_mode": "mxfp4"},
        {"q_mode": "nvfp4"},
        {"q_mode": "mxfp8"},
    ],
    ids=["8 bits", "mixed 4 and 6 bits", "mxfp4", "nvfp4", "mxfp8"],
)
def test_interop_what_mlx_lm_converts_is_loaded_here_with_the_same_logits(
    source: Path, dest: Path, options: dict[str, Any]
) -> None:
    mlx_lm_convert(source, dest, **options)
    theirs = mlx_lm_model(dest)(TOKENS)
    assert largest_difference(in_float32(dest)(TOKENS), theirs) < 1e-4


def test_interop_a_tied_model_is_converted_without_a_head(tmp_path: Path, dest: Path) -> None:
    config = {**EVEN, "tie_word_embeddings": True}
    to_mlx(save_checkpoint(tmp_path / "tied", config, random_model(config).tensors()), dest, bits=8)
    names = stored(dest)
    assert not [name for name in names if name.startswith("lm_head")]
    assert "model.embed_tokens.scales" in names
    assert largest_difference(in_float32(dest)(TOKENS), mlx_lm_model(dest)(TOKENS)) < 1e-4


NEWER_ROPE: dict[str, dict[str, Any]] = {
    "flat": {"rope_parameters": {**EVEN["rope_scaling"], "rope_theta": 10000.0}},
    "flat, theta at the top": {"rope_theta": 10000.0, "rope_parameters": EVEN["rope_scaling"]},
    "per layer type": {
        "rope_parameters": {
            "full_attention": {**EVEN["rope_scaling"], "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
}


def with_newer_rope(rope: dict[str, Any]) -> dict[str, Any]:
    older = ("rope_theta", "rope_scaling")
    return {key: value for key, value in EVEN.items() if key not in older} | rope


@pytest.mark.parametrize("rope", NEWER_ROPE.values(), ids=NEWER_ROPE.keys())
def test_interop_a_newer_rope_block_comes_out_as_mlx_lm_reads_it(
    tmp_path: Path, dest: Path, even: Tensors, rope: dict[str, Any]
) -> None:
    newer = save_checkpoint(tmp_path / "newer", with_newer_rope(rope), even)
    to_mlx(newer, dest, bits=8)
    config = config_of(dest)
    assert "rope_parameters" not in config
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"].items() >= EVEN["rope_scaling"].items()
    ours, original = in_float32(dest), in_float32(newer)
    assert ours.config.rope == original.config.rope
    assert largest_difference(ours(TOKENS), mlx_lm_model(dest)(TOKENS)) < 1e-4


def test_a_newer_rope_block_without_scaling_comes_out_without(
    tmp_path: Path, dest: Path, even: Tensors
) -> None:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    to_mlx(save_checkpoint(tmp_path / "newer", with_newer_rope(plain), even), dest)
    config = config_of(dest)
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    assert "rope_parameters" not in config


def test_a_rope_block_that_the_older_keys_cannot_say_is_kept(
    tmp_path: Path, dest: Path, even: Tensors
) -> None:
    parameters = {
        "full_attention": {**EVEN["rope_scaling"], "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    newer = save_checkpoint(tmp_path / "newer", with_newer_rope({"rope_parameters": parameters}), even)
    to_mlx(newer, dest)
    assert config_of(dest)["rope_parameters"] == parameters
    assert in_float32(dest).config.rope == in_float32(newer).config.rope


# what is refused


def beside(dest: Path) -> list[str]:
    """What lies where the destination would, hidden files too."""
    return sorted(os.listdir(dest.parent))  # noqa: PTH208  (names are what is compared)


def test_a_group_size_that_divides_no_layer_is_refused(tmp_path: Path, dest: Path) -> None:
    odd = {**TINY, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = save_checkpoint(tmp_path / "odd", odd, random_model(odd).tensors())
    with pytest.raises(ConvertError, match=r"group size 64 divides the inputs of no layer \(48, 96\)"):
        to_mlx(source, dest, group_size=64)
    assert beside(dest) == []


def test_layers_that_the_group_size_does_not_divide_are_left_out_and_named(
    tmp_path: Path, dest: Path, tiny: Olmo3
) -> None:
    source = save_checkpoint(tmp_path / "tiny", TINY, tiny.tensors())
    report = to_mlx(source, dest, group_size=64)
    downs = tuple(f"model.layers.{i}.mlp.down_proj" for i in range(4))
    assert report.left_out == downs
    tensors = stored(dest)
    assert all(tensors[f"{path}.weight"].dtype == mx.float32 for path in downs)
    assert tensors["lm_head.weight"].dtype == mx.uint32
    tokens = mx.array([[5, 3, 8, 1, 127, 0]])
    assert in_float32(dest)(tokens).shape == (1, 6, 128)
    theirs = mlx_lm_model(dest)(tokens)
    assert largest_difference(in_float32(dest)(tokens), theirs) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [4, None], ids=["quantized", "cast"])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, dest: Path, even: Tensors, value: float, bits: int | None
) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    broken = mx.array(even[name])
    broken[5, 7] = value
    source = save_checkpoint(tmp_path / "broken", EVEN, {**even, name: broken})
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.down_proj\.weight"):
        to_mlx(source, dest, bits=bits)
    assert beside(dest) == []


def test_weights_too_large_for_float16_are_refused_by_name(tmp_path: Path, dest: Path, even: Tensors) -> None:
    name = "model.layers.1.self_attn.q_norm.weight"
    source = save_checkpoint(tmp_path / "large", EVEN, {**even, name: 1e5 * even[name]})
    with pytest.raises((CheckpointError, ConvertError), match=r"model\.layers\.1\.self_attn\.q_norm\.weight"):
        to_mlx(source, dest, bits=None, dtype="float16")
    assert beside(dest) == []


def make_file(dest: Path) -> None:
    dest.write_text("mine")


def make_dangling_link(dest: Path) -> None:
    dest.symlink_to("nowhere")


@pytest.mark.parametrize(
    "occupy",
    [Path.mkdir, make_file, make_dangling_link],
    ids=["a folder", "a file", "a link that leads nowhere"],
)
def test_a_destination_that_exists_is_refused_and_left_alone(
    source: Path, dest: Path, occupy: Callable[[Path], Any]
) -> None:
    occupy(dest)
    before = dest.lstat()
    with pytest.raises(ConvertError, match="exists already"):
        to_mlx(source, dest)
    assert beside(dest) == ["dest"]
    assert (dest.lstat().st_ino, dest.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_destination_that_appears_meanwhile_is_left_alone(source: Path, dest: Path) -> None:
    def occupy(done: int, total: int) -> None:
        dest.mkdir(exist_ok=True)
        (dest / "precious").write_text("mine")

    with pytest.raises(
        ConvertError, match="has appeared meanwhile; move it away, then go on with resume=True"
    ):
        to_mlx(source, dest, progress=occupy)
    assert [path.name for path in dest.iterdir()] == ["precious"]
    dest.rename(dest.with_name("away"))
    to_mlx(source, dest, resume=True)
    assert beside(dest) == ["away", "dest"]
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


def test_a_quantized_source_is_refused(source: Path, dest: Path) -> None:
    with pytest.raises(ConvertError, match=r"is quantized already \(4 bits, affine\).*convert the original"):
        to_mlx("demo", dest)
    assert beside(dest) == []


def test_a_quantized_source_is_not_quantized_again_though_its_config_does_not_say_that_it_is(
    source: Path, dest: Path
) -> None:
    packed = dest.with_name("packed")
    to_mlx(source, packed)
    shutil.copy(source / "config.json", packed / "config.json")
    with pytest.raises(ConvertError, match=r"is quantized already \(4 bits, affine\)"):
        to_mlx(packed, dest)
    assert beside(dest) == ["packed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits must be one of .*not 7"),
        ({"bits": 0}, "bits must be one of .*not 0"),
        ({"group_size": 48}, "group_size must be one of .*not 48"),
        ({"dtype": "int8"}, "dtype must be one of .*not 'int8'"),
    ],
)
def test_options_that_do_not_exist_are_refused(
    source: Path, dest: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        to_mlx(source, dest, **options)
    assert beside(dest) == []


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError),
        (lambda f: (f / "config.json").write_text("{"), ConfigError),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError),
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), CheckpointError),
        (
            lambda f: (f / "config.json").write_text(json.dumps({**EVEN, "vocab_size": 8000})),
            CheckpointError,
        ),
    ],
    ids=["no config", "garbage for a config", "no weights", "damaged weights", "misshapen weights"],
)
def test_a_source_that_cannot_be_run_is_not_converted(
    source: Path, dest: Path, damage: Callable[[Path], Any], error: type[Exception]
) -> None:
    damage(source)
    with pytest.raises(error):
        to_mlx(source, dest)
    assert beside(dest) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["lm_head.weight"].update(data_offsets=[-100, 20]),
        lambda header: header["lm_head.weight"].update(data_offsets=[1]),
        lambda header: header["lm_head.weight"].update(shape=[8192.0, 64.0]),
        lambda header: header["lm_head.weight"].update(data_offsets=header[EMBEDDING]["data_offsets"]),
        lambda header: header["lm_head.weight"].pop("dtype"),
        lambda header: header.update({"lm_head.weight": 5}),
        lambda header: header["lm_head.weight"].update(shape=None),
        lambda header: header["lm_head.weight"].update(data_offsets={"begin": 0}),
    ],
    ids=[
        "before the data",
        "one offset",
        "no whole numbers",
        "on another tensor",
        "no dtype",
        "a number",
        "no shape",
        "offsets by name",
    ],
)
def test_a_header_that_cannot_be_is_refused(source: Path, dest: Path, change: Callable[[Any], Any]) -> None:
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    said = (
        r"model\.safetensors: damaged or cut short, fetch it again \((lm_head|model\.embed_tokens)\.weight "
    )
    with pytest.raises(CheckpointError, match=said):
        to_mlx(source, dest)
    assert beside(dest) == []


def test_a_header_that_was_padded_with_zeros_is_read(source: Path, dest: Path) -> None:
    """As MLX reads it; the format itself pads with spaces."""
    file = source / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    file.write_bytes(
        (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + bytes(8) + data[8 + length :]
    )
    to_mlx(source, dest)


def test_an_index_that_promises_what_no_file_holds_is_refused(source: Path, dest: Path) -> None:
    names = dict.fromkeys([*stored(source), "model.extra.weight"], "model.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"promises tensors that no file holds: model\.extra\.weight"):
        to_mlx(source, dest)


def test_a_card_that_cannot_be_written_costs_nothing(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, write: Callable[[Path], object]) -> Path:
        if path.name == "quality-kl.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(path, write)

    monkeypatch.setattr("convert.card.quality_card.replace_file", full)
    monkeypatch.setattr("convert.preparing._TOKENS", 64)
    report = to_mlx(source, dest, card=True)
    assert str(report.no_card) == "quality-kl.png could not be written: No space left on device"
    assert report.quality is not None
    assert_same_files(dest, to_mlx_elsewhere(source, dest))
    again = dest.with_name("again")
    assert main(["convert", str(source), str(again), "--tokenizer", "demo"]) == 0
    said = capsys.readouterr()
    assert f"quality: {verdict(report.quality)} (" in said.out
    assert "see QUALITY.md" not in said.out
    command = f"`olmo3 compare {source} {again} --card {again} --tokenizer {again}` makes one"
    assert f"no quality card: {report.no_card} ({command})\n" in said.err
    assert ".unfinished" not in said.err


def test_a_failed_conversion_leaves_no_parents_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        to_mlx(tmp_path / "no" / "such" / "source", tmp_path / "a" / "b" / "dest")
    assert list(tmp_path.iterdir()) == []


# what goes wrong on the way


def test_a_destination_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConvertError, match=r"cannot write to .*file"):
        to_mlx(source, tmp_path / "file" / "dest")
    with pytest.raises(ConvertError, match=r"cannot write to .*deeper"):
        to_mlx(source, tmp_path / "file" / "deeper" / "dest")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_room_is_refused_before_the_work(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Usage = namedtuple("Usage", ["total", "used", "free"])  # as shutil.disk_usage gives it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**5, 10**5))
    seen: list[int] = []
    with pytest.raises(ConvertError, match=r"needs 0\.\d\d MB, the disk of .* has 0\.10 MB left"):
        to_mlx(source, dest, progress=lambda done, total: seen.append(done))
    assert seen == []
    assert beside(dest) == []


def test_after_a_disk_that_filled_up_the_work_goes_on(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"could not write .*dest: No space left on device; make room, then go on with resume=True"
    with monkeypatch.context() as patch, pytest.raises(ConvertError, match=message):
        patch.setattr("convert.conversion.write_model_card", full)
        to_mlx(source, dest)
    assert beside(dest) == [".dest.unfinished"]
    told = Told()
    to_mlx(source, dest, resume=True, **told.callbacks)
    assert told.titles == ["checking what is there", "converting", "reading back"]
    told.assert_each_stage_went_to_its_end()
    assert len(told.moves["converting"]) == 1  # all weights were there
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


# What happens to a process on its own: a real limit on a file's size, a real signal.
SCRIPT = """
import os, resource, signal, sys
import convert.writer.layout
from convert import convert as to_mlx
from olmo3_mlx.errors import ConvertError

convert.writer.layout.SHARD_BYTES = 30_000
source, dest, way = sys.argv[1:]
count = 0

def struck(done, total):
    global count
    count += 1
    if count == 20:
        os.kill(os.getpid(), signal.SIGKILL if way == "kill" else signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
if way == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    to_mlx(source, dest, **({} if way == "limit" else {"progress": struck}))
except ConvertError as error:
    sys.exit(str(error))
"""


def run_script(source: Path, dest: Path, way: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(dest), way],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_file_that_cannot_grow_is_said_in_one_line(source: Path, dest: Path) -> None:
    done = run_script(source, dest, "limit")
    assert done.returncode == 1
    assert re.match(r"could not write .*dest: File too large; go on with resume=True", done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("way", ["interrupt", "kill"])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(
    source: Path, dest: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = signal.SIGINT if way == "interrupt" else signal.SIGKILL
    assert run_script(source, dest, way).returncode == -stopped
    assert beside(dest) == [".dest.unfinished"]
    monkeypatch.setattr(convert.writer.layout, "SHARD_BYTES", 30_000)
    with pytest.raises(ConvertError, match=r"an unfinished conversion to .* go on with resume=True"):
        to_mlx(source, dest)
    (dest.parent / ".dest.unfinished" / ".unfinished-x.png").write_bytes(b"of a card")
    told = Told()
    to_mlx(source, dest, resume=True, **told.callbacks)
    assert len(told.moves["converting"]) < len(stored(source)) - 10  # and not from the beginning
    told.assert_each_stage_went_to_its_end()
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


@pytest.mark.slow
def test_killed_at_twenty_random_moments_and_resumed_it_always_gives_the_same_bytes(
    lab: Path, dest: Path
) -> None:
    whole = to_mlx_elsewhere(lab, dest)
    moments, kills = random.Random(lab.name), 0
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "convert", lab, whole.with_name("timed"), "--no-card"], check=True)
    longest = 1.2 * (time.perf_counter() - begin)
    while kills < 20:
        shutil.rmtree(dest, ignore_errors=True)
        command = [sys.executable, "-m", "convert", str(lab), str(dest), "--resume", "--no-card"]
        kills += kill_until_there(dest, command, lambda: moments.uniform(0, longest))
        if (dest / "journal.jsonl").exists():  # killed right after the folder got its name
            with pytest.raises(ConvertError, match="exists already and is complete"):
                to_mlx(lab, dest, resume=True)
        assert_same_files(dest, whole)


@pytest.mark.parametrize("damage", ["a changed byte", "a cut file", "a cut journal", "no weights"])
def test_what_a_stopped_conversion_left_is_not_trusted(
    source: Path, dest: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script(source, dest, "kill").returncode == -signal.SIGKILL
    monkeypatch.setattr(convert.writer.layout, "SHARD_BYTES", 30_000)
    left = dest.parent / ".dest.unfinished"
    first = min(left.glob("model-*.safetensors"))
    data = first.read_bytes()
    journal = left / "journal.jsonl"
    if damage == "a changed byte":
        middle = len(data) // 2
        first.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "a cut file":
        first.write_bytes(data[: len(data) // 2])
    elif damage == "a cut journal":
        journal.write_bytes(journal.read_bytes()[:-20])
    else:
        first.unlink()
    to_mlx(source, dest, resume=True)
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


def test_another_conversion_does_not_go_on_with_what_one_left(source: Path, dest: Path) -> None:
    assert run_script(source, dest, "kill").returncode == -signal.SIGKILL
    before = sorted(path.read_bytes() for path in (dest.parent / ".dest.unfinished").iterdir())
    message = (
        r"is another one \(it was begun with bits=4, not bits=8 and dtype='float16'\): finish it as it was"
    )
    with pytest.raises(ConvertError, match=message):
        to_mlx(source, dest, bits=8, dtype="float16", resume=True)
    assert sorted(path.read_bytes() for path in (dest.parent / ".dest.unfinished").iterdir()) == before


def test_what_an_earlier_version_wrote_of_the_options_is_told_as_it_is(source: Path, dest: Path) -> None:
    assert run_script(source, dest, "kill").returncode == -signal.SIGKILL
    journal = dest.parent / ".dest.unfinished" / "journal.jsonl"
    first, *records = journal.read_text().splitlines(keepends=True)
    older = json.dumps({**json.loads(first), "options": "--bits=4"}) + "\n"
    journal.write_text("".join([older, *records]))
    with pytest.raises(ConvertError, match=r"\(it was begun with --bits=4, not bits=8\): "):
        to_mlx(source, dest, bits=8, resume=True)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConvertError, match=r"another one \(SOURCE is another or has changed\): "):
        to_mlx(source, dest, resume=True)


def test_a_conversion_does_not_go_on_with_another_tokenizer(
    source: Path, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script(source, dest, "kill").returncode == -signal.SIGKILL
    monkeypatch.setattr(convert.writer.layout, "SHARD_BYTES", 30_000)
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ 'another' }}")
    message = r"is another one \(it was begun with bits=4, not bits=4 and tokenizer=.*other'\): "
    with pytest.raises(ConvertError, match=message):
        to_mlx(source, dest, tokenizer=tmp_path / "other", resume=True)


def test_resume_without_anything_to_go_on_with_begins(source: Path, dest: Path) -> None:
    to_mlx(source, dest, resume=True)
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


def test_what_lies_in_an_unfinished_folder_without_a_journal_does_not_get_into_the_result(
    source: Path, dest: Path
) -> None:
    left = dest.parent / ".dest.unfinished"
    (left / "shards").mkdir(parents=True)
    for name in ("QUALITY.md", "model-00002-of-00002.safetensors", "shards/model.safetensors", "lock"):
        (left / name).write_text("stale")
    to_mlx(source, dest)
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


def test_a_card_that_was_written_before_a_stop_does_not_get_into_a_result_without_one(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 64)
    stop_at("convert.conversion.write_model_card", monkeypatch, lambda: to_mlx(source, dest, card=True))
    assert (dest.parent / ".dest.unfinished" / "QUALITY.md").exists()
    to_mlx(source, dest, card=False, resume=True)
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


class Killed(BaseException):
    """Ends the work where it strikes, as far as that can be had without ending the tests."""


def stop_at(what: str, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    """Let `work` be ended by what it calls at `what`."""

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(what, killed)
        work()


@pytest.mark.parametrize("step", ["pathlib.Path.chmod", "pathlib.Path.rename"])
def test_stopped_before_the_folder_gets_its_name_nothing_is_done_again(
    source: Path, dest: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(step, monkeypatch, lambda: to_mlx(source, dest))
    assert beside(dest) == [".dest.unfinished"]
    told = Told()
    to_mlx(source, dest, resume=True, **told.callbacks)
    assert len(told.moves["converting"]) == 1
    assert_same_files(dest, to_mlx_elsewhere(source, dest))


def test_stopped_after_the_folder_got_its_name_it_is_complete_and_is_tidied_by_the_next_call(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at("convert.writer.folder._remove_work", monkeypatch, lambda: to_mlx(source, dest))
    assert beside(dest) == ["dest"]
    assert in_float32(dest)(TOKENS).shape == (1, 40, 8192)
    with pytest.raises(ConvertError, match="exists already and is complete"):
        to_mlx(source, dest, resume=True)
    assert_same_files(dest, to_mlx_elsewhere(source, dest))
    with pytest.raises(ConvertError, match="exists already"):
        to_mlx(source, dest, resume=True)


def test_files_of_others_in_a_destination_that_exists_stay(source: Path, dest: Path) -> None:
    dest.mkdir()
    (dest / "journal.jsonl").write_text('{"mine": 1}\n')
    (dest / "lock").write_text("mine")
    with pytest.raises(ConvertError, match="exists already"):
        to_mlx(source, dest)
    assert sorted(path.name for path in dest.iterdir()) == ["journal.jsonl", "lock"]


def test_two_conversions_to_one_destination_are_not_made_at_once(source: Path, dest: Path) -> None:
    def again(done: int, total: int) -> None:
        for resume in (True, False):
            with pytest.raises(ConvertError, match="another process is converting to"):
                to_mlx(source, dest, resume=resume)

    to_mlx(source, dest, progress=again)
    assert in_float32(dest)(TOKENS).shape == (1, 40, 8192)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_a_source_that_changes_under_the_run_is_noticed(source: Path, dest: Path, changed: str) -> None:
    def change(done: int, total: int) -> None:
        if done > total // 2:
            os.utime(source / changed, ns=(1, 1))

    with pytest.raises(ConvertError, match=rf"{changed} has changed during the conversion"):
        to_mlx(source, dest, progress=change)
    assert beside(dest) == []


def test_a_source_that_changed_before_resuming_is_noticed(source: Path, dest: Path) -> None:
    assert run_script(source, dest, "kill").returncode == -signal.SIGKILL
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(ConvertError, match=r"is another one \(SOURCE is another or has changed\): "):
        to_mlx(source, dest, resume=True)


def test_a_disk_that_does_not_keep_what_was_written_is_noticed(
    source: Path, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(path: Path) -> None:
        if path.suffix == ".safetensors":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr("convert.writer.output.flush", flip)
    with pytest.raises(ConvertError, match=r"what was read back differs from what was written, in lm_head"):
        to_mlx(source, dest)
    assert beside(dest) == []


@pytest.fixture(scope="module")
def almost_done(even: Tensors, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and what becomes of it; beside that `.dest.unfinished`, which lacks nothing but its name."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path_factory.mktemp("almost_done")
    source = save_checkpoint(folder / "from" / "source", EVEN, even)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConvertError, match="go on with resume=True"):
        patch.setattr("convert.conversion.write_model_card", full)
        to_mlx(source, folder / "dest")
    return source, to_mlx_elsewhere(source, folder / "dest").rename(folder / "whole")


RECORD = {"weight": "model.norm.weight", "sums": {"model.norm.weight": "0" * 64}}


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        json.dumps({"weight": "model.norm.weight"}),
        json.dumps({"sums": {}}),
        json.dumps({**RECORD, "weight": ["model.norm.weight"]}),
        json.dumps({**RECORD, "weight": None}),
        json.dumps({**RECORD, "sums": ["model.norm.weight"]}),
        json.dumps({**RECORD, "sums": {"model.norm.weight": 5}}),
        json.dumps({**RECORD, "sums": {}}),
        json.dumps({**RECORD, "sums": {"no.such.tensor": "0" * 64}}),
        json.dumps({**RECORD, "weight": "no.such.weight"}),
        json.dumps({"weight": "no.such.weight", "sums": {}}),
        "[" * 100_000,
        "9" * 5000,
        "null",
    ],
    ids=range(14),
)
@pytest.mark.parametrize("place", ["first", "second", "last"])
def test_a_journal_with_a_line_that_it_never_wrote_costs_work_at_worst(
    almost_done: tuple[Path, Path], dest: Path, line: str, place: str
) -> None:
    source, whole = almost_done
    shutil.copytree(whole.parent / ".dest.unfinished", dest.parent / ".dest.unfinished")
    journal = dest.parent / ".dest.unfinished" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    at = {"first": 0, "second": 1, "last": len(lines)}[place]
    journal.write_text("\n".join([*lines[:at], line, *lines[at:]]) + "\n")
    try:
        to_mlx(source, dest, resume=True)
    except ConvertError as error:  # an object that may be what another conversion began with
        assert "is another one" in str(error)
        assert (place, line[0]) == ("first", "{")
        return
    assert_same_files(dest, whole)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/dest", "~nosuchuser/dest is no place to write to"),
        ("made/" + "x" * 250, "File name too long .*: choose a shorter one"),
        ("made/" + "x" * 300, "File name too long .*: choose a shorter one"),
        ("made/" + "x" * 300 + "/dest", "File name too long .*: choose a shorter one"),
        ("made/a\0b", "cannot write to .*: embedded null byte"),
    ],
    ids=["no such user", "almost too long", "too long", "a long parent", "null"],
)
def test_a_destination_that_cannot_be_is_refused_and_nothing_is_left(
    source: Path, dest: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dest.parent)
    with pytest.raises(ConvertError, match=message):
        to_mlx(source, name)
    assert beside(dest) == []


def test_a_destination_in_the_home_folder_is_uploaded_from_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[Path] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(convert.converting, "check_login", lambda repo: None)
    monkeypatch.setattr(convert.converting, "upload", lambda folder, repo, stage: uploaded.append(folder))
    to_mlx(source, "~/mlx", upload_to="you/mlx")
    assert uploaded == [tmp_path / "mlx"]
    assert (tmp_path / "mlx" / "config.json").is_file()
