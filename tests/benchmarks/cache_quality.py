"""What quantized caches cost: KL divergence from, and perplexity beside, unquantized ones; and what each
part of the scheme brings.

    python tests/benchmarks/cache_quality.py [--tokens 2000] [--checkpoint NAME] [--text NAME]

Each scheme reads the first tokens after character 20,000 of a novel in one pass, in float32. "kv_bits"
rows are the caches themselves; the others hand attention what such a cache would give back. The figures
for 1,024 tokens are those of the same pass over its first part. Needs ../shared; takes about half an
hour of one core.
"""

import argparse
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from olmo3_mlx import Olmo3, load
from olmo3_mlx.caches.attention import KeysValues
from olmo3_mlx.caches.buffered import STEP
from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.caches.growing import KVCache
from olmo3_mlx.caches.quantized import KVQuantization, _rounded

SHARED = Path(__file__).parents[3] / "shared"
CHECKPOINTS = ("olmo3-lab-chat", "olmo3-lab-gqa")
TEXTS = ("wuthering_heights", "treasure_island")
SHORT = 1024

Coder = Callable[[mx.array], mx.array]  # [B, K, L, D] -> what comes back
Bits = Callable[[int], float]  # bits a value takes, by the head dimension


@dataclass
class Rounding:
    """A cache for one pass that gives back what it rounded."""

    keys: Coder
    values: Coder
    offset: int = 0
    rewindable: int = 0
    nbytes: int = 0

    @property
    def state(self) -> list[mx.array]:
        return []

    def append(self, keys: mx.array, values: mx.array) -> KeysValues:
        return KeysValues(self.keys(keys), self.values(values))

    def rewind(self, count: int) -> None:
        raise NotImplementedError


def plain(bits: int) -> Coder:
    """mx.quantize as it stands: a scale and a bias for 64 values."""
    return lambda x: mx.dequantize(*mx.quantize(x, group_size=64, bits=bits), group_size=64, bits=bits)


