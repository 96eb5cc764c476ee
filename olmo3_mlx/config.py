"""What config.json and generation_config.json say, read once into frozen dataclasses.

Values that change the numbers and that we do not understand are refused by name; the rest is
ignored. The RoPE block has had several shapes since the first release (see `rope_by_layer_type`); all
of them become one RopeConfig per layer type, so that no other module asks which layer gets YaRN.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from olmo3_mlx.errors import ConfigError
from olmo3_mlx.fields import Fields
from olmo3_mlx.quantization import QuantizationConfig

SLIDING = "sliding_attention"
FULL = "full_attention"

_MOST_LAYERS = 1000  # a number that no model has would keep us building one for hours

_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "truncate", "partial_rotary_factor",
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer: plain ("default") or YaRN ("yarn").

    `attention_factor` scales queries and keys, so attention logits by its square; 1 if plain.
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Olmo3Config:
    """The architecture of one Olmo 3 checkpoint. Sizes are in elements, `rms_norm_eps` is absolute.

    `rope` maps each layer type that occurs to its RopeConfig; `sliding_window` counts the keys that
    a query sees, itself included, and is 0 where no layer slides.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int
    rope: Mapping[str, RopeConfig]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationConfig | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> "Olmo3Config":
        """Read the object in config.json; `where` names it in errors.

        Raises ConfigError for another architecture, a missing size, sizes that do not divide, an
        unknown layer or RoPE type, and whatever else would change the numbers.
        """
        fields = Fields(data, where)
        _refuse_other_architectures(fields)
        heads = fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", heads)
        hidden = fields.integer("hidden_size")
        if "head_dim" not in fields and hidden % heads:
            raise fields.refuse("num_attention_heads", f"a divisor of hidden_size ({hidden})")
        if heads % kv_heads:
            raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        head_dim = fields.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise ConfigError(f"{where}: the head dimension must be even for RoPE, not {head_dim}")
        layer_types = _layer_types(fields)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=len(layer_types),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            layer_types=layer_types,
            sliding_window=fields.integer("sliding_window") if SLIDING in layer_types else 0,
            rope=rope_by_layer_type(fields, layer_types),
            rms_norm_eps=fields.number("rms_norm_eps", least=1e-12),
            max_position_embeddings=_context_length(fields),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            eos_token_ids=fields.token_ids("eos_token_id"),
            quantization=QuantizationConfig.from_config(fields),
        )


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generating: where to stop, and how its makers sample it.

    `temperature` is 0 (greedy) unless the checkpoint asks for sampling. `max_new_tokens` is None
    where only the context ends an answer.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        eos_token_ids: tuple[int, ...] = (),
        where: str = "generation_config.json",
    ) -> "GenerationConfig":
        """Read generation_config.json; `eos_token_ids` (from config.json) join those it names.

        Some Olmo 3 checkpoints give a temperature and leave `do_sample` out: they mean to be
        sampled. Only an explicit `"do_sample": false` makes them greedy.
        """
        fields = Fields(data, where)
        asks = fields.boolean("do_sample", "temperature" in fields or "top_p" in fields)
        eos = dict.fromkeys(fields.token_ids("eos_token_id") + eos_token_ids)
        return cls(
            eos_token_ids=tuple(eos),
            temperature=fields.number("temperature", 1.0, most=100) if asks else 0.0,
            top_p=fields.number("top_p", 1.0, least=1e-6, most=1) if asks else 1.0,
            top_k=fields.integer("top_k", 0, least=0) if asks else 0,
            min_p=fields.number("min_p", 0.0, most=1) if asks else 0.0,
            repetition_penalty=fields.number("repetition_penalty", 1.0, least=1e-6, most=100),
            max_new_tokens=fields.integer("max_new_tokens") if "max_new_tokens" in fields else None,
            stop_strings=fields.strings("stop_strings"),
        )


def rope_by_layer_type(fields: Fields, layer_types: tuple[str, ...]) -> dict[str, RopeConfig]:
    """One RopeConfig for each layer type that occurs. The shapes, by what wrote the file:

    transformers 4.x          `rope_theta` and `rope_scaling` (or null): scaling is for full layers
    transformers 5.0 to 5.12  `rope_parameters`, flat: still means YaRN on full layers only,
                              although those versions themselves applied it to every layer
    transformers 5.13 on      `rope_parameters`, one object per layer type
    """
    if fields.data.get("rope_parameters") in (None, {}):
        return _older_rope(fields, fields.number("rope_theta", least=1.0), layer_types)
    rope = _newer_rope(fields, layer_types)
    if "rope_scaling" in fields or "rope_theta" in fields:
        _refuse_two_ropes(fields, rope)
    return rope


def _older_rope(fields: Fields, theta: float, layer_types: tuple[str, ...]) -> dict[str, RopeConfig]:
    scaled = fields.fields("rope_scaling") if "rope_scaling" in fields else None
    return _scaled_on_full_layers(fields, scaled, theta, layer_types)


