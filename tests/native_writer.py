"""OLMo-core's native checkpoints, written without PyTorch: what its trainer leaves, byte by byte enough.

A slow test in test_native.py holds this against PyTorch itself, where that is installed.
"""

import io
import itertools
import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

DCP = "torch.distributed.checkpoint.metadata"
STORAGE_INFO = "olmo_core.distributed.checkpoint.filesystem._StorageInfo"
DTYPES = {
    mx.float32: ("torch.float32", "torch.FloatStorage"),
    mx.bfloat16: ("torch.bfloat16", "torch.BFloat16Storage"),
    mx.float16: ("torch.float16", "torch.HalfStorage"),
}
PARTS = {
    "self_attn.q_proj": "attention.w_q",
    "self_attn.k_proj": "attention.w_k",
    "self_attn.v_proj": "attention.w_v",
    "self_attn.o_proj": "attention.w_out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "model.embed_tokens": "embeddings",
    "model.norm": "lm_head.norm",
    "lm_head": "lm_head.w_out",
}
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
Split = Callable[[str, tuple[int, ...]], list[Box]]


@dataclass(eq=False)
class Object:
    """Something pickled by what makes it: a global, its arguments, and a state or ()."""

    of: str
    args: tuple[Any, ...] = ()
    state: Any = ()
    new: bool = True  # NEWOBJ, else REDUCE


@dataclass(frozen=True)
class Name:
    """A global."""

    name: str


@dataclass(frozen=True)
class Outside:
    """What is pickled by a persistent id."""

    id: Any


@dataclass(frozen=True)
class Doubled:
    """A tuple of one tuple twice, and so on: as short as `times`, 2 to the `times` when written out."""

    times: int = 20


@dataclass
class Writer:
    """A pickler that takes the classes above for what they stand for: protocol 4 as in .metadata, or 2
    as in data.pkl.
    """

    protocol: int = 4
    out: bytearray = field(default_factory=bytearray)
    memo: dict[str, int] = field(default_factory=dict)

    def dump(self, value: Any) -> bytes:
        self.out += bytes([0x80, self.protocol])
        self.save(value)
        return bytes(self.out + b".")

    def save(self, value: Any) -> None:
        simple = {None: b"N", True: b"\x88", False: b"\x89"}
        if value is None or isinstance(value, bool):
            self.out += simple[value]
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, tuple | list | dict):
            self.container(value)
        elif isinstance(value, Name):
            self.name(*value.name.rpartition(".")[::2])
        elif isinstance(value, Doubled):
            place = struct.pack("<I", self.memo.setdefault(f"doubled {len(self.memo)}", len(self.memo)))
            self.out += b")r" + place + (b"j" + place + b"\x86r" + place) * value.times
        elif isinstance(value, Outside):
            self.save(value.id)
            self.out += b"Q"
        else:
            assert isinstance(value, Object)
            self.save(Name(value.of))
            self.save(value.args)
            self.out += b"\x81" if value.new else b"R"
            if value.state != ():
                self.save(value.state)
                self.out += b"b"

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif abs(value) < 2**31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            self.out += b"\x8a\x08" + struct.pack("<q", value)

    def text(self, value: str) -> None:
        if value in self.memo:
            self.out += b"j" + struct.pack("<I", self.memo[value])
            return
        data = value.encode()
        remember = b"\x94" if self.protocol == 4 else b"r" + struct.pack("<I", len(self.memo))
        self.out += b"X" + struct.pack("<I", len(data)) + data + remember
        self.memo[value] = len(self.memo)

    def name(self, module: str, name: str) -> None:
        if self.protocol == 4:
            self.text(module)
            self.text(name)
            self.out += b"\x93"
        else:
            self.out += f"c{module}\n{name}\n".encode()

    def container(self, value: Any) -> None:
        marks: dict[type, tuple[bytes, bytes]] = {
            tuple: (b"(", b"t"),
            list: (b"](", b"e"),
            dict: (b"}(", b"u"),
        }
        opening, closing = marks[type(value)]
        self.out += opening
        for item in itertools.chain(*value.items()) if isinstance(value, dict) else value:
            self.save(item)
        self.out += closing


