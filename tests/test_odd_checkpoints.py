"""Checkpoints as exporters, editors and half-finished copies leave them: each runs as the original does, or
is refused in a line. None is read as something else in silence.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model, save_checkpoint
from test_checkpoint import (
    TOKENS,
    config,
    file,
    gone,
    largest_difference,
    shape_of,
    shard,
    tensors,
    write_index,
)

from olmo3_mlx import Olmo3, Olmo3Error, Tokenizer, load

Change = Callable[[Path], Any]

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
HELLO = [{"role": "user", "content": "Hello"}]
SCALING: dict[str, Any] = TINY["rope_scaling"]
QUANTIZED = {"bits": 4, "group_size": 32}


def generation(**data: Any) -> Change:
    return file("generation_config.json", json.dumps(data).encode())


def tokenizer_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return change


def after(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def with_bom(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def in_windows_lines(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))


def links_to_blobs(folder: Path) -> None:
    """As huggingface_hub's cache has it."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def template_into_config(folder: Path) -> None:
    tokenizer_config(chat_template=(folder / "chat_template.jinja").read_text())(folder)


def index_that_names_the_single_file(folder: Path) -> None:
    names = dict.fromkeys(random_model(TINY).tensors(), "model.safetensors")
    write_index(folder, names)


# What runs, with the same logits and the same prompt.
RUNS: dict[str, Change] = {
    "config.json with a byte order mark": with_bom("config.json"),
    "tokenizer_config.json with a byte order mark": with_bom("tokenizer_config.json"),
    "a template with a byte order mark": with_bom("chat_template.jinja"),
    "a template in Windows lines": in_windows_lines("chat_template.jinja"),
    "config.json in Windows lines": in_windows_lines("config.json"),
    "links into a cache": links_to_blobs,
    "RoPE's frequencies of each layer": shape_of("model.layers.0.self_attn.rotary_emb.inv_freq", mx.ones(8)),
    "RoPE's frequencies at the top": shape_of("model.rotary_emb.inv_freq", mx.ones(8)),
    "an index that names the single file": index_that_names_the_single_file,
    "an index without metadata": lambda folder: shard(folder, 2),
    "files of other programs": after(
        file("consolidated.safetensors", b"?"),
        file("pytorch_model.bin", b"?"),
        file("tokenizer.model", b"?"),
        file("modeling_olmo3.py", b"raise SystemExit"),
        file(".DS_Store", b"?"),
        file("._model.safetensors", b"?"),
    ),
    "an optimizer beside the weights": file("optimizer.safetensors", b"?"),
    "whole numbers as floats": config(hidden_size=64.0, max_position_embeddings=256.0, sliding_window=8.0),
    "other dtypes in config.json": config(torch_dtype="bfloat16", dtype="float16"),
    "no dtype in config.json": config(torch_dtype=None, dtype=None),
    "several architectures": config(architectures=["Olmo3Model", "Olmo3ForCausalLM"]),
    "keys of training": config(
        use_cache=False, attention_dropout=0.1, pad_token_id=1, initializer_range=0.02
    ),
    "keys of unsloth and axolotl": config(
        unsloth_version="2026.1", _attn_implementation="sdpa", _attn_implementation_autoset=True
    ),
    "head_dim spelled out": config(head_dim=16),
    "layer types spelled out": config(layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    "type for rope_type": config(
        rope_scaling={("type" if k == "rope_type" else k): v for k, v in SCALING.items()}
    ),
    "rope_type twice": config(rope_scaling={**SCALING, "type": "yarn"}),
    "RoPE of both versions": config(
        rope_parameters={
            "full_attention": {**SCALING, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    ),
    "an empty RoPE block beside the older keys": config(rope_parameters={}),
    "null for what is absent": lambda folder: (folder / "config.json").write_text(
        json.dumps({**TINY, "head_dim": None, "rope_parameters": None, "quantization": None})
    ),
    "a null head count for keys and values of one": config(num_key_value_heads=2),
    "a long context": config(max_position_embeddings=1_000_000),
    "an empty generation_config.json": generation(),
    "generation defaults of older programs": generation(
        max_length=20, num_beams=1, do_sample=None, top_k=None
    ),
    "an end token beyond the vocabulary": generation(eos_token_id=[10**6]),
    "no end tokens": after(config(eos_token_id=None), generation(eos_token_id=[])),
    "an end token that the tokenizer does not have": tokenizer_config(eos_token="<|nowhere|>"),
    "no end token in the tokenizer": tokenizer_config(eos_token=None),
    "a tokenizer of a class that nobody has": tokenizer_config(tokenizer_class="Olmo3TokenizerFast"),
    "an auto_map": after(
        config(auto_map={"AutoModel": "x.Y"}), tokenizer_config(auto_map={"A": ["x.Y", None]})
    ),
    "a maximum of text far too large": tokenizer_config(model_max_length=10**30),
    "the template in tokenizer_config.json": after(template_into_config, gone("chat_template.jinja")),
    "an older template in tokenizer_config.json": tokenizer_config(chat_template="older"),
    "an adapter's settings beside a merged model": file("adapter_config.json", b'{"r": 8}'),
    "folders within": lambda folder: (folder / "original").mkdir(),
}

# What is refused, with what the line says.
REFUSED: dict[str, tuple[Change, str]] = {
    "weights that are a Git LFS pointer": (file("model.safetensors", POINTER), "git lfs pull"),
    "a tokenizer that is a Git LFS pointer": (
        file("tokenizer.json", POINTER),
        r"tokenizer\.json: is a Git LFS",
    ),
    "a config that is a Git LFS pointer": (
        file("config.json", POINTER),
        r"config\.json: is a Git LFS pointer",
    ),
    "a template that is a Git LFS pointer": (
        file("chat_template.jinja", POINTER),
        r"jinja: is a Git LFS pointer",
    ),
    "more layers than any model has": (
        config(num_hidden_layers=10**8),
        "num_hidden_layers must be at most 1000",
    ),
    "no eps": (config(rms_norm_eps=0), "rms_norm_eps must be a finite number of at least 1e-12"),
    "a web page for a config": (file("config.json", b"<!DOCTYPE html>"), "expected a JSON object"),
    "weights under another prefix": (
        tensors(lambda t: [t.update({f"_orig_mod.{n}": t.pop(n)}) for n in list(t)]),
        "lacks .* and 27 more",
    ),
    "experts": (
        shape_of("model.layers.0.mlp.experts.0.up_proj.weight", mx.ones((96, 64))),
        "does not call for",
    ),
    "a classifier's head": (shape_of("score.weight", mx.ones((2, 64))), r"does not call for: score\.weight"),
    "joined projections": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.qkv_proj.weight": mx.ones((128, 64))})),
        r"does not call for: model\.layers\.0\.self_attn\.qkv_proj",
    ),
    "LoRA weights left unmerged": (
        shape_of("model.layers.0.self_attn.q_proj.lora_A.weight", mx.ones((4, 64))),
        r"does not call for: .*lora_A",
    ),
    "a resized embedding": (
        shape_of("model.embed_tokens.weight", mx.ones((130, 64))),
        r"\[128, 64\], not \[130, 64\]",
    ),
    "64-bit weights": (shape_of("model.norm.weight", mx.ones(64, mx.int64)), r"model\.norm\.weight is I64"),
    "a type of the next generation": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes().replace(b'"F32"', b'"F8_E4M3"'[:5])
        ),
        r"model\.safetensors: ",
    ),
    "another quantization": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "'bitsandbytes'; load the",
    ),
    "half of a quantization": (
        after(config(quantization=QUANTIZED), shape_of("lm_head.scales", mx.ones((128, 2)))),
        "lm_head",
    ),
    "a number as text": (config(rms_norm_eps="1e-6"), "rms_norm_eps must be a number, not '1e-6'"),
    "theta as text": (config(rope_theta="10000"), "rope_theta must be a number"),
    "a sliding window that is off": (config(sliding_window=None), "sliding_window must be"),
    "linear RoPE": (config(rope_scaling={"type": "linear", "factor": 8.0}), '"default" or "yarn"'),
    "dynamic RoPE": (config(rope_scaling={"rope_type": "dynamic", "factor": 8.0}), '"default" or "yarn"'),
    "a RoPE key of another model": (config(rope_scaling={**SCALING, "mscale": 1.0}), "RoPE key mscale"),
    "part of a head rotated": (
        config(rope_scaling={**SCALING, "partial_rotary_factor": 0.5}),
        "rotates whole heads",
    ),
    "two names for a type of RoPE": (
        config(rope_scaling={**SCALING, "type": "linear"}),
        "contradicts itself",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act must be 'silu'"),
    "biases": (config(attention_bias=True), "attention_bias must be False"),
    "the model before": (config(model_type="olmo2"), 'model_type must be "olmo3"'),
    "a size that no machine has": (config(hidden_size=10**30), "hidden_size"),
    "an end token as text": (config(eos_token_id="<|im_end|>"), "eos_token_id must be a token id"),
    "a temperature as text": (generation(temperature="0.6"), "temperature must be a number"),
    "sampling as a number": (generation(do_sample=1), "do_sample must be true or false"),
    "a template's name without its text": (
        after(tokenizer_config(chat_template=[{"name": "default"}]), gone("chat_template.jinja")),
        "chat_template must be a text",
    ),
    "an empty template": (file("chat_template.jinja", b""), "renders nothing"),
    "a link to weights that are gone": (
        after(gone("model.safetensors"), lambda folder: (folder / "model.safetensors").symlink_to("nowhere")),
        r"expected model\.safetensors, found none",
    ),
    "an empty folder": (after(*(gone(name) for name in FILES)), r"found no config\.json in it"),
    "a model of llama.cpp": (
        after(file("model.gguf", b"GGUF"), gone("model.safetensors")),
        "not in safetensors form",
    ),
    "weights in pickles": (
        after(file("pytorch_model.bin", b"PK"), gone("model.safetensors")),
        "not in safetensors form",
    ),
    "shards of two models": (
        after(
            lambda folder: shard(folder, 2),
            gone("model.safetensors.index.json"),
            file("model-00001-of-00003.safetensors", b""),
        ),
        "expected model.safetensors.index.json, which says",
    ),
}