def _newer_rope(fields: Fields, layer_types: tuple[str, ...]) -> dict[str, RopeConfig]:
    parameters = fields.fields("rope_parameters")
    if not {SLIDING, FULL} & parameters.data.keys():
        theta = parameters.number("rope_theta", fields.data.get("rope_theta"), least=1.0)
        return _scaled_on_full_layers(fields, parameters, theta, layer_types)
    _refuse_lost_yarn(parameters)
    rope = {}
    for kind in sorted(set(layer_types)):
        of_kind = parameters.fields(kind)
        theta = of_kind.number("rope_theta", fields.data.get("rope_theta"), least=1.0)
        rope[kind] = _rope_config(of_kind, theta, fields)
    return rope


def _scaled_on_full_layers(
    fields: Fields, scaled: Fields | None, theta: float, layer_types: tuple[str, ...]
) -> dict[str, RopeConfig]:
    plain = RopeConfig(theta)
    full = _rope_config(scaled, theta, fields) if scaled else plain
    return {kind: full if kind == FULL else plain for kind in sorted(set(layer_types))}


def _rope_config(rope: Fields, theta: float, fields: Fields) -> RopeConfig:
    for key in sorted(rope.data.keys() - _ROPE_KEYS):
        if key not in (SLIDING, FULL):
            raise ConfigError(f"{rope.where}: do not know the RoPE key {key}, which may change the numbers")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.refuse("partial_rotary_factor", "1 (Olmo 3 rotates whole heads)")
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.data.get(key) or "default"
    if rope.data.get("type") not in (None, kind):
        raise ConfigError(
            f"{rope.where} contradicts itself: rope_type is {kind!r} and type {rope.data['type']!r}: take "
            f"out the one that is wrong"
        )
    if kind == "default":
        return RopeConfig(theta)
    if kind != "yarn":
        raise rope.refuse(key, '"default" or "yarn"')
    factor = rope.number("factor", least=1.0)
    return RopeConfig(
        theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", fields.data.get("max_position_embeddings")
        ),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", 0.1 * math.log(factor) + 1.0),
        truncate=rope.boolean("truncate", True),
    )


def _refuse_two_ropes(fields: Fields, rope: Mapping[str, RopeConfig]) -> None:
    """Raise ConfigError if the keys of transformers 4, beside `rope_parameters`, say something else: which of
    the two a program reads differs, and so would the numbers. What they leave out contradicts nothing.
    """
    for kind, newer in rope.items():
        theta = fields.number("rope_theta", newer.theta, least=1.0)
        older = replace(newer, theta=theta)
        if "rope_scaling" in fields:
            older = _older_rope(fields, theta, (kind,))[kind]
        if older != newer:
            key = "rope_theta" if theta != newer.theta else "rope_scaling"
            raise ConfigError(
                f"{fields.where} contradicts itself: {key} and rope_parameters differ for {kind}: take out "
                f"the one that is wrong (the released Olmo 3 models use yarn on {FULL}, and nowhere else)"
            )


def _refuse_lost_yarn(parameters: Fields) -> None:
    """A flat 5.0-5.12 file saved again by 5.13 says YaRN at the top and plain RoPE below it.

    Both readings are whole models with different logits, so neither may be picked in silence.
    """
    flat = parameters.data.get("rope_type") or parameters.data.get("type")
    full = parameters.data.get(FULL)
    below = (full.get("rope_type") or full.get("type")) if isinstance(full, dict) else None
    if flat and below and flat != below:
        raise ConfigError(
            f"{parameters.where} contradicts itself: rope_type is {flat!r} at the top and {below!r} "
            f"under {FULL}; transformers 5.13 loses YaRN this way when it saves an older file "
            f"again: take out the keys that are wrong (the released Olmo 3 models use yarn)"
        )


def _refuse_other_architectures(fields: Fields) -> None:
    if fields.data.get("model_type") != "olmo3":
        raise fields.refuse("model_type", '"olmo3" (other architectures: use mlx-lm)')
    for key, value in (("hidden_act", "silu"), ("attention_bias", False)):
        if key in fields and fields.data[key] != value:
            raise fields.refuse(key, f"{value!r}, as in every Olmo 3")


def _layer_types(fields: Fields) -> tuple[str, ...]:
    count = fields.integer("num_hidden_layers")
    if count > _MOST_LAYERS:
        raise fields.refuse("num_hidden_layers", f"at most {_MOST_LAYERS}")
    if "layer_types" not in fields:  # transformers' rule: every fourth layer is a full one
        return tuple(FULL if (i + 1) % 4 == 0 else SLIDING for i in range(count))
    kinds = fields.data["layer_types"]
    if not isinstance(kinds, list):
        raise fields.refuse("layer_types", "a list of names")
    if len(kinds) != count:
        raise ConfigError(f"{fields.where}: layer_types has {len(kinds)} names, num_hidden_layers is {count}")
    for i, kind in enumerate(kinds):
        if kind not in (SLIDING, FULL):
            raise ConfigError(
                f"{fields.where}: layer_types[{i}] must be {SLIDING!r} or {FULL!r}, not {kind!r}"
            )
    return tuple(kinds)


def _context_length(fields: Fields) -> int:
    if fields.data.get("max_position_embeddings") == -1:
        raise fields.refuse(
            "max_position_embeddings",
            "the context length (OLMo-core's converter writes -1 unless told: put 65536, or 8192 "
            "for stages 1 and 2)",
        )
    return fields.integer("max_position_embeddings")