def symmetric(
    bits: int, *, refit: bool = True, heads: int = 1, dtype: mx.Dtype = mx.float32, group: int = 64
) -> Coder:
    """One scale for `group` values of `heads` heads; the value of largest magnitude gets code 0."""
    half = 2 ** (bits - 1)

    def rounded(x: mx.array, scales: mx.array) -> mx.array:
        return mx.clip(mx.round(x / scales), -half, half - 1)

    def coder(x: mx.array) -> mx.array:
        batch, all_heads, length, dim = x.shape
        groups = x.reshape(batch, all_heads // heads, heads, length, dim // group, group)
        groups = groups.transpose(0, 1, 3, 4, 2, 5).flatten(-2)  # [B, K / heads, L, D / group, heads * group]
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        scales = mx.where(high > -low, high, low) / -half
        if refit:
            codes = rounded(groups, scales)
            scales = (codes * groups).sum(-1, keepdims=True) / (codes * codes).sum(-1, keepdims=True)
        scales = scales.astype(dtype).astype(x.dtype)
        back = mx.unflatten(rounded(groups, scales) * scales, -1, (heads, group))
        return back.transpose(0, 1, 4, 2, 3, 5).reshape(x.shape)

    return coder


def rotated(coder: Coder) -> Coder:
    """In the basis of a Hadamard matrix, which is its own inverse: turning back what comes out gives the
    products that turned queries would."""
    return lambda x: mx.hadamard_transform(coder(mx.hadamard_transform(x)))


# Bits a value takes, counted from arrays and buffers with 2-byte constants.


def sample(dim: int) -> mx.array:
    return mx.random.normal((1, 2, STEP, dim), key=mx.random.key(0)).astype(mx.bfloat16)


def counted(arrays: list[mx.array], values: int) -> float:
    return sum(array.nbytes for array in arrays) * 8 / values


def plain_bits(key_bits: int, value_bits: int) -> Bits:
    def bits(dim: int) -> float:
        x = sample(dim)
        arrays = [
            part for bits in (key_bits, value_bits) for part in mx.quantize(x, group_size=64, bits=bits)
        ]
        return counted(arrays, 2 * x.size)

    return bits


def symmetric_bits(key_bits: int, value_bits: int, group: int | None = None) -> Bits:
    def bits(dim: int) -> float:
        x = sample(dim)
        arrays = [part for bits in (key_bits, value_bits) for part in _rounded(x, bits, group or dim)]
        return counted(arrays, 2 * x.size)

    return bits


def cache_bits(kv_bits: int | None) -> Bits:
    def bits(dim: int) -> float:
        x = sample(dim)
        cache = KVCache(None if kv_bits is None else KVQuantization(kv_bits, dim, dim))
        cache.append(x, x)  # STEP positions fill its buffers
        return counted(cache.state, 2 * x.size)

    return bits


@dataclass(frozen=True)
class Scheme:
    name: str
    caches: Callable[[Olmo3], list[Cache]]
    bits: Bits
    heads: int = 1  # that share a scale; the checkpoint must have a multiple of it


def rounding(name: str, keys: Coder, values: Coder, bits: Bits, heads: int = 1) -> Scheme:
    def caches(model: Olmo3) -> Any:  # with what a single pass asks of a cache
        return [Rounding(keys, values) for _ in model.model.layers]

    return Scheme(name, caches, bits, heads)


def ours(kv_bits: int) -> Scheme:
    name = f"**kv_bits={kv_bits}**"
    return Scheme(name, lambda model: model.make_caches(kv_bits=kv_bits), cache_bits(kv_bits))


def symmetric_of(name: str, value_bits: int, *, turn: bool, refit: bool, **options: object) -> Scheme:
    keys = symmetric(4, refit=refit, **options)  # type: ignore[arg-type]
    values = symmetric(value_bits, refit=refit, **options)  # type: ignore[arg-type]
    heads, group = int(str(options.get("heads", 1))), options.get("group")
    bits = symmetric_bits(4, value_bits, int(str(group)) if group else None)
    if heads > 1:  # what they cost stands for a head of 128
        return rounding(name, rotated(keys), values, lambda _: bits(128), heads)
    return rounding(name, rotated(keys) if turn else keys, values, bits)


BF16 = mx.bfloat16
SCHEMES = [
    rounding("plain 8/8", plain(8), plain(8), plain_bits(8, 8)),
    ours(8),
    rounding("plain 8/4", plain(8), plain(4), plain_bits(8, 4)),
    rounding("plain 4/4", plain(4), plain(4), plain_bits(4, 4)),
    rounding("plain 4/4, keys rotated", rotated(plain(4)), plain(4), plain_bits(4, 4)),
    symmetric_of("symmetric 4/4", 4, turn=False, refit=False),
    symmetric_of("symmetric 4/4, keys rotated", 4, turn=True, refit=False),
    symmetric_of("symmetric 4/4, keys rotated, refitted", 4, turn=True, refit=True),
    symmetric_of("symmetric 4/5, keys rotated", 5, turn=True, refit=False),
    symmetric_of("symmetric 4/5, refitted", 5, turn=False, refit=True),
    ours(4),
    symmetric_of("the same, scales in bfloat16", 5, turn=True, refit=True, dtype=BF16),
    symmetric_of("the same, one scale for 32 values", 5, turn=True, refit=True, group=32),
    symmetric_of("the same, one scale for 2 heads (128 values)", 5, turn=True, refit=True, heads=2),
]


def log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def perplexity(log: mx.array, ids: mx.array) -> float:
    following = mx.take_along_axis(log[:-1], ids[1:, None], axis=-1)
    return float(mx.exp(-following.mean()))


def divergence(exact: mx.array, found: mx.array) -> float:
    return float((mx.exp(exact) * (exact - found)).sum(-1).mean())


def measure(checkpoint: str, text: str, tokens: int) -> None:
    model, tokenizer = load(SHARED / "lab" / checkpoint, dtype="float32")
    excerpt = (SHARED / "text" / f"{text}.txt").read_text(encoding="utf-8")[20_000 : 20_000 + 16 * tokens]
    ids = mx.array(list(tokenizer.encode(excerpt))[:tokens])
    exact = log_probabilities(model(ids[None])[0])
    mx.eval(exact)
    lengths = sorted({min(SHORT, tokens), tokens})
    print(f"\n### {checkpoint}, {text}\n")
    columns = " | ".join(f"KL, {n:,} tokens | perplexity" for n in lengths)
    print(f"| keys/values | bits at head 64 | at 128 | {columns} |\n|---|---|---|{'---|---|' * len(lengths)}")
    row = " | ".join(f"0 | {perplexity(exact[:n], ids[:n]):.3f}" for n in lengths)
    bits = cache_bits(None)
    print(f"| unquantized | {bits(64):g} | {bits(128):g} | {row} |", flush=True)
    for scheme in SCHEMES:
        if model.config.num_key_value_heads % scheme.heads:
            continue
        log = log_probabilities(model(ids[None], scheme.caches(model))[0])
        mx.eval(log)
        row = " | ".join(
            f"{divergence(exact[:n], log[:n]):.5f} | {perplexity(log[:n], ids[:n]):.3f}" for n in lengths
        )
        print(f"| {scheme.name} | {scheme.bits(64):g} | {scheme.bits(128):g} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS)
    parser.add_argument("--text", choices=TEXTS)
    options = parser.parse_args()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("olmo3-mlx", "mlx"))
    print(f"{platform.platform()}, Python {platform.python_version()}, {versions}, {mx.default_device()}")
    for checkpoint in [options.checkpoint] if options.checkpoint else CHECKPOINTS:
        for text in [options.text] if options.text else TEXTS:
            measure(checkpoint, text, options.tokens)


if __name__ == "__main__":
    main()
