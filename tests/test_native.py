"""OLMo-core's native checkpoints: the same tensors bit for bit, the same model, and no surprises."""

import copy
import itertools
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, random_model, save_checkpoint
from native_writer import (
    STORAGE_INFO,
    Doubled,
    Name,
    Object,
    Outside,
    Split,
    Writer,
    archive,
    by_axes,
    describe,
    index_of,
    metadata_of,
    native_name,
    run_config,
    table_of,
    whole,
    write_native,
)

from convert import convert
from convert.reading.native.checkpoint import is_native, open_native
from convert.reading.native.distcp import Chunked, chunked_tensors
from convert.reading.stored import read
from olmo3_mlx import CheckpointError, ConfigError, ConvertError, Olmo3, Olmo3Config

PADDED = 160  # rows of embedding and head, of which TINY's tokenizer has 128
EMBEDDING = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
SMALL = {
    **TINY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def padded_tensors(config: dict[str, Any], dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    tensors = random_model({**config, "vocab_size": PADDED}).tensors()
    return {name: array.astype(dtype) for name, array in tensors.items()}


def write(folder: Path, config: dict[str, Any] = SMALL, **options: Any) -> Path:
    return write_native(folder, run_config(config, PADDED), padded_tensors(config), **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return write(tmp_path_factory.mktemp("native") / "step1")


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint8))


def stand_in(folder: Path, array: mx.array, **changes: Any) -> Path:
    """The checkpoint `folder` with one tensor, GATE, in a file of its own that `changes` describe."""
    parts = folder / "model_and_optim"
    data = changes.pop("data", None) or archive(array)
    (parts / "__9_0.distcp").write_bytes(b"before" + data)
    name = f"model.{native_name(GATE)}"
    place = {"relative_path": "__9_0.distcp", "offset": 6, "length": len(data), **changes.pop("place", {})}
    table = changes.pop("table", None) or table_of(array, whole(GATE, array.shape))
    places = changes.pop("places", None)
    if places is None:
        places = {index_of(name, (0, 0), 0): Object(STORAGE_INFO, (), place)}
    (parts / ".metadata").write_bytes(Writer().dump(metadata_of({name: table}, places)))
    return folder


# what is read


@pytest.mark.parametrize(
    "split", [whole, by_axes(3), by_axes(1, 2), by_axes(5, 3), by_axes(30)],
    ids=["whole", "rows", "columns", "both", "more pieces than rows"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_tensors_are_the_same_bit_for_bit(split: Split, dtype: mx.Dtype, tmp_path: Path) -> None:
    tensors = padded_tensors(SMALL, dtype)
    config, found = open_native(write_native(tmp_path / "x", run_config(SMALL, PADDED), tensors, split))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        expected = array[: TINY["vocab_size"]] if array.shape[0] == PADDED else array
        assert (found[name].shape, found[name].dtype) == (expected.shape, dtype)
        assert np.array_equal(bits(read(found[name])), bits(expected)), name
    assert config["dtype"] == "bfloat16"


def test_any_rows_of_a_tensor_in_pieces_are_its_rows(tmp_path: Path) -> None:
    tensors = padded_tensors(SMALL)
    _, found = open_native(write_native(tmp_path / "x", run_config(SMALL, PADDED), tensors, by_axes(5, 3)))
    for name in (GATE, "model.norm.weight"):
        count = tensors[name].shape[0]
        for start, stop in itertools.combinations(range(count + 1), 2):
            assert mx.array_equal(found[name].rows(start, stop), tensors[name][start:stop])


def test_the_model_is_the_one_that_was_written(tmp_path: Path) -> None:
    tensors = padded_tensors(TINY)
    config, found = open_native(write_native(tmp_path / "x", run_config(TINY, PADDED), tensors, by_axes(2)))
    expected = Olmo3Config.from_dict({**TINY, "eos_token_id": 0})
    assert Olmo3Config.from_dict(config) == expected
    model = Olmo3(Olmo3Config.from_dict(config))
    model.load_weights([(name, read(tensor)) for name, tensor in found.items()])
    tokens = mx.arange(40)[None]
    right = random_model({**TINY, "vocab_size": PADDED})
    assert mx.array_equal(model(tokens), right(tokens)[..., : TINY["vocab_size"]])


def test_only_the_files_that_are_asked_for_are_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", ranks=47)
    _, found = open_native(folder)
    (folder / "model_and_optim" / "__3_0.distcp").write_bytes(b"")
    names = list(found)
    for name in names[:3] + names[4:]:
        read(found[name])
    with pytest.raises(CheckpointError, match=r"__3_0\.distcp"):
        read(found[names[3]])


def test_native_folders_are_told_from_others(kept: Path, tiny_checkpoint: Path) -> None:
    assert is_native(kept)
    assert is_native(kept / "model_and_optim")
    assert not is_native(tiny_checkpoint)


# the config


def changed(path: str, value: Any) -> dict[str, Any]:
    """SMALL's run with one value set, or taken out if it is None."""
    run = copy.deepcopy(run_config(SMALL, PADDED))
    *way, last = path.split("/")
    place = run
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return run


def opened(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The config of the checkpoint `folder` with another config.json, in a folder beside it."""
    folder.joinpath("config.json").write_text(json.dumps(run))
    return open_native(folder)[0]


@pytest.fixture
def linked(kept: Path, tmp_path: Path) -> Path:
    """`kept` under another name, so that its config can be another."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "model_and_optim").symlink_to(kept / "model_and_optim")
    return folder


REFUSED: dict[str, tuple[str, Any, str]] = {
    "pre-norm": ("model/block/name", "default", "name"),
    "no block name": ("model/block/name", None, "name"),
    "another kind of model": ("model/name", "moe", "name"),
    "layer norm": ("model/block/layer_norm/name", "default", "name"),
    "qwen's norm": ("model/block/sequence_mixer/qk_norm/name", "qwen_rms", "name"),
    "norm bias": ("model/block/layer_norm/bias", True, "bias"),
    "norm bias by default": ("model/block/layer_norm/bias", None, "bias"),
    "norm in half precision": ("model/block/layer_norm/full_precision", False, "full_precision"),
    "norm without weights": ("model/lm_head/layer_norm/elementwise_affine", False, "elementwise_affine"),
    "another eps in attention": ("model/block/sequence_mixer/qk_norm/eps", 1e-5, "eps"),
    "another eps at the end": ("model/lm_head/layer_norm/eps", 1e-5, "one form"),
    "fused attention": ("model/block/sequence_mixer/name", "fused", "name"),
    "attention bias": ("model/block/sequence_mixer/bias", True, "bias"),
    "attention bias by default": ("model/block/sequence_mixer/bias", None, "bias"),
    "clipping": ("model/block/sequence_mixer/clip_qkv", 8.0, "clip_qkv"),
    "no qk norm": ("model/block/sequence_mixer/qk_norm", None, "qk_norm"),
    "qk norm per head": ("model/block/sequence_mixer/use_head_qk_norm", True, "use_head_qk_norm"),
    "a gate": ("model/block/sequence_mixer/gate", {"granularity": "headwise"}, "gate"),
    "sinks": ("model/block/sequence_mixer/attention_sinks", True, "attention_sinks"),
    "what nobody knows": ("model/block/sequence_mixer/warp", 9, "warp"),
    "not attention": ("model/block/sequence_mixer/type", "gated_delta_net", "type"),
    "no rope": ("model/block/sequence_mixer/rope", None, "rope"),
    "interleaved rope": ("model/block/sequence_mixer/rope/name", "complex", "name"),
    "rope in half precision": ("model/block/sequence_mixer/rope/full_precision", False, "full_precision"),
    "part of a head": ("model/block/sequence_mixer/rope/partial_rotary_factor", 0.25, "partial_rotary"),
    "no global rope": ("model/block/sequence_mixer/rope/no_global_rope", True, "no_global_rope"),
    "other scaling": (
        "model/block_overrides/3/sequence_mixer/rope/scaling",
        {"factor": 2.0, "_CLASS_": "olmo_core.nn.rope.PIRoPEScalingConfig"}, "scaling",
    ),
    "scaling of sliding layers": (
        "model/block/sequence_mixer/rope/scaling",
        {"factor": 8.0, "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig"}, "rope scaling",
    ),
    "another theta in one layer": ("model/block_overrides/3/sequence_mixer/rope/theta", 5, "one form"),
    "a window of nothing": ("model/block/sequence_mixer/sliding_window/pattern", [0, -1], "pattern"),
    "no pattern": ("model/block/sequence_mixer/sliding_window/pattern", [], "pattern"),
    "two windows": ("model/block/sequence_mixer/sliding_window/pattern", [8, 4, 8, -1], "window"),
    "another activation": ("model/block/feed_forward/activation", "gelu_tanh", "activation"),
    "feed-forward bias": ("model/block/feed_forward/bias", True, "bias"),
    "experts": ("model/block/feed_forward_moe", {"num_experts": 4}, "feed_forward_moe"),
    "scaled residuals": ("model/block/attention_residual_alpha", 0.5, "attention_residual_alpha"),
    "a norm of the embedding": ("model/embedding_norm", {"name": "rms"}, "embedding_norm"),
    "a scaled embedding": ("model/embed_scale", 8.0, "embed_scale"),
    "tied": ("model/tie_word_embeddings", True, "tie_word_embeddings"),
    "patterns of blocks": ("model/block_pattern", ["a", "b"], "block_pattern"),
    "a layer too many": ("model/block_overrides/4", {}, "block_overrides"),
    "head bias": ("model/lm_head/bias", True, "bias"),
    "another head": ("model/lm_head/name", "normalized", "name"),
    "no tokenizer": ("dataset/tokenizer", None, "tokenizer"),
    "a larger tokenizer": ("dataset/tokenizer/vocab_size", PADDED + 1, "vocab_size"),
    "no end token": ("dataset/tokenizer/eos_token_id", None, "eos_token_id"),
    "no model": ("model", None, "model"),
    "scaling of some full layers": (
        "model/block/sequence_mixer/sliding_window/pattern", [8, -1, 8, -1], "same on all",
    ),
    "names of blocks": ("model/block", {"a": {}}, "name"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "named"), REFUSED.values(), ids=REFUSED)
def test_what_changes_the_numbers_is_refused_by_its_key(
    linked: Path, path: str, value: Any, named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        opened(linked, changed(path, value))
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model/float8_config", {"enabled": True}),
        ("model/compile", True),
        ("model/block/sequence_mixer/backend", "flash_2"),
        ("model/block/sequence_mixer/dropout", 0.1),
        ("model/block/layer_norm/name", "fused_rms"),
        ("model/block/sequence_mixer/rope/partial_rotary_factor", 1.0),
        ("model/embed_scale", 1.0),
        ("trainer", {"max_duration": 1}),
    ],
)
def test_what_changes_nothing_is_let_be(linked: Path, kept: Path, path: str, value: Any) -> None:
    assert opened(linked, changed(path, value)) == open_native(kept)[0]


def test_the_name_that_attention_had_when_olmo_3_was_trained_is_read(linked: Path, kept: Path) -> None:
    run = run_config(SMALL, PADDED)
    for block in (run["model"]["block"], run["model"]["block_overrides"]["3"]):
        block["attention"] = block.pop("sequence_mixer")
    assert opened(linked, run) == open_native(kept)[0]
    scaling = run["model"]["block_overrides"]["3"]["attention"]["rope"]["scaling"]
    scaling["attention_rescale_factor"] = 1.0  # written, and ignored, by OLMo-core 2.3
    assert opened(linked, run) == open_native(kept)[0]
    run["model"]["block"]["sequence_mixer"] = run["model"]["block"]["attention"]
    with pytest.raises(ConfigError, match="attention"):
        opened(linked, run)


def test_a_stage_without_yarn_has_the_context_that_it_was_trained_on(linked: Path) -> None:
    config = opened(linked, changed("model/block_overrides", None))
    assert (config["rope_scaling"], config["max_position_embeddings"]) == (None, 32)
    config = opened(
        linked, {**changed("model/block_overrides", None), "train_module": {"max_sequence_length": 64}}
    )
    assert config["max_position_embeddings"] == 64
    run = changed("model/block_overrides", None)
    del run["dataset"]["sequence_length"]
    with pytest.raises(ConfigError, match="sequence_length"):
        opened(linked, run)


@pytest.mark.parametrize(
    ("first", "last", "pattern", "full"),
    [
        (False, True, [8, 8, 8, -1], [3]),
        (False, False, [8, -1], [1, 3]),
        (False, True, [8], [3]),
        (True, False, [8, -1], [0, 2]),
        (True, True, [8, 8, 8, 8], [0, 3]),
        (False, False, [-1], [0, 1, 2, 3]),
    ],
)
def test_layers_slide_as_the_pattern_says(
    linked: Path, first: bool, last: bool, pattern: list[int], full: list[int]
) -> None:
    run = changed("model/block_overrides", None)
    run["model"]["block"]["sequence_mixer"]["sliding_window"] = {
        "pattern": pattern,
        "force_full_attention_on_first_layer": first,
        "force_full_attention_on_last_layer": last,
    }
    config = opened(linked, run)
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == full
    assert config.get("sliding_window") == (8 if len(full) < 4 else None)


# what is missing, damaged or hostile


def test_a_part_of_a_checkpoint_names_the_whole(kept: Path) -> None:
    with pytest.raises(CheckpointError, match="name that one"):
        open_native(kept / "model_and_optim")


@pytest.mark.parametrize("file", ["config.json", "model_and_optim/.metadata", "model_and_optim/__0_0.distcp"])
def test_a_file_that_is_missing_is_named(tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "x")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=Path(file).name.replace(".", r"\.")):
        open_native(folder)


def test_a_file_cut_short_is_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    file = folder / "model_and_optim" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: cut short"):
        open_native(folder)


def test_metadata_cut_anywhere_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    file = folder / "model_and_optim" / ".metadata"
    data = file.read_bytes()
    for end in range(0, len(data), 997):
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="metadata"):
            open_native(folder)


def test_metadata_that_would_run_something_is_refused_by_name(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    folder = write(tmp_path / "x")
    (folder / "model_and_optim" / ".metadata").write_bytes(pickle.dumps({"a": Runs()}))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        open_native(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [None, [], {"state_dict_metadata": {}}, 7])
def test_metadata_of_another_form_is_refused(tmp_path: Path, value: Any) -> None:
    folder = write(tmp_path / "x")
    (folder / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(CheckpointError, match="damaged"):
        open_native(folder)


def test_a_missing_tensor_and_one_too_many_are_named(tmp_path: Path) -> None:
    tensors = padded_tensors(SMALL)
    run = run_config(SMALL, PADDED)
    without = {name: array for name, array in tensors.items() if name != GATE}
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.gate_proj"):
        open_native(write_native(tmp_path / "a", run, without))
    more = {**tensors, "model.layers.4.mlp.gate_proj.weight": tensors[GATE]}
    with pytest.raises(CheckpointError, match=r"model\.layers\.4"):
        open_native(write_native(tmp_path / "b", run, more))
    wider = {**tensors, GATE: mx.zeros((13, 16))}
    with pytest.raises(CheckpointError, match=r"\[12, 16\], not \[13, 16\]"):
        open_native(write_native(tmp_path / "c", run, wider))
    run["model"]["vocab_size"] = PADDED - 1
    with pytest.raises(CheckpointError, match="160 rows, its config says 159"):
        open_native(write_native(tmp_path / "d", run, tensors))


@pytest.mark.parametrize("part", ["attention.w_q.bias", "attention.w_qkv.weight", "pre_norm.weight"])
def test_tensors_that_no_olmo_3_has_are_named(tmp_path: Path, part: str) -> None:
    folder = stand_in(write(tmp_path / "x"), ARRAY)
    file = folder / "model_and_optim" / ".metadata"
    name = f"model.blocks.0.{part}"
    file.write_bytes(
        Writer().dump(metadata_of({name: table(((0, 0), (12, 16)))}, places_of((0, 0), name=name)))
    )
    with pytest.raises(CheckpointError, match=rf"no Olmo 3 has: blocks\.0\.{part}"):
        open_native(folder)


ARRAY = mx.arange(192, dtype=mx.float32).reshape(12, 16)
KEY = f"model.{native_name(GATE)}"


def places_of(*offsets: tuple[int, ...] | None, name: str = KEY) -> dict[Any, Any]:
    place = {"relative_path": "__9_0.distcp", "offset": 6, "length": len(archive(ARRAY))}
    return {index_of(name, at, i): Object(STORAGE_INFO, (), place) for i, at in enumerate(offsets)}


def table(*boxes: Any, array: Any = ARRAY) -> Object:
    return table_of(array, list(boxes))


class Shape(NamedTuple):
    """What `table_of` asks of an array."""

    shape: Any
    dtype: mx.Dtype = mx.float32


HALF = ((0, 0), (6, 16))
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "a gap": ({"table": table(HALF)}, "in no chunk"),
    "an overlap": (
        {"table": table(HALF, ((5, 0), (7, 16))), "places": places_of((0, 0), (5, 0))}, "overlap",
    ),
    "the same chunk twice": ({"table": table(HALF, HALF)}, "overlap"),
    "outside": ({"table": table(((0, 0), (13, 16)))}, "outside"),
    "no chunks": ({"table": table()}, "in no chunk"),
    "another number of axes": ({"table": table(((0,), (12,)))}, "damaged"),
    "nothing stored": ({"places": {}}, r"lacks its chunk at \[0, 0\]"),
    "stored elsewhere": ({"places": places_of((1, 0))}, r"lacks its chunk at \[0, 0\]"),
    "stored twice": ({"places": places_of((0, 0), (0, 0))}, "twice"),
    "a file of another folder": ({"place": {"relative_path": "../__0_0.distcp"}}, "names of .distcp"),
    "a file from the root": ({"place": {"relative_path": "/etc/passwd"}}, "names of .distcp"),
    "a file's name doubled again and again": (
        {"place": {"relative_path": Doubled()}}, r"names of \.distcp files in it, got a tuple",
    ),
    "a file's name longer than any": ({"place": {"relative_path": f"{'x' * 999}.distcp"}}, "got 'xxx"),
    "an offset doubled again and again": ({"place": {"offset": Doubled()}}, "damaged"),
    "more axes than any weight has": ({"table": table(((0,) * 999, (1,) * 999))}, "damaged"),
    "a size doubled again and again": (
        {"table": table(((0, 0), (12, 16)), array=Shape((Doubled(), 16)))}, "damaged",
    ),
    "a name that is no tensor's": (
        {"places": places_of((0, 0), name="model.x\n" * 999)}, r"a tensor by the name of 'model\.x\\n",
    ),
    "a negative offset": ({"place": {"offset": -1}}, "damaged"),
    "longer than the file": ({"place": {"length": 2**40}}, "cut short"),
    "transformed": ({"place": {"transform_descriptors": ["zstd"]}}, "compressed"),
    "a grid of millions of cells": (
        {
            "table": table(*(((i, i), (1, 1)) for i in range(2100)), array=mx.zeros((2100, 2100))),
            "places": places_of(*((i, i) for i in range(2100))),
        },
        "too many chunks",
    ),
    "integers": ({"table": Object(table().of, (), {**table().state, "properties": Object(
        "torch.distributed.checkpoint.metadata.TensorProperties", (), (Name("torch.int64"),))})}, "int64"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), TABLES.values(), ids=TABLES)
def test_chunks_that_do_not_make_the_tensor_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = stand_in(write(tmp_path / "x"), ARRAY, **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_native(folder)
    assert_short(caught.value)


def assert_short(error: Exception) -> None:
    assert len(str(error)) < 500
    assert "\n" not in str(error)


def only(folder: Path) -> mx.array:
    """GATE, out of a checkpoint of nothing else."""
    tensors = chunked_tensors(folder / "model_and_optim", "model.")
    return read(tensors[native_name(GATE)])


def test_the_stand_in_itself_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    assert mx.array_equal(only(stand_in(folder, ARRAY)), ARRAY)
    assert mx.array_equal(only(stand_in(folder, ARRAY, places=places_of(None))), ARRAY)
    parameter = Object("torch._utils._rebuild_parameter", (describe(ARRAY), True, ()), new=False)
    assert mx.array_equal(only(stand_in(folder, ARRAY, data=archive(ARRAY, parameter))), ARRAY)
    later = archive(ARRAY, describe(ARRAY[2:], skipped=32))
    assert mx.array_equal(only(stand_in(folder, ARRAY[2:], data=later)), ARRAY[2:])


def evil() -> Any:
    return Object("os.system", ("true",), new=False)


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (lambda: archive(ARRAY, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "big-endian": (lambda: archive(ARRAY, order=b"big"), "little-endian"),
    "transposed": (lambda: archive(ARRAY, describe(ARRAY, strides=(1, 12))), "not contiguous"),
    "another shape": (lambda: archive(ARRAY, describe(ARRAY, shape=(16, 12))), r"\[16, 12\]"),
    "a shape doubled again and again": (
        lambda: archive(ARRAY, describe(ARRAY, shape=Doubled())),
        "describes no tensor",
    ),
    "a size doubled again and again": (
        lambda: archive(ARRAY, describe(ARRAY, shape=(Doubled(), 16))),
        "describes no tensor",
    ),
    "a shape of thousands of axes": (
        lambda: archive(ARRAY, describe(ARRAY, shape=(1,) * 9999)),
        "describes no tensor",
    ),
    "another type": (lambda: archive(ARRAY, describe(ARRAY, storage=Name("torch.HalfStorage"))), "Half"),
    "past its end": (lambda: archive(ARRAY, describe(ARRAY, skipped=1)), "cut short"),
    "before its begin": (lambda: archive(ARRAY, describe(ARRAY, skipped=-1)), "holds"),
    "a storage of another kind": (
        lambda: archive(ARRAY, Object("torch._utils._rebuild_tensor_v2", (Outside(("x",) * 5), 0, (), ()))),
        "describes no tensor",
    ),
    "no description": (lambda: archive(ARRAY).replace(b"/data.pkl", b"/data.pkx"), "no data.pkl"),
    "two of a name": (lambda: archive(ARRAY).replace(b"archive/byteorder", b"archive/data/0\0xx"), "twice"),
    "another key": (lambda: archive(ARRAY, describe(ARRAY, key="1")), "cut short"),
    "fewer numbers": (lambda: archive(ARRAY[1:], describe(ARRAY)), "cut short"),
    "a number": (lambda: archive(ARRAY, 7.5), "describes no tensor"),
    "code": (lambda: archive(ARRAY, evil()), r"os\.system"),
    "a long pickle": (lambda: archive(ARRAY, "x" * 100_000), "data.pkl of"),
    "no zip": (lambda: b"x" * 2000, "no torch.save archive"),
    "cut": (lambda: archive(ARRAY)[:-1], "no torch.save archive"),
    "a broken header": (lambda: b"QQ" + archive(ARRAY)[2:], "damaged"),
}


@pytest.mark.parametrize(("make", "said"), ARCHIVES.values(), ids=ARCHIVES)
def test_a_chunk_that_is_not_what_metadata_says_is_refused(
    tmp_path: Path, make: Callable[[], bytes], said: str
) -> None:
    folder = stand_in(write(tmp_path / "x"), ARRAY, data=make())
    with pytest.raises(CheckpointError, match=said) as caught:
        only(folder)
    assert_short(caught.value)
    assert "__9_0.distcp" in str(caught.value)
    assert "fetch it again" in str(caught.value)


def test_a_chunk_with_any_byte_of_its_description_changed_is_read_or_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    data = archive(ARRAY)
    begin = data.index(b"archive/data/0")
    for place in [*range(0, begin, 7), *range(data.rindex(b"archive/data.pkl") - 46, len(data), 7)]:
        for change in (0x01, 0xFF):
            broken = data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
            try:
                only(stand_in(folder, ARRAY, data=broken))
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_metadata_with_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    folder = stand_in(write(tmp_path / "x"), ARRAY)
    file = folder / "model_and_optim" / ".metadata"
    data = file.read_bytes()
    refused = 0
    for place in range(len(data)):
        for change in (0x01, 0x80):
            file.write_bytes(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])
            try:
                only(folder)
            except (CheckpointError, KeyError) as error:  # KeyError: a tensor of another name
                refused += 1
                assert "\n" not in str(error)
    assert refused > len(data)


def test_files_that_go_or_shrink_between_opening_and_reading_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "x")
    file = folder / "model_and_optim" / "__9_0.distcp"

    def tensor() -> Chunked:
        stand_in(folder, ARRAY)
        return chunked_tensors(folder / "model_and_optim", "model.")[native_name(GATE)]

    read_once, unread = tensor(), tensor()
    assert mx.array_equal(read_once.rows(1, 2), ARRAY[1:2])
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"__9_0\.distcp: cut short"):
        read_once.rows(0, 12)
    file.unlink()
    for found in (read_once, unread):
        with pytest.raises(CheckpointError, match=r"__9_0\.distcp: cannot be read"):
            found.rows(0, 12)


# PyTorch itself, where it is


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pytorch_reads_what_the_writer_of_these_tests_writes() -> None:
    torch = pytest.importorskip("torch")
    import io

    loaded = torch.load(io.BytesIO(archive(ARRAY)), weights_only=True)
    assert np.array_equal(loaded.numpy(), np.array(ARRAY))
    half = torch.load(io.BytesIO(archive(ARRAY.astype(mx.bfloat16))), weights_only=True)
    assert half.dtype == torch.bfloat16
    assert np.array_equal(half.float().numpy(), np.array(ARRAY))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_pytorch_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch.distributed import checkpoint

    tensors = padded_tensors(SMALL)
    state = {f"model.{native_name(n)}": torch.from_numpy(np.array(a)) for n, a in tensors.items()}
    state = {**state, "optim.step": torch.tensor(3.0), "optim.lr": 0.1}
    folder = write(tmp_path / "x")
    for file in (folder / "model_and_optim").iterdir():
        file.unlink()
    checkpoint.save(
        state, storage_writer=checkpoint.FileSystemWriter(folder / "model_and_optim"), no_dist=True
    )
    _, found = open_native(folder)
    for name, array in tensors.items():
        count = found[name].shape[0]
        assert mx.array_equal(read(found[name]), array[:count]), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_olmo_core_gives_the_same_logits_here(tmp_path: Path) -> None:
    """Its own config, its own writer, its own forward pass: windows, YaRN and norms included."""
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("olmo_core.nn.transformer.config")
    from olmo_core.data.tokenizer import TokenizerConfig
    from olmo_core.distributed.checkpoint import save_model_and_optim_state
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.rope import YaRNRoPEScalingConfig

    window = SlidingWindowAttentionConfig([8, 8, 8, -1], force_full_attention_on_first_layer=False)
    config = transformer.TransformerConfig.llama_like(
        d_model=64, vocab_size=128, n_layers=4, n_heads=4, n_kv_heads=2, qk_norm=True, layer_norm_eps=1e-6,
        block_name=transformer.TransformerBlockType.reordered_norm, hidden_size_multiple_of=32,
        sliding_window=window, rope_theta=10000,
    ).with_rope_scaling(YaRNRoPEScalingConfig(factor=8, old_context_len=32))  # fmt: skip
    model = config.build(init_device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    run = {
        "model": config.as_config_dict(),
        "dataset": {
            "tokenizer": TokenizerConfig(vocab_size=100, eos_token_id=90, pad_token_id=99).as_config_dict()
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(run))
    save_model_and_optim_state(
        str(tmp_path / "model_and_optim"), model, torch.optim.AdamW(model.parameters())
    )
    found, tensors = open_native(tmp_path)
    ours = Olmo3(Olmo3Config.from_dict(found))
    ours.load_weights([(name, read(tensor)) for name, tensor in tensors.items()])
    tokens = np.arange(60)[None]
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens))[..., :100].numpy()
    assert np.abs(np.array(ours(mx.array(tokens))) - theirs).max() < 1e-5 * np.abs(theirs).max()


# conversion


def test_a_native_checkpoint_converts_to_what_the_same_model_in_hugging_face_form_does(
    tmp_path: Path,
) -> None:
    tensors = padded_tensors(TINY)
    native = write_native(tmp_path / "native", run_config(TINY, PADDED), tensors, by_axes(5, 2))
    cut = {name: t[: TINY["vocab_size"]] if t.shape[0] == PADDED else t for name, t in tensors.items()}
    config = open_native(native)[0]
    message = save_checkpoint(tmp_path / "form", config, {n: t.astype(mx.bfloat16) for n, t in cut.items()})
    convert(native, tmp_path / "a", group_size=32, tokenizer=message)
    convert(message, tmp_path / "b", group_size=32)
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    assert "tokenizer.json" in names
    for name in names - {"README.md"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_native_checkpoint_comes_out_in_bfloat16_unless_told(kept: Path, tmp_path: Path) -> None:
    convert(kept, tmp_path / "a", bits=None)
    convert(kept, tmp_path / "b", bits=None, dtype="float32")
    for name, dtype in (("a", mx.bfloat16), ("b", mx.float32)):
        tensors = mx.load(str(tmp_path / name / "model.safetensors"))
        assert isinstance(tensors, dict)
        assert {array.dtype for array in tensors.values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == str(dtype)[9:]


def test_what_else_lies_in_the_folder_is_no_part_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "step1")
    (folder / "older").mkdir()
    (folder / "older" / "weights").write_text("something else")

    def full(*_: Any) -> None:
        (folder / "older" / "weights").write_text("something else meanwhile")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ConvertError, match="go on with resume=True"):
        patch.setattr("convert.conversion.write_model_card", full)
        convert(folder, tmp_path / "mlx", bits=None)
    convert(folder, tmp_path / "mlx", bits=None, resume=True)
    with pytest.raises(ConvertError, match=r"lies inside .*step1, which is to be read"):
        convert(folder, folder / "mlx", bits=None)


@pytest.mark.parametrize("file", ["config.json", "model_and_optim/.metadata", "model_and_optim/*.distcp"])
def test_a_native_checkpoint_that_changes_under_the_run_is_noticed(tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "step1")
    (path,) = list(folder.glob(file))[:1]

    def change(done: int, total: int) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(ConvertError, match="has changed during the conversion"):
        convert(folder, tmp_path / "mlx", bits=None, progress=change)
