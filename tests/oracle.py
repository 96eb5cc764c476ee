"""Olmo 3 in float64 NumPy, written from the definition and importing nothing of ours.

Slow and plain on purpose: one position and one head at a time, no cache, no fused anything.
`forward` takes switches that break it in the ways other ports of Olmo 3 were broken: the tests see
that each of them would be caught.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def forward(
    config: dict[str, Any],
    tensors: dict[str, Array],
    tokens: list[int],
    *,
    mutant: str | None = None,
) -> Array:
    """Logits [L, V] of one sequence. `config` is a transformers-4 config.json of Olmo 3."""
    x = tensors["model.embed_tokens.weight"][tokens]
    eps = config["rms_norm_eps"]
    for i, kind in enumerate(layer_types(config)):
        layer = {
            name.removeprefix(f"model.layers.{i}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{i}.")
        }
        norms = [layer[f"post_{part}_layernorm.weight"] for part in ("attention", "feedforward")]
        if mutant == "pre-norm":
            x = x + attention(config, layer, rms_norm(x, norms[0], eps), kind, mutant)
            x = x + mlp(layer, rms_norm(x, norms[1], eps))
        else:
            x = x + rms_norm(attention(config, layer, x, kind, mutant), norms[0], eps)
            x = x + rms_norm(mlp(layer, x), norms[1], eps)
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return x @ head.T


def attention(
    config: dict[str, Any], layer: dict[str, Array], x: Array, kind: str, mutant: str | None
) -> Array:
    length = len(x)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    dim = config.get("head_dim", config["hidden_size"] // heads)
    eps = config["rms_norm_eps"]
    q, k, v = (x @ layer[f"self_attn.{p}_proj.weight"].T for p in "qkv")
    q_weight, k_weight = layer["self_attn.q_norm.weight"], layer["self_attn.k_norm.weight"]
    if mutant == "norm-per-head":
        q, k = (
            np.concatenate([rms_norm(part, w, eps) for part, w in zip(*pieces, strict=True)], axis=-1)
            for pieces in (
                (np.split(q, heads, -1), np.split(q_weight, heads)),
                (np.split(k, kv_heads, -1), np.split(k_weight, kv_heads)),
            )
        )
    elif mutant != "no-qk-norm":
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    q = q.reshape(length, heads, dim)
    k = k.reshape(length, kv_heads, dim)
    v = v.reshape(length, kv_heads, dim)

    yarn = kind == "full_attention" and config.get("rope_scaling") is not None
    if mutant == "rope-swapped":
        yarn = not yarn
    elif mutant == "yarn-everywhere":
        yarn = True
    elif mutant == "no-yarn":
        yarn = False
    if mutant != "no-rope":
        q, k = rotate(config, q, yarn, mutant), rotate(config, k, yarn, mutant)

    window = config["sliding_window"] if kind == "sliding_attention" else length
    if mutant == "window-ignored":
        window = length
    elif mutant in ("window-one-more", "window-one-less") and kind == "sliding_attention":
        window += 1 if mutant == "window-one-more" else -1

    out = np.zeros((length, heads, dim))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        if mutant == "kv-heads-interleaved":
            shared = head % kv_heads
        for here in range(length):
            first = max(0, here - window + 1)
            seen = slice(first, here + 1)
            scores = k[seen, shared] @ q[here, head] / math.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[here, head] = weights @ v[seen, shared] / weights.sum()
    return out.reshape(length, heads * dim) @ layer["self_attn.o_proj.weight"].T


def rotate(config: dict[str, Any], x: Array, yarn: bool, mutant: str | None) -> Array:
    """Rotate pair (i, i + D/2) of x [L, heads, D] by position times frequency i."""
    half = x.shape[-1] // 2
    theta = config["rope_theta"]
    frequencies = np.array([theta ** (-i / half) for i in range(half)])
    factor = 1.0
    if yarn:
        scaling = config["rope_scaling"]
        frequencies = yarn_frequencies(frequencies, scaling, theta)
        factor = scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1
        if mutant == "attention-factor-ignored":
            factor = 1.0
    angles = np.arange(len(x))[:, None] * frequencies
    cos, sin = np.cos(angles)[:, None] * factor, np.sin(angles)[:, None] * factor
    if mutant == "rope-interleaved":
        even, odd = x[..., ::2], x[..., 1::2]
        turned = np.empty_like(x)
        turned[..., ::2], turned[..., 1::2] = even * cos - odd * sin, odd * cos + even * sin
        return turned
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def yarn_frequencies(plain: Array, scaling: dict[str, Any], theta: float) -> Array:
    """Interpolate what turns less than beta_slow times in the original context, keep what turns more
    than beta_fast times, blend linearly in between."""
    half = len(plain)
    original = scaling["original_max_position_embeddings"]

    def index(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(index(scaling["beta_fast"])), 0)
    high = min(math.ceil(index(scaling["beta_slow"])), 2 * half - 1)
    interpolated = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
    blended: Array = plain * (1 - interpolated) + plain / scaling["factor"] * interpolated
    return blended


def mlp(layer: dict[str, Array], x: Array) -> Array:
    gate, up, down = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    hidden = x @ gate.T
    out: Array = (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T
    return out


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    normed: Array = weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return normed


def layer_types(config: dict[str, Any]) -> list[str]:
    derived = [
        "full_attention" if (i + 1) % 4 == 0 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]
    return list(config.get("layer_types") or derived)
