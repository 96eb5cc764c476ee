"""Olmo 3: a decoder-only transformer that normalises what its blocks put out, not what they take in.

    tokens [B, L]
      embed_tokens
      ┌─ num_hidden_layers blocks: three of sliding-window attention, then one of full attention
      │    x ─ attention ─ norm ─ + ─ feed-forward ─ norm ─ + ─        (post-norm)
      │    └──────────────────────┘└────────────────────────┘          (residuals)
      └─
      norm
      lm_head
    logits [B, L, V]

What sets it apart: no norm before attention or feed-forward, only after; queries and keys are
normalised over the whole projection before they are split into heads; sliding layers use plain RoPE
and full layers YaRN. 7B is multi-head, 32B grouped-query. Modules bear the names of the
checkpoint's tensors. Shapes: B batch, L new tokens, S seen by attention, H query heads,
K key-value heads, D head dimension, V vocabulary.
"""

from collections.abc import Sequence
from typing import Unpack

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from olmo3_mlx.caches.attention import KeysValues, pace
from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.caches.growing import KVCache
from olmo3_mlx.caches.options import CacheKeywords, CacheOptions
from olmo3_mlx.caches.rotating import RotatingKVCache
from olmo3_mlx.config import FULL, GenerationConfig, Olmo3Config
from olmo3_mlx.errors import CacheError, OptionError, PromptError
from olmo3_mlx.fused import fused
from olmo3_mlx.rope import RotaryEmbedding
from olmo3_mlx.token_ids import check_token_ids

PACED_FROM = 512  # tokens in a pass from which its layers run one after the other, see `pace`


class Attention(nn.Module):
    """Multi-head or grouped-query attention with normalised, rotated queries and keys."""

    def __init__(self, config: Olmo3Config, layer_type: str) -> None:
        super().__init__()
        rope = config.rope[layer_type]
        self.window = 0 if layer_type == FULL else config.sliding_window
        self.head_dim = config.head_dim
        # YaRN multiplies queries and keys by the attention factor; their product takes its square.
        self.scale = config.head_dim**-0.5 * rope.attention_factor**2
        self.rope = RotaryEmbedding(rope, config.head_dim)

        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(queries, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(keys, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: Cache | None) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        offset = cache.offset if cache is not None else 0
        queries = self.rope(self._heads(self.q_norm(self.q_proj(x))), offset)  # [B, H, L, D]
        keys = self.rope(self._heads(self.k_norm(self.k_proj(x))), offset)  # [B, K, L, D]
        values = self._heads(self.v_proj(x))
        seen = cache.append(keys, values) if cache is not None else KeysValues(keys, values)
        out = seen.attention(queries, scale=self.scale, window=self.window)  # [B, H, L, D]
        return self.o_proj(out.transpose(0, 2, 1, 3).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, 2, (-1, self.head_dim)).transpose(0, 2, 1, 3)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: Olmo3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Attention, then feed-forward; each one's output is normalised and added to its input."""

    def __init__(self, config: Olmo3Config, layer_type: str) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_type)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: Cache | None) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        x = x + self.post_attention_layernorm(self.self_attn(x, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm: tokens to hidden states."""

    def __init__(self, config: Olmo3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config, layer_type) for layer_type in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, tokens: mx.array, caches: Sequence[Cache] | None) -> mx.array:
        """tokens [B, L] -> [B, L, hidden]."""
        # The norm's dtype is the model's: an mxfp4 embedding comes out as bfloat16 whatever that is.
        x = self.embed_tokens(tokens).astype(self.norm.weight.dtype)
        each = caches if caches is not None else [None] * len(self.layers)
        for layer, cache in zip(self.layers, each, strict=True):
            before, x = x, layer(x, cache)
            if tokens.shape[1] >= PACED_FROM:
                pace([before, x])
        return self.norm(x)


class Olmo3(nn.Module):
    """The language model. `generation_config` holds what its checkpoint says about sampling it."""

    def __init__(self, config: Olmo3Config, generation_config: GenerationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.generation_config = generation_config or GenerationConfig(config.eos_token_ids)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        tokens: mx.array,
        caches: Sequence[Cache] | None = None,
        *,
        logits_to_keep: int | None = None,
        checked: bool = False,
    ) -> mx.array:
        """tokens [B, L] -> logits [B, L, V], or [B, n, V] with `logits_to_keep=n`.

        With `caches` (from `make_caches`) the tokens continue what those hold, which is updated;
        without, they are the whole text. Only the last n positions go through the head with
        `logits_to_keep=n`.

        Raises PromptError for an id outside the vocabulary, which MLX would read out of bounds, and for
        tokens of another shape. `checked` says that the ids are known to be right: looking at those
        that a model has just chosen would wait for them. Raises CacheError if the caches are not one
        per layer, OptionError if `logits_to_keep` is not positive.
        """
        if tokens.ndim != 2 or tokens.size == 0:
            raise PromptError(f"expected token ids of shape [B, L], not {list(tokens.shape)}")
        if not checked:
            check_token_ids(tokens, self.config.vocab_size)
        if logits_to_keep is not None and logits_to_keep < 1:
            raise OptionError(f"logits_to_keep must be at least 1, not {logits_to_keep}")
        if caches is not None and len(caches) != self.config.num_hidden_layers:
            raise CacheError(
                f"expected {self.config.num_hidden_layers} caches, one per layer, got {len(caches)}"
            )
        hidden = self.model(tokens, caches)
        if logits_to_keep is not None:
            hidden = hidden[:, -logits_to_keep:]
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    @property
    def dtype(self) -> mx.Dtype:
        """What it computes in: its norms' type, as those are never quantized."""
        return self.model.norm.weight.dtype

    def tensors(self) -> dict[str, mx.array]:
        """Every parameter by its name in the checkpoint."""
        return dict(tree_flatten(self.parameters()))

    def quantizable(self) -> dict[str, tuple[int, int]]:
        """The layers that can be quantized, by path: linear ones, embedding and head, [outputs, inputs]."""
        layers = {p for p, module in self.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
        shapes = {name.removesuffix(".weight"): array.shape for name, array in self.tensors().items()}
        return {path: (shape[0], shape[1]) for path, shape in shapes.items() if path in layers}

    def make_caches(
        self, options: CacheOptions | None = None, **keywords: Unpack[CacheKeywords]
    ) -> list[Cache]:
        """Empty caches, one per layer, in the form that `options` say. Keywords go over them: kv_bits,
        kv_group_size, kv_start and rewind.

        Raises OptionError for a value outside its range.
        """
        options = CacheOptions.of(options, **keywords)
        quantization = options.quantization(self.config.head_dim)
        window = self.config.sliding_window
        return [
            KVCache(quantization, options.start)
            if layer_type == FULL
            else RotatingKVCache(window, options.rewind, quantization, options.start)
            for layer_type in self.config.layer_types
        ]


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, elementwise; one fused kernel on a GPU."""
    return gate * mx.sigmoid(gate) * up


swiglu = fused(_swiglu, shapeless=True)
