"""Reading the config.json of a training run of OLMo-core as the one that Hugging Face's form has.

The official converter (OLMo-core, src/olmo_core/nn/hf/config.py) takes values from the built model; here they
come from the config that builds it. Values left out of it (None is never written) are OLMo-core's defaults.
Whatever changes the numbers and is not what every Olmo 3 has is refused; so are keys that nobody knows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from olmo3_mlx.config import FULL, SLIDING
from olmo3_mlx.errors import ConfigError
from olmo3_mlx.fields import Fields

# Keys of training and of how things are computed, which leave the numbers as they are.
_ANYWHERE = {"_CLASS_", "type", "dtype"}
_OF_MODEL = {
    "init_method", "init_seed", "init_std", "embedding_init_std", "freeze_params", "compile", "dp_config",
    "tp_config", "ac_config", "float8_config",
}  # fmt: skip
_OF_ATTENTION = {
    "dropout", "use_flash", "backend", "mxfp8_projections", "mxfp8_qkv_projection", "mxfp8_out_projection",
    "use_recompute_qkv_prep", "mxfp8_save_qkv_for_backward",
}  # fmt: skip
_RMS = ("rms", "fused_rms", "cute_rms")  # one formula, three kernels
_EPS = 1e-5  # OLMo-core's, where a norm names none


@dataclass(frozen=True)
class _Layer:
    """The values of one block's config; `window` is -1 where it does not slide."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    window: int
    scaling: tuple[tuple[str, float], ...] | None