@pytest.fixture(scope="module")
def tiny_and_prompt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Olmo3, str]:
    folder = save_checkpoint(tmp_path_factory.mktemp("whole") / "tiny", TINY, random_model(TINY).tensors())
    model, tokenizer = load(folder)
    return model, tokenizer.apply_chat_template(HELLO)


@pytest.fixture
def folder(tmp_path: Path, tiny_and_prompt: tuple[Olmo3, str]) -> Path:
    return save_checkpoint(tmp_path / "tiny", TINY, tiny_and_prompt[0].tensors())


@pytest.mark.parametrize("change", RUNS.values(), ids=RUNS)
def test_a_checkpoint_with_an_oddity_runs_as_without_it(
    folder: Path, tiny_and_prompt: tuple[Olmo3, str], change: Change
) -> None:
    change(folder)
    model, tokenizer = load(folder)
    assert largest_difference(model(TOKENS), tiny_and_prompt[0](TOKENS)) < 1e-6
    assert tokenizer.apply_chat_template(HELLO) == tiny_and_prompt[1]


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_cannot_be_what_it_says_is_refused_in_a_line(
    folder: Path, change: Change, said: str
) -> None:
    change(folder)
    with pytest.raises(Olmo3Error, match=said) as error:
        load(folder)
        Tokenizer.from_folder(folder).apply_chat_template(HELLO)
    assert "\n" not in str(error.value)
    assert not re.search(r"Error\(|object has no|Traceback|NoneType", str(error.value))
