"""What the cases of same_output.py are run on: small checkpoints, damaged ones, texts, recipes, a hub.

Nothing here is what is measured: both sides are given the same files.
"""

import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS))

from conftest import TINY, random_model, save_checkpoint  # noqa: E402
from fake_hub import JUNK, FakeHub, shard  # noqa: E402
from native_writer import run_config, write_native  # noqa: E402

SHARED = TESTS.parents[1] / "shared"
DEMO = TESTS.parent / "olmo3_mlx" / "demo"
NORM = "model.norm.weight"
YARN = TINY["rope_scaling"]
# A vocabulary that fits the demo's tokenizer; no eos, so that answers have the length that is asked for.
CONFIG = {**TINY, "vocab_size": 8192, "eos_token_id": None}
# Every width divides by 64, where TINY's feed-forward does not.
EVEN = {**CONFIG, "intermediate_size": 128}
# As narrow as heads of 32 and quantized caches allow.
HEADS = {**CONFIG, "num_attention_heads": 2, "num_key_value_heads": 1}

Damage = Callable[[Path], object]


def config_with(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors_with(change: Callable[[dict[str, mx.array]], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(path), tensors, metadata={"format": "pt"})

    return rewrite


def tensor(name: str, array: mx.array) -> Damage:
    return tensors_with(lambda tensors: tensors.update({name: array}))


def cut_to(fraction: float) -> Damage:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * fraction)])

    return cut


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def file(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def renamed_words(folder: Path) -> None:
    """Two tokens of the tokenizer change places."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    ids = data["model"]["vocab"]
    ids["Ġthe"], ids["Ġof"] = ids["Ġof"], ids["Ġthe"]
    path.write_text(json.dumps(data))


# Copies of the small checkpoint, each with something wrong, or told in another way.
DAMAGED: dict[str, Damage] = {
    "no-config": without("config.json"),
    "config-no-json": file("config.json", "{"),
    "config-a-list": file("config.json", "[]"),
    "llama": config_with(model_type="llama"),
    "no-eps": config_with(rms_norm_eps=None),
    "rope-ntk": config_with(rope_scaling={**YARN, "rope_type": "ntk"}),
    "layer-linear": config_with(layer_types=["full_attention"] * 3 + ["linear_attention"]),
    "heads-5": config_with(num_attention_heads=5, num_key_value_heads=5),
    "window-0": config_with(sliding_window=0),
    "says-quantized": config_with(quantization={"group_size": 32, "bits": 4}),
    "no-weights": without("model.safetensors"),
    "cut-header": cut_to(0.00002),
    "cut-body": cut_to(0.5),
    "lacks-norm": tensors_with(lambda tensors: tensors.pop(NORM)),
    "has-bias": tensor("lm_head.bias", mx.zeros(8192)),
    "has-scales": tensor("lm_head.scales", mx.zeros((8192, 2))),
    "wrong-shape": tensor(NORM, mx.ones(65)),
    "wrong-type": tensor(NORM, mx.ones(64, mx.int32)),
    "nan": tensor(NORM, mx.full(64, float("nan"))),
    "inf": tensor(NORM, mx.full(64, float("inf"))),
    "large": tensor(NORM, mx.full(64, 1e30)),
    "no-tokenizer": without("tokenizer.json"),
    "bad-tokenizer": file("tokenizer.json", "{}"),
    "no-template": without("chat_template.jinja"),
    "template-none": file("chat_template.jinja", "{% if %}"),
    "template-unsafe": file("chat_template.jinja", "{{ ().__class__.__base__.__subclasses__() }}"),
    "template-refuses": file("chat_template.jinja", "{{ raise_exception('only\nhaiku') }}"),
    "generation-bad": file("generation_config.json", '{"temperature": "warm"}'),
    "generation-set": file("generation_config.json", '{"temperature": 0.8, "top_p": 0.9, "do_sample": true}'),
    "other-tokenizer": renamed_words,
    "index-outside": file("model.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}'),
    "index-promises": file("model.safetensors.index.json", '{"weight_map": {"a": "a.safetensors"}}'),
}

RECIPES = {
    "mixed.toml": 'bits = 4\ngroup_size = 32\n[layers]\n"*.down_proj" = 6\n"lm_head" = "none"\n',
    "group64.toml": 'bits = 3\n[layers]\n"*.v_proj" = { bits = 8, group_size = 32 }\n',
    "nobits.toml": "bits = 7\n",
    "broken.toml": "bits = \n",
    "unknown.toml": "bit = 4\n",
    "rule.toml": '[layers]\n"lm_head" = "all"\n',
    "nomatch.toml": '[layers]\n"no.such.layer" = 8\n',
}


def make(folder: Path) -> None:
    """Fill a folder with everything; each entry is seen by every case under its name."""
    tiny = save_checkpoint(folder / "tiny", CONFIG, random_model(CONFIG).tensors())
    save_checkpoint(folder / "even", EVEN, random_model(EVEN, seed=1).tensors())
    save_checkpoint(folder / "heads", HEADS, random_model(HEADS, seed=2).tensors())
    fewer = {**CONFIG, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    save_checkpoint(folder / "shallow", fewer, random_model(fewer).tensors())
    save_checkpoint(folder / "small-vocabulary", TINY, random_model(TINY).tensors())
    native = run_config(CONFIG, 8192)
    write_native(folder / "native", native, random_model(CONFIG).tensors())
    for name, damage in DAMAGED.items():
        damage(shutil.copytree(tiny, folder / name))
    _shard(tiny, folder / "sharded")
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    (folder / "short.txt").write_text("Too short to measure on.\n")
    prose = "The rain had stopped before noon, and the road was dry again. " * 400
    (folder / "prose.txt").write_text(prose)
    (folder / "latin1.txt").write_bytes(b"caf\xe9\n")
    (folder / "calibration.txt").write_text(
        _first(TESTS.parent / "convert" / "text" / "calibration" / "prose.txt", 45_000)
    )
    (folder / "demo-files").symlink_to(DEMO)
    if SHARED.is_dir():
        for lab in (SHARED / "lab").glob("olmo3-lab-*"):
            (folder / lab.name).symlink_to(lab)


def _first(path: Path, characters: int) -> str:
    return path.read_text(encoding="utf-8")[:characters]


def _shard(tiny: Path, folder: Path) -> None:
    """The small checkpoint in two files with an index."""
    shutil.copytree(tiny, folder)
    files = {"model.safetensors": (folder / "model.safetensors").read_bytes()}
    shard(files, folder)
    for name in ("model.safetensors", "whole.safetensors"):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@contextmanager
def hub(folder: Path) -> Iterator[FakeHub]:
    """A hub with the checkpoint in `folder` as olmo/tiny, at a port of this machine; `got` names what was
    fetched from it.
    """
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    staged = {**files, "config.json": files["config.json"] + b" "}
    fake = FakeHub({"main": {**files, **JUNK}, "stage1": {**staged, **JUNK}})
    fake.branches = ["main", "stage1-step1000", "stage1-step20", "stage2-ingredient1-step5-tokens21B", "odd"]
    fake.tags = ["v1", "step_0100"]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fake.answer(self)

        def do_HEAD(self) -> None:
            fake.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