def hugging_face_config(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of a native checkpoint -> that of a Hugging Face one; `where` names it in errors.

    Raises ConfigError for what is missing, and for what Olmo 3 does not have, by its key.
    """
    fields = Fields(data, where)
    model = fields.fields("model")
    tokenizer = fields.fields("dataset").fields("tokenizer")
    _check_model(model)
    vocabulary, padded = tokenizer.integer("vocab_size"), model.integer("vocab_size")
    if vocabulary > padded:
        raise tokenizer.refuse("vocab_size", f"at most the model's ({padded})")
    layers = _layers(model)
    first = layers[0]
    head_eps = _check_head(model.fields("lm_head"))
    for layer in layers:
        if _shared(layer) != _shared(first) or layer.eps != head_eps:
            raise ConfigError(f"{model.where}: expected blocks and head of one form, found several")
    scaling = _scaling(layers, model.where)
    windows = {layer.window for layer in layers} - {-1}
    if len(windows) > 1:
        raise ConfigError(f"{model.where}: expected one sliding window, found {sorted(windows)}")
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "vocab_size": vocabulary,
        "hidden_size": model.integer("d_model"),
        "intermediate_size": first.hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        **({} if first.head_dim * first.heads == model.integer("d_model") else {"head_dim": first.head_dim}),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": first.eps,
        "rope_theta": first.theta,
        "rope_scaling": scaling,
        "max_position_embeddings": _context(fields, scaling),
        "layer_types": [FULL if layer.window == -1 else SLIDING for layer in layers],
        **({"sliding_window": windows.pop()} if windows else {}),
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokenizer.data.get("bos_token_id"),
        "eos_token_id": tokenizer.integer("eos_token_id", least=0),
        "pad_token_id": tokenizer.integer("pad_token_id", least=0),
        "dtype": "bfloat16",
    }


def _shared(layer: _Layer) -> tuple[Any, ...]:
    return layer.hidden, layer.heads, layer.kv_heads, layer.head_dim, layer.eps, layer.theta


def _refuse_others(fields: Fields, known: set[str], neutral: Mapping[str, Any] | None = None) -> None:
    """Refuse keys that are not known, unless they are off, and `neutral` ones that are not as given."""
    for key, value in (neutral or {}).items():
        if key in fields and fields.data[key] not in (value, False):
            raise fields.refuse(key, f"{value!r} or absent, as in every Olmo 3")
    for key in sorted(fields.data.keys() - known - _ANYWHERE - (neutral or {}).keys()):
        if key in fields and fields.data[key] is not False:
            raise ConfigError(f"{fields.where}: do not know {key}, which may change the numbers")


def _must(fields: Fields, key: str, *values: Any, default: Any = None) -> None:
    """Refuse anything else; `default` is what OLMo-core takes for a key that is left out."""
    value = fields.data[key] if key in fields else default
    if not any(value == wanted and type(value) is type(wanted) for wanted in values):
        raise fields.refuse(key, f"{' or '.join(repr(v) for v in values)}, as in every Olmo 3")


def _check_model(model: Fields) -> None:
    known = {"name", "d_model", "vocab_size", "n_layers", "block", "block_overrides", "lm_head"}
    neutral = {"embedding_norm": None, "embed_scale": 1.0, "block_pattern": None, "tie_word_embeddings": None}
    _must(model, "name", "default", default="default")
    _refuse_others(model, known | _OF_MODEL, neutral)


def _check_head(head: Fields) -> float:
    """The eps of the last norm."""
    _must(head, "name", "default", default="default")
    _must(head, "bias", False, default=True)
    _refuse_others(head, {"name", "bias", "layer_norm", "loss_implementation"})
    return _eps(head.fields("layer_norm"))


def _eps(norm: Fields) -> float:
    _must(norm, "name", *_RMS, default="default")
    _must(norm, "bias", False, default=True)
    _must(norm, "elementwise_affine", True, default=True)
    _must(norm, "full_precision", True, default=True)
    _refuse_others(norm, {"name", "bias", "elementwise_affine", "full_precision", "eps"})
    return norm.number("eps", _EPS)


def _layers(model: Fields) -> list[_Layer]:
    """Each layer's own block, from `block` and `block_overrides`."""
    count = model.integer("n_layers")
    overrides = model.fields("block_overrides") if "block_overrides" in model else Fields({}, model.where)
    for key in overrides.data:
        if key not in map(str, range(count)):
            raise ConfigError(f"{overrides.where}: expected numbers of layers below {count}, got {key!r}")
    blocks = (
        overrides.fields(str(i)) if str(i) in overrides else model.fields("block") for i in range(count)
    )
    width = model.integer("d_model")
    return [_layer(block, i, count, width) for i, block in enumerate(blocks)]


def _layer(block: Fields, index: int, count: int, width: int) -> _Layer:
    alphas = {"attention_residual_alpha": 1.0, "feed_forward_residual_alpha": 1.0}
    parts = {"name", "sequence_mixer", "attention", "layer_norm", "feed_forward", "dropout"}
    _must(block, "name", "reordered_norm", default="default")
    _refuse_others(block, parts, {**alphas, "feed_forward_moe": None})
    if "attention" in block and "sequence_mixer" in block:
        raise block.refuse("attention", "absent beside sequence_mixer, which replaced it")
    attention = block.fields("attention" if "attention" in block else "sequence_mixer")
    _check_attention(attention)
    feed_forward = block.fields("feed_forward")
    _must(feed_forward, "name", "default", default="default")
    _must(feed_forward, "bias", False, default=True)
    _must(feed_forward, "activation", "silu", default="silu")
    _refuse_others(feed_forward, {"name", "bias", "activation", "hidden_size"})
    eps, qk_eps = _eps(block.fields("layer_norm")), _eps(attention.fields("qk_norm"))
    if eps != qk_eps:
        raise attention.fields("qk_norm").refuse("eps", f"{eps:g}, the block's")
    heads = attention.integer("n_heads")
    rope = attention.fields("rope")
    return _Layer(
        hidden=feed_forward.integer("hidden_size"),
        heads=heads,
        kv_heads=attention.integer("n_kv_heads", heads),
        head_dim=attention.integer("head_dim", width // heads),
        eps=eps,
        theta=rope.number("theta", 500_000, least=1.0),
        window=_window(attention, index, count),
        scaling=_rope_scaling(rope),
    )


def _check_attention(attention: Fields) -> None:
    known = {"name", "n_heads", "n_kv_heads", "head_dim", "bias", "rope", "qk_norm", "sliding_window"}
    neutral = {"gate": None, "clip_qkv": None, "use_head_qk_norm": None, "qk_norm_per_head_gains": None}
    if attention.data.get("type", "attention") != "attention":
        raise attention.refuse("type", '"attention"')
    _must(attention, "name", "default", default="default")
    _must(attention, "bias", False, default=True)
    _refuse_others(attention, known | _OF_ATTENTION, neutral)


def _rope_scaling(rope: Fields) -> tuple[tuple[str, float], ...] | None:
    """YaRN's four numbers by Hugging Face's names, None for plain RoPE."""
    _must(rope, "name", "default", default="default")
    _must(rope, "full_precision", True, default=True)
    neutral = {"no_global_rope": None, "partial_rotary_factor": 1.0}
    _refuse_others(rope, {"name", "full_precision", "theta", "scaling"}, neutral)
    if "scaling" not in rope:
        return None
    yarn = rope.fields("scaling")
    name = str(yarn.data.get("_CLASS_", "")).rpartition(".")[2]
    if name != "YaRNRoPEScalingConfig" and (name or "beta_fast" not in yarn):
        raise rope.refuse("scaling", "a YaRNRoPEScalingConfig, the only one that Olmo 3 has")
    known = {"factor", "beta_fast", "beta_slow", "old_context_len"}
    _refuse_others(yarn, known | {"attention_rescale_factor"})  # which OLMo-core ignores here too
    return (
        ("factor", yarn.number("factor", 8.0, least=1.0)),
        ("original_max_position_embeddings", yarn.integer("old_context_len", 8192)),
        ("beta_fast", yarn.number("beta_fast", 32)),
        ("beta_slow", yarn.number("beta_slow", 1)),
    )


def _window(attention: Fields, index: int, count: int) -> int:
    """The sliding window of layer `index`, -1 for full attention (SlidingWindowAttentionConfig)."""
    if "sliding_window" not in attention:
        return -1
    sliding = attention.fields("sliding_window")
    first = sliding.boolean("force_full_attention_on_first_layer", True)
    last = sliding.boolean("force_full_attention_on_last_layer", True)
    _refuse_others(
        sliding,
        {"pattern", "force_full_attention_on_first_layer", "force_full_attention_on_last_layer"},
    )
    pattern = sliding.data.get("pattern")
    sizes = pattern if isinstance(pattern, list) else []
    if not sizes or not all(type(size) is int and (size > 0 or size == -1) for size in sizes):
        raise sliding.refuse("pattern", "a list of window sizes, -1 for full attention")
    if (first and index == 0) or (last and index == count - 1):
        return -1
    return int(sizes[(index - first) % len(sizes)])


def _scaling(layers: list[_Layer], where: str) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, which holds for all full layers and for no other."""
    if any(layer.scaling for layer in layers if layer.window != -1):
        raise ConfigError(f"{where}: rope scaling must be on full-attention layers only, as in every Olmo 3")
    scalings = {layer.scaling for layer in layers if layer.window == -1}
    if len(scalings) > 1:
        raise ConfigError(f"{where}: rope scaling must be the same on all full-attention layers")
    yarn = dict(scalings.pop() or ()) if scalings else {}
    return (
        {"rope_type": "yarn", **yarn, "attention_factor": 0.1 * math.log(yarn["factor"]) + 1}
        if yarn
        else None
    )


def _context(fields: Fields, scaling: dict[str, Any] | None) -> int:
    """Tokens: what YaRN extends to, else the length of the sequences that it was trained on."""
    if scaling:
        extended: float = scaling["factor"] * scaling["original_max_position_embeddings"]
        return round(extended)
    for part, key in (("train_module", "max_sequence_length"), ("dataset", "sequence_length")):
        if part in fields and key in fields.fields(part):
            return fields.fields(part).integer(key)
    raise ConfigError(
        f"{fields.where}: says nothing of the context length: expected dataset: sequence_length "
        f"(8192 in stages 1 and 2)"
    )