def size(numbers: tuple[int, ...]) -> Object:
    """A torch.Size."""
    return Object("torch.Size", (numbers,), new=False)


def describe(array: mx.array, **changes: Any) -> Any:
    """What data.pkl says of a tensor."""
    strides = tuple(int(np.prod(array.shape[i + 1 :], dtype=np.int64)) for i in range(array.ndim))
    storage = Name(DTYPES[array.dtype][1])
    given = {
        "key": "0",
        "skipped": 0,
        "shape": array.shape,
        "strides": strides,
        "storage": storage,
        **changes,
    }
    outside = Outside(("storage", given["storage"], given["key"], "cpu", array.size))
    hooks = Object("collections.OrderedDict", new=False)
    args = (outside, given["skipped"], given["shape"], given["strides"], False, hooks)
    return Object("torch._utils._rebuild_tensor_v2", args, new=False)


def archive(
    array: mx.array, described: Any = None, compression: int = zipfile.ZIP_STORED, order: bytes = b"little"
) -> bytes:
    """What torch.save writes for a tensor."""
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        z.writestr("archive/data.pkl", Writer(protocol=2).dump(described or describe(array)))
        z.writestr("archive/byteorder", order)
        z.writestr("archive/data/0", np.array(raw).tobytes())
        z.writestr("archive/version", "3\n")
    return file.getvalue()


def whole(name: str, shape: tuple[int, ...]) -> list[Box]:
    """One chunk for a tensor."""
    return [((0,) * len(shape), shape)]


