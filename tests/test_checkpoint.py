"""Loading: what Hugging Face and MLX write becomes the same model, and whatever is wrong with a
checkpoint is named in one line.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import TINY, random_model, save_checkpoint

from olmo3_mlx import Olmo3, Olmo3Config, load
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.errors import CheckpointError, ConfigError, Olmo3Error, OptionError, TokenizerError
from olmo3_mlx.quantization import MODES, Quantization

TOKENS = mx.array([[5, 3, 8, 1, 127, 0, 64, 9, 9, 33, 2, 71, 18, 90, 100, 41, 7, 7, 12, 55]])
Tensors = dict[str, mx.array]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """The rules for dtypes are the CPU backend's, whatever else this machine has."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def largest_difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return float(mx.abs(found - expected).max() / mx.abs(expected).max())


def same(found: mx.array, expected: mx.array) -> bool:
    return found.dtype == expected.dtype and bool(mx.array_equal(found, expected).item())


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None takes one out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of model.safetensors in place."""
    path = folder / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)  # before the file that they come from is overwritten
    change(tensors)
    mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})


def shard(folder: Path, count: int) -> list[Path]:
    """Split model.safetensors into several files with an index, as large checkpoints come."""
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    names = sorted(tensors)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = folder / f"model-{number + 1:05}-of-{count:05}.safetensors"
        mine = names[number::count]
        mx.save_safetensors(str(file), {name: tensors[name] for name in mine}, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file.name)
        files.append(file)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return files


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path, tiny: Olmo3) -> Path:
    """TINY as a checkpoint, for a test to do its worst with."""
    return save_checkpoint(tmp_path / "tiny", TINY, tiny.tensors())


# what is right


def test_a_single_file_gives_back_the_model_that_was_saved(folder: Path, tiny: Olmo3) -> None:
    model, tokenizer = load(folder)
    for name, array in tiny.tensors().items():
        assert same(model.tensors()[name], array), name
    assert largest_difference(model(TOKENS), tiny(TOKENS)) == 0
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_a_folder_may_be_a_text_or_a_path_with_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(str(folder))[0].config == load("~/tiny")[0].config


def test_shards_make_one_model(folder: Path, tiny: Olmo3) -> None:
    shard(folder, 3)
    model, _ = load(folder)
    assert largest_difference(model(TOKENS), tiny(TOKENS)) == 0


def test_files_that_the_index_does_not_name_are_left_alone(folder: Path, tiny: Olmo3) -> None:
    shard(folder, 2)
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    assert largest_difference(load(folder)[0](TOKENS), tiny(TOKENS)) == 0


def test_a_lab_checkpoint_loads_tensor_for_tensor(lab: Path) -> None:
    model, _ = load(lab)
    stored: Tensors = {}
    for file in sorted(lab.glob("*.safetensors")):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        stored |= tensors
    assert len(list(lab.glob("*.safetensors"))) == 2
    found = model.tensors()
    assert found.keys() == stored.keys()
    assert all(same(found[name], stored[name]) for name in stored)
    assert model.generation_config.eos_token_ids == (8190, 8188)
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.6, 0.95)


def test_the_demo_is_four_bits_computed_in_float32(demo: tuple[Olmo3, Any]) -> None:
    model, tokenizer = demo
    quantized = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding)]
    assert len(quantized) == 8 * 7 + 2
    assert {(m.bits, m.group_size) for m in quantized} == {(4, 64)}
    if mx.default_device().type == mx.DeviceType.cpu:
        assert model(mx.array([[1, 2]])).dtype == mx.float32
    assert tokenizer.vocab_size == model.config.vocab_size == 8192


def test_generation_defaults_are_read_with_the_end_tokens_of_both_files(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 0], "temperature": 0.6}')
    model, _ = load(folder)
    assert model.generation_config.eos_token_ids == (3, 0)
    assert model.generation_config.temperature == 0.6


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    config = {**TINY, "tie_word_embeddings": True}
    model = random_model(config)
    assert "lm_head.weight" not in model.tensors()
    loaded, _ = load(save_checkpoint(tmp_path / "tied", config, model.tensors()))
    assert largest_difference(loaded(TOKENS), model(TOKENS)) == 0
    # The same weights with the head written out are the same model.
    untied = {**model.tensors(), "lm_head.weight": model.tensors()["model.embed_tokens.weight"]}
    apart, _ = load(save_checkpoint(tmp_path / "untied", TINY, untied))
    assert largest_difference(loaded(TOKENS), apart(TOKENS)) < 1e-6


# quantized


def plain_tensors(model: Olmo3, config: Mapping[str, Any]) -> Tensors:
    """The tensors of a quantized model with every quantized weight multiplied out in float32."""
    default = {"mode": "affine", **config}
    tensors = dict(model.tensors())
    for path in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        how = {**default, **(config.get(path) or {})}
        tensors[f"{path}.weight"] = mx.dequantize(
            tensors[f"{path}.weight"],
            tensors.pop(f"{path}.scales"),
            tensors.pop(f"{path}.biases", None),
            group_size=how["group_size"],
            bits=how["bits"],
            mode=how["mode"],
        ).astype(mx.float32)
    return tensors


def quantized_model(config: Mapping[str, Any], tiny: Olmo3) -> Olmo3:
    """TINY quantized as the block `config` of a config.json says, by MLX itself."""
    model = Olmo3(Olmo3Config.from_dict(TINY))
    model.load_weights(list(tiny.tensors().items()))
    default = {key: config[key] for key in ("group_size", "bits", "mode") if key in config}

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or config.get(path) is False:
            return False
        return {**default, **(config.get(path) or {})}

    nn.quantize(model, class_predicate=how)
    mx.eval(model.parameters())
    return model


QUANTIZED: dict[str, dict[str, Any]] = {
    "4 bits": {"group_size": 32, "bits": 4},
    "8 bits": {"group_size": 32, "bits": 8, "mode": "affine"},
    "3 bits": {"group_size": 32, "bits": 3, "mode": "affine"},
    "layers that differ": {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"group_size": 64, "bits": 8},
        "model.embed_tokens": {"group_size": 64, "bits": 6, "mode": "affine"},
        "model.layers.1.mlp.down_proj": False,
        "model.layers.2.self_attn.v_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    },
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


@pytest.mark.parametrize("block", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_quantized_model_equals_the_one_with_its_weights_multiplied_out(
    tmp_path: Path, tiny: Olmo3, block: dict[str, Any]
) -> None:
    quantized = quantized_model(block, tiny)
    packed = save_checkpoint(tmp_path / "packed", {**TINY, "quantization": block}, quantized.tensors())
    plain = save_checkpoint(tmp_path / "plain", TINY, plain_tensors(quantized, block))
    found, expected = load(packed)[0], load(plain)[0]
    assert any(isinstance(m, nn.QuantizedLinear) for m in found.modules())
    assert found(TOKENS).dtype == mx.float32
    assert largest_difference(found(TOKENS), expected(TOKENS)) < 1e-4
    assert largest_difference(found(TOKENS), tiny(TOKENS)) > 1e-3  # quantizing did change something


def test_a_layer_without_scales_stays_plain_though_no_override_says_so(tmp_path: Path, tiny: Olmo3) -> None:
    written = {"group_size": 64, "bits": 4, "model.embed_tokens": False}  # 64 does not divide down_proj's 96
    downs = {f"model.layers.{i}.mlp.down_proj": False for i in range(4)}
    quantized = quantized_model({**written, **downs}, tiny)
    packed = save_checkpoint(tmp_path / "packed", {**TINY, "quantization": written}, quantized.tensors())
    model, _ = load(packed)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert largest_difference(model(TOKENS), quantized(TOKENS)) < 1e-5


def test_quantization_config_alone_is_enough(tmp_path: Path, tiny: Olmo3) -> None:
    block = {"group_size": 32, "bits": 4, "mode": "affine"}
    quantized = quantized_model(block, tiny)
    config = {**TINY, "quantization_config": block}
    model, _ = load(save_checkpoint(tmp_path / "packed", config, quantized.tensors()))
    assert largest_difference(model(TOKENS), quantized(TOKENS)) < 1e-5


# What config.json may leave out of a quantized checkpoint, or say wrongly for all layers: shapes say it.
SAID: dict[str, Any] = {
    "nothing": None,
    "an empty object": {},
    "bits alone": {"bits": 4},
    "a group size alone": {"group_size": 32},
    "nulls": {"bits": None, "group_size": None},
    "other bits": {"bits": 8, "group_size": 32},
    "another group size": {"bits": 4, "group_size": 64, "mode": "affine"},
    "one layer": {"lm_head": {"bits": 4, "group_size": 32}},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_shapes_say_what_config_json_leaves_out_of_a_quantization(
    tmp_path: Path, tiny: Olmo3, said: Any
) -> None:
    quantized = quantized_model({"bits": 4, "group_size": 32}, tiny)
    folder = save_checkpoint(tmp_path / "packed", {**TINY, "quantization": said}, quantized.tensors())
    checkpoint = Checkpoint.open(folder)
    assert largest_difference(checkpoint.load()(TOKENS), quantized(TOKENS)) < 1e-5
    assert checkpoint.config.quantization is not None  # what is refused for being quantized already
    assert checkpoint.config.quantization.of("model.layers.0.mlp.up_proj") == Quantization(4, 32)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_the_type_of_scales_says_the_mode(tmp_path: Path, tiny: Olmo3, mode: str) -> None:
    bits, groups = MODES[mode]
    quantized = quantized_model({"bits": bits[0], "group_size": groups[0], "mode": mode}, tiny)
    folder = save_checkpoint(tmp_path / "packed", TINY, quantized.tensors())
    assert largest_difference(load(folder)[0](TOKENS), quantized(TOKENS)) < 1e-5


def test_layers_of_different_bits_are_each_read_by_their_shapes(tmp_path: Path, tiny: Olmo3) -> None:
    entry = {"bits": 4, "group_size": 32, "lm_head": {"bits": 8, "group_size": 64}}
    quantized = quantized_model(entry, tiny)
    plain_entry = {"bits": 4, "group_size": 32}
    folder = save_checkpoint(tmp_path / "packed", {**TINY, "quantization": plain_entry}, quantized.tensors())
    assert largest_difference(load(folder)[0](TOKENS), quantized(TOKENS)) < 1e-5


@pytest.mark.parametrize("oddity", ["other bits", "an older index", "a shard without an index"])
def test_interop_mlx_lm_reads_the_same_model(tmp_path: Path, tiny: Olmo3, oddity: str) -> None:
    from mlx_lm.utils import load_model

    entry = {"bits": 4, "group_size": 32}
    quantized = quantized_model(entry, tiny)
    said = {**entry, "bits": 8} if oddity == "other bits" else entry
    folder = save_checkpoint(tmp_path / "packed", {**TINY, "quantization": said}, quantized.tensors())
    if oddity == "an older index":
        write_index(folder, dict.fromkeys(quantized.tensors(), "model-00001-of-00002.safetensors"))
    if oddity == "a shard without an index":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    theirs, _ = load_model(folder)
    assert largest_difference(load(folder)[0](TOKENS), theirs(TOKENS)) < 1e-4


# Files as other programs leave them


def test_a_single_file_counts_where_the_files_of_an_older_index_are_gone(folder: Path, tiny: Olmo3) -> None:
    write_index(folder, dict.fromkeys(tiny.tensors(), "model-00001-of-00002.safetensors"))
    assert largest_difference(load(folder)[0](TOKENS), tiny(TOKENS)) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_shards_that_are_all_there_need_no_index(folder: Path, tiny: Olmo3, count: int) -> None:
    shard(folder, count)
    (folder / "model.safetensors.index.json").unlink()
    assert largest_difference(load(folder)[0](TOKENS), tiny(TOKENS)) == 0


def test_without_an_index_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder, 3)[1].unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected model-00002-of-00003\.safetensors too"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content", "base"),
    [
        (
            "adapter_config.json",
            b'{"base_model_name_or_path": "allenai/Olmo-3-7B"}',
            " for allenai/Olmo-3-7B",
        ),
        ("adapter_config.json", b'{"model": "allenai/Olmo-3-7B", "fine_tune_type": "lora"}', " for allenai/"),
        ("adapter_config.json", b"{}", " adapter, not"),
        ("adapters.safetensors", b"", " adapter, not"),
        ("adapter_model.safetensors", b"", " adapter, not"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_called_one(
    tmp_path: Path, name: str, content: bytes, base: str, with_config: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(CheckpointError, match=f"is a LoRA adapter|{base}") as caught:
        load(tmp_path)
    assert base in str(caught.value)
    assert "merge it into its model" in str(caught.value)


def test_a_whole_model_with_an_adapter_beside_it_is_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    load(folder)


# dtypes


def floating_dtypes(model: Olmo3) -> set[mx.Dtype]:
    return {a.dtype for a in model.tensors().values() if mx.issubdtype(a.dtype, mx.floating)}


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(mx.bfloat16, mx.bfloat16), (mx.float32, mx.float32), (mx.float16, mx.float32)],
    ids=["bfloat16 stays", "float32 stays", "float16 becomes float32"],
)
def test_the_cpu_computes_plain_weights_in_a_dtype_that_it_is_fast_at(
    tmp_path: Path, tiny: Olmo3, stored: mx.Dtype, computed: mx.Dtype
) -> None:
    tensors = {name: array.astype(stored) for name, array in tiny.tensors().items()}
    model, _ = load(save_checkpoint(tmp_path / "tiny", TINY, tensors))
    assert floating_dtypes(model) == {computed}
    assert model(TOKENS).dtype == computed


@pytest.mark.parametrize("name", ["4 bits", "mxfp4"])
def test_the_cpu_computes_quantized_weights_in_float32(tmp_path: Path, tiny: Olmo3, name: str) -> None:
    quantized = quantized_model(QUANTIZED[name], tiny)
    quantized.set_dtype(mx.bfloat16)
    config = {**TINY, "quantization": QUANTIZED[name]}
    model, _ = load(save_checkpoint(tmp_path / "packed", config, quantized.tensors()))
    assert floating_dtypes(model) == {mx.float32}
    assert model(TOKENS).dtype == mx.float32


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16", mx.float32, mx.bfloat16])
def test_a_given_dtype_is_what_the_model_computes_in(folder: Path, given: str | mx.Dtype) -> None:
    model, _ = load(folder, dtype=given)
    expected = getattr(mx, given) if isinstance(given, str) else given
    assert floating_dtypes(model) == {expected}
    assert model(TOKENS).dtype == expected


def test_a_given_dtype_overrules_what_the_cpu_would_take(tmp_path: Path, tiny: Olmo3) -> None:
    quantized = quantized_model(QUANTIZED["4 bits"], tiny)
    config = {**TINY, "quantization": QUANTIZED["4 bits"]}
    model, _ = load(save_checkpoint(tmp_path / "packed", config, quantized.tensors()), dtype="bfloat16")
    assert model(TOKENS).dtype == mx.bfloat16


@pytest.mark.parametrize("given", ["int8", "bf16", "", "FLOAT32", mx.int32, mx.float64])
def test_a_dtype_that_no_model_computes_in_is_refused_before_any_work(given: str | mx.Dtype) -> None:
    with pytest.raises(OptionError, match="dtype must be one of bfloat16, float16, float32"):
        load("a folder that is not there", dtype=given)


def test_weights_too_large_for_the_given_dtype_are_refused_by_name(folder: Path) -> None:
    rewrite_tensors(folder, lambda t: t.update({"model.norm.weight": 1e5 * t["model.norm.weight"]}))
    assert load(folder)[0](TOKENS).dtype == mx.float32
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder, dtype="float16")


# what is wrong


def cut(name: str, keep: Callable[[bytes, int], bytes]) -> Callable[[Path], None]:
    """Cut a safetensors file short; `keep` gets its bytes and where its data begins."""

    def damage(folder: Path) -> None:
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(keep(data, 8 + int.from_bytes(data[:8], "little")))

    return damage


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder, change)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_config(folder, **changes)


def file(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def both(*damages: Callable[[Path], Any]) -> Callable[[Path], None]:
    def all_of_them(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return all_of_them


def sharded(damage: Callable[[Path, list[Path]], Any]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        damage(folder, shard(folder, 2))

    return both


def twice(folder: Path, files: list[Path]) -> None:
    """Put a tensor of the first shard into the second as well."""
    first, second = mx.load(str(files[0])), mx.load(str(files[1]))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    mx.eval(second)
    mx.save_safetensors(str(files[1]), {**second, "lm_head.weight": first["lm_head.weight"]})


def not_finite(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        flat = tensors[name].flatten()
        flat[-1] = value
        tensors[name] = flat.reshape(tensors[name].shape)

    return lambda folder: rewrite_tensors(folder, change)


def shape_of(name: str, array: mx.array) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder, lambda t: t.update({name: array}))


UP = "model.layers.2.mlp.up_proj.weight"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"
PACKED = {"group_size": 32, "bits": 4, "mode": "affine"}

WRONG: dict[str, tuple[Callable[[Path], Any], type[Olmo3Error], tuple[str, ...]]] = {
    "no config.json": (gone("config.json"), CheckpointError, ("config.json",)),
    "garbage in config.json": (file("config.json", b"{..."), ConfigError, ("tiny/config.json", "JSON")),
    "garbage in generation_config.json": (
        file("generation_config.json", b"[]"), ConfigError, ("tiny/generation_config.json", "JSON"),
    ),
    "another architecture": (
        config(model_type="llama"), ConfigError, ("tiny/config.json: model_type", "olmo3", "llama"),
    ),
    "no weights": (gone("model.safetensors"), CheckpointError, ("expected model.safetensors",)),
    "no tokenizer": (gone("tokenizer.json"), TokenizerError, ("tokenizer.json",)),
    "garbage in tokenizer.json": (file("tokenizer.json", b"{}"), TokenizerError, ("tiny/tokenizer.json",)),
    "garbage in tokenizer_config.json": (
        file("tokenizer_config.json", b"nope"), TokenizerError, ("tiny/tokenizer_config.json",),
    ),
    "an empty file": (file("model.safetensors", b""), CheckpointError, ("tiny/model.safetensors",)),
    "cut in the header": (
        cut("model.safetensors", lambda d, body: d[: body // 2]),
        CheckpointError,
        ("tiny/model.safetensors",),
    ),
    "cut before the body": (
        cut("model.safetensors", lambda d, body: d[:body]), CheckpointError, ("tiny/model.safetensors",),
    ),
    "cut in the body": (
        cut("model.safetensors", lambda d, _: d[: len(d) // 2]), CheckpointError, ("tiny/model.safetensors",),
    ),
    "its last byte gone": (
        cut("model.safetensors", lambda d, _: d[:-1]), CheckpointError, ("tiny/model.safetensors",),
    ),
    "a web page for weights": (
        file("model.safetensors", b"<html>" * 50), CheckpointError, ("tiny/model.safetensors",),
    ),
    "a missing tensor": (tensors(lambda t: t.pop(UP)), CheckpointError, ("lacks", UP)),
    "an extra tensor": (
        shape_of("model.layers.4.mlp.up_proj.weight", mx.zeros((96, 64))),
        CheckpointError,
        ("does not call for", "model.layers.4.mlp.up_proj.weight"),
    ),
    "a bias that Olmo 3 has not": (
        shape_of("model.layers.0.self_attn.q_proj.bias", mx.zeros((64,))),
        CheckpointError,
        ("does not call for", "model.layers.0.self_attn.q_proj.bias"),
    ),
    "a misshapen tensor": (shape_of(UP, mx.zeros((96, 63))), CheckpointError, (UP, "[96, 64]", "[96, 63]")),
    "a transposed tensor": (shape_of(UP, mx.zeros((64, 96))), CheckpointError, (UP, "[96, 64]", "[64, 96]")),
    "a tensor of the right size and another shape": (
        shape_of(Q_NORM, mx.ones((4, 16))), CheckpointError, (Q_NORM, "[64]", "[4, 16]"),
    ),
    "whole-number weights": (
        shape_of(UP, mx.zeros((96, 64), mx.int32)), CheckpointError, (UP, "F32", "I32"),
    ),
    "NaN": (not_finite(UP, float("nan")), CheckpointError, (UP, "NaN")),
    "an infinite weight": (not_finite(Q_NORM, float("inf")), CheckpointError, (Q_NORM, "infinite")),
    "a negative infinite weight": (
        not_finite("lm_head.weight", float("-inf")), CheckpointError, ("lm_head.weight", "infinite"),
    ),
    "a tied config with a head": (
        config(tie_word_embeddings=True), CheckpointError, ("does not call for", "lm_head.weight"),
    ),
    "an untied config without a head": (
        tensors(lambda t: t.pop("lm_head.weight")), CheckpointError, ("lacks", "lm_head.weight"),
    ),
    "a quantized config and plain weights": (
        config(quantization=PACKED), CheckpointError, ("says that the weights are quantized", "config.json"),
    ),
    "a missing shard": (
        sharded(lambda _, files: files[1].unlink()), CheckpointError, ("model-00002-of-00002.safetensors",),
    ),
    "a shard cut short": (
        sharded(lambda _, files: files[1].write_bytes(files[1].read_bytes()[:-9])),
        CheckpointError,
        ("tiny/model-00002-of-00002.safetensors",),
    ),
    "a tensor in two shards": (
        sharded(twice), CheckpointError, ("model-00002-of-00002.safetensors", "lm_head.weight"),
    ),
    "a shard that the index forgot": (
        sharded(lambda folder, files: write_index(folder, {"lm_head.weight": files[0].name})),
        CheckpointError,
        ("lacks", "and"),
    ),
    "an index without a map": (
        file("model.safetensors.index.json", b"{}"), CheckpointError, ("index.json", "weight_map"),
    ),
    "an index that is no JSON": (
        file("model.safetensors.index.json", b"<html>"), ConfigError, ("tiny/model.safetensors.", "JSON"),
    ),
    "an index that leads elsewhere": (
        file("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
        CheckpointError,
        ("index.json", "../model.safetensors"),
    ),
    "an index of numbers and names": (
        file("model.safetensors.index.json", b'{"weight_map": {"a": 1, "b": "model.safetensors"}}'),
        CheckpointError,
        ("index.json", "beside it", "got 1"),
    ),
    "an index of lists": (
        file("model.safetensors.index.json", b'{"weight_map": {"a": ["model.safetensors"]}}'),
        CheckpointError,
        ("index.json", "beside it", "got ['model.safetensors']"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "kind", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_checkpoint_is_named_in_one_line(
    folder: Path, damage: Callable[[Path], Any], kind: type[Olmo3Error], words: tuple[str, ...]
) -> None:
    damage(folder)
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    for word in words:
        assert word in message


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    def only_norms(tensors: Tensors) -> None:
        for name in [name for name in tensors if "norm" not in name]:
            del tensors[name]

    rewrite_tensors(folder, only_norms)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    found = re.fullmatch(r".*: lacks (lm_head\.weight, .+) and (\d+) more", str(caught.value))
    assert found
    assert len(found[1].split(", ")) + int(found[2]) == 4 * 7 + 2


def test_every_misshapen_tensor_is_named(folder: Path) -> None:
    rewrite_tensors(folder, lambda t: t.update({UP: mx.zeros((96, 63)), Q_NORM: mx.zeros((63,))}))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert UP in str(caught.value)
    assert Q_NORM in str(caught.value)


def test_a_renamed_tensor_is_named_both_ways(folder: Path) -> None:
    other = UP.replace("up_proj", "w3")
    rewrite_tensors(folder, lambda t: t.update({other: t.pop(UP)}))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert UP in str(caught.value)
    assert other in str(caught.value)


def test_weights_in_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors, found none.*not in safetensors"):
        load(folder)


WRONG_PACKED: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "other bits for one layer": (
        config(quantization={**PACKED, "lm_head": {"bits": 8}}), ("lm_head.weight", "[128, 16]", "[128, 8]"),
    ),
    "another group size for one layer": (
        config(quantization={**PACKED, "lm_head": {"group_size": 64}}), ("lm_head.", "[128, 1]", "[128, 2]"),
    ),
    "codes of no width": (
        both(config(quantization=None), shape_of("lm_head.weight", mx.zeros((128, 7), mx.uint32))),
        ("lm_head",),
    ),
    "scales of no width": (
        both(config(quantization=None), shape_of("lm_head.scales", mx.zeros((128, 3)))), ("lm_head",),
    ),
    "an override for a layer that is quantized": (
        config(quantization={**PACKED, "lm_head": False}),
        ("does not call for", "lm_head.biases", "lm_head.scales"),
    ),
    "scales missing": (tensors(lambda t: t.pop("lm_head.scales")), ("lm_head",)),
    "biases missing": (tensors(lambda t: t.pop("lm_head.biases")), ("lacks", "lm_head.biases")),
    "floating weights": (
        shape_of("lm_head.weight", mx.zeros((128, 8))), ("lm_head.weight", "uint32", "float32"),
    ),
    "NaN in the scales": (not_finite("lm_head.scales", float("nan")), ("lm_head.scales", "NaN")),
    "an infinite bias": (not_finite("lm_head.biases", float("inf")), ("lm_head.biases", "infinite")),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), WRONG_PACKED.values(), ids=WRONG_PACKED.keys())
def test_what_is_wrong_with_a_quantized_checkpoint_is_named_in_one_line(
    tmp_path: Path, tiny: Olmo3, damage: Callable[[Path], Any], words: tuple[str, ...]
) -> None:
    folder = tmp_path / "packed"
    save_checkpoint(folder, {**TINY, "quantization": PACKED}, quantized_model(PACKED, tiny).tensors())
    load(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(("name", "scale"), [("mxfp4", 0xFF), ("nvfp4", 0x7F), ("mxfp8", 0xFF)])
def test_scales_in_eight_bits_that_stand_for_nan_are_refused(
    tmp_path: Path, tiny: Olmo3, name: str, scale: int
) -> None:
    tensors = quantized_model(QUANTIZED[name], tiny).tensors()
    tensors["lm_head.scales"][-1, -1] = scale
    folder = save_checkpoint(tmp_path / "packed", {**TINY, "quantization": QUANTIZED[name]}, tensors)
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*lm_head\.scales"):
        load(folder)


def test_a_name_that_is_no_folder_and_no_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder, and no hub id either.*allenai/"):
        load(tmp_path / "nowhere" / "at" / "all")


def test_a_file_for_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file: expected the checkpoint's folder"):
        load(folder / "model.safetensors")


@pytest.mark.parametrize("model", ["demo", "folder"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(folder: Path, model: str) -> None:
    with pytest.raises(CheckpointError, match=r"revision='step1000'"):
        load("demo" if model == "demo" else folder, revision="step1000")


def test_a_failed_load_leaves_the_checkpoint_as_it_was(folder: Path) -> None:
    rewrite_tensors(folder, lambda t: t.pop(UP))
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    with pytest.raises(CheckpointError):
        load(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in copy.iterdir()
    }


def test_each_file_of_a_checkpoint_is_read_once(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's way read config.json twice and the headers three times."""
    opened: list[str] = []
    audited = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if audited and event == "open" and str(args[0]).startswith(str(tiny_checkpoint)):
            opened.append(Path(str(args[0])).name)

    sys.addaudithook(audit)  # for good: a hook cannot be taken back
    loads: list[str] = []
    read = mx.load

    def counted(path: str) -> Any:
        loads.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(mx, "load", counted)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    checkpoint.plan()
    assert checkpoint.tokenizer is checkpoint.tokenizer
    checkpoint.load()
    audited = False
    counts = {name: opened.count(name) for name in ("config.json", "tokenizer_config.json")}
    assert counts == {"config.json": 1, "tokenizer_config.json": 1}
    assert opened.count("model.safetensors") == 1  # its header; the data goes through MLX
    assert loads == ["model.safetensors"]


def test_what_the_headers_tell_is_refused_before_any_data_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tiny_checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    monkeypatch.setattr(mx, "load", lambda path: pytest.fail(f"read {path}"))
    with pytest.raises(CheckpointError, match="lacks"):
        Checkpoint.open(tiny_checkpoint).load()


def test_a_checkpoint_is_loaded_in_a_dtype_by_its_name(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert checkpoint.load("bfloat16").dtype == mx.bfloat16
    assert checkpoint.itemsize("bfloat16") == checkpoint.itemsize(mx.bfloat16) == 2
    assert checkpoint.plan(dtype="bfloat16").weights == checkpoint.weight_bytes(mx.bfloat16)
    for call in (checkpoint.load, checkpoint.weight_bytes, checkpoint.itemsize):
        with pytest.raises(OptionError, match="dtype must be one of"):
            call("int8")


def test_what_is_no_name_at_all_is_refused_as_an_unknown_one() -> None:
    with pytest.raises(CheckpointError, match="no such folder, and no hub id"):
        Checkpoint.open(None)  # type: ignore[arg-type]