def by_axes(*pieces: int) -> Split:
    """Each axis in that many chunks (1 where not given), as PyTorch cuts: the last are short or empty."""

    def split(name: str, shape: tuple[int, ...]) -> list[Box]:
        axes = []
        for axis, n in enumerate(shape):
            count = pieces[axis] if axis < len(pieces) else 1
            edges = [min(n, i * -(-n // count)) for i in range(count + 1)]
            axes.append([(a, b - a) for a, b in itertools.pairwise(edges)])
        return [tuple(zip(*box, strict=True)) for box in itertools.product(*axes)]  # type: ignore[misc]

    return split


def native_name(name: str) -> str:
    """OLMo-core's name for a tensor of Hugging Face's."""
    parts = name.removesuffix(".weight").split(".", 3)
    if parts[:2] == ["model", "layers"]:
        return f"blocks.{parts[2]}.{PARTS[parts[3]]}.weight"
    return f"{PARTS['.'.join(parts)]}.weight"


def chunks_of(array: mx.array, boxes: list[Box]) -> Iterator[tuple[Box, mx.array]]:
    for offsets, sizes in boxes:
        place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        yield (offsets, sizes), mx.contiguous(array[place])


def metadata_of(tables: dict[str, Any], places: dict[Any, Any]) -> Object:
    """The whole of .metadata."""
    meta = Object(f"{DCP}.StorageMeta", (), {"checkpoint_id": "/x", "save_id": "1", "load_id": None})
    state = {
        "state_dict_metadata": tables, "planner_data": {name: (name,) for name in tables},
        "storage_data": places, "storage_meta": meta, "version": None,
    }  # fmt: skip
    return Object(f"{DCP}.Metadata", (), state)


def table_of(array: mx.array, boxes: list[Box]) -> Object:
    """A tensor's entry: properties, shape, chunks."""
    layout = Object("torch.serialization._get_layout", ("torch.strided",), new=False)
    memory = Object(f"{DCP}._MEM_FORMAT_ENCODING", (0,), new=False)
    properties = (Name(DTYPES[array.dtype][0]), layout, False, memory, False)
    chunks = [
        Object(f"{DCP}.ChunkStorageMetadata", (), {"offsets": size(o), "sizes": size(s)}) for o, s in boxes
    ]
    state = {
        "properties": Object(f"{DCP}.TensorProperties", (), properties),
        "size": size(array.shape),
        "chunks": chunks,
    }
    return Object(f"{DCP}.TensorStorageMetadata", (), state)


def index_of(name: str, offsets: tuple[int, ...] | None, number: int) -> Object:
    """A key of where chunks lie."""
    state = {"fqn": name, "index": number, "offset": None if offsets is None else size(offsets)}
    return Object(f"{DCP}.MetadataIndex", (), state)


def write_native(
    folder: Path, run: dict[str, Any], tensors: dict[str, mx.array], split: Split = whole, ranks: int = 2
) -> Path:
    """A native checkpoint of `tensors`, by Hugging Face's names, its chunks dealt out to files."""
    parts = folder / "model_and_optim"
    parts.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(run))
    files: dict[str, bytearray] = {f"__{rank}_0.distcp": bytearray() for rank in range(ranks)}
    tables: dict[str, Any] = {"optim.param_groups.0.lr": Object(f"{DCP}.BytesStorageMetadata", (), {})}
    places: dict[Any, Any] = {}
    dealt = itertools.cycle(files)
    for hf_name, array in tensors.items():
        name = f"model.{native_name(hf_name)}"
        boxes = split(hf_name, array.shape)
        tables[name] = table_of(array, boxes)
        for number, ((offsets, _), chunk) in enumerate(chunks_of(array, boxes)):
            if not chunk.size:
                continue
            file = next(dealt)
            data = archive(chunk)
            state = {"relative_path": file, "offset": len(files[file]), "length": len(data)}
            places[index_of(name, offsets, number)] = Object(STORAGE_INFO, (), state)
            files[file] += data
    (parts / ".metadata").write_bytes(Writer().dump(metadata_of(tables, places)))
    for file, content in files.items():
        (parts / file).write_bytes(content)
    return folder


def run_config(config: dict[str, Any], padded: int) -> dict[str, Any]:
    """The run's config.json for a Hugging Face config whose last layer alone is full."""
    norm = {"name": "rms", "eps": config["rms_norm_eps"], "bias": False, "dtype": "float32"}

    def block(scaling: dict[str, Any] | None) -> dict[str, Any]:
        rope = {"name": "default", "theta": config["rope_theta"], "full_precision": True}
        return {
            "sequence_mixer": {
                "name": "default", "n_heads": config["num_attention_heads"],
                "n_kv_heads": config["num_key_value_heads"], "bias": False, "qk_norm": dict(norm),
                "rope": rope if scaling is None else {**rope, "scaling": scaling},
                "sliding_window": {
                    "pattern": [config["sliding_window"]] * 3 + [-1],
                    "force_full_attention_on_first_layer": False,
                    "force_full_attention_on_last_layer": True,
                },
                "type": "attention",
            },
            "layer_norm": dict(norm),
            "feed_forward": {
                "hidden_size": config["intermediate_size"], "name": "default", "bias": False,
                "activation": "silu",
            },
            "name": "reordered_norm",
        }  # fmt: skip

    yarn = config["rope_scaling"]
    scaling = {
        "factor": yarn["factor"], "beta_fast": 32, "beta_slow": 1,
        "old_context_len": yarn["original_max_position_embeddings"],
        "_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig",
    }  # fmt: skip
    layers = config["num_hidden_layers"]
    return {
        "run_name": "tiny",
        "model": {
            "d_model": config["hidden_size"], "vocab_size": padded, "n_layers": layers, "name": "default",
            "block": block(None), "block_overrides": {str(layers - 1): block(scaling)},
            "lm_head": {"name": "default", "layer_norm": dict(norm), "bias": False},
            "init_method": "normal",
        },
        "dataset": {
            "tokenizer": {"vocab_size": config["vocab_size"], "eos_token_id": 0, "pad_token_id": 1},
            "sequence_length": 32,
        },
    }  # fmt: skip
