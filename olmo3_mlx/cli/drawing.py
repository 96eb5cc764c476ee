"""The architecture as a drawing in characters, with the parameters of each part."""

from itertools import groupby

from olmo3_mlx.config import FULL, SLIDING, Olmo3Config, RopeConfig
from olmo3_mlx.memory.sizes import layer_counts, parameters_by_part


def drawing(config: Olmo3Config) -> str:
    """The drawing, from tokens to logits."""
    c = config
    parts = parameters_by_part(c)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    kind = "multi-head" if c.num_key_value_heads == c.num_attention_heads else "grouped-query"
    head = "embed_tokens again (tied)" if c.tie_word_embeddings else f"{c.hidden_size:,} → {c.vocab_size:,}"
    rows: list[tuple[str, str | None]] = [
        ("   tokens", None),
        ("     │", None),
        (f"   embed_tokens   {c.vocab_size:,} × {c.hidden_size:,}", "embedding"),
        ("     │", None),
        (f" ╭─ {c.num_hidden_layers} blocks: {_pattern(c)}", None),
        (" │   ├─────────╮", None),
        (f" │   │     self_attn   {kind}: {c.num_attention_heads} query heads, "
         f"{c.num_key_value_heads} key-value heads of {c.head_dim}", "attention"),
        (f" │   │         │       q_norm, k_norm: RMSNorm over all {queries:,} and all {keys:,}, before "
         "the split into heads", None),
        *((f" │   │         │       {k}: sees {_sees(c, k)}, {_rope(c.rope[k])}", None)
          for k in (SLIDING, FULL) if k in c.layer_types),
        (" │   │     RMSNorm     post_attention_layernorm", None),
        (" │  (+)◀───────╯", None),
        (" │   ├─────────╮", None),
        (f" │   │        mlp      SwiGLU {c.hidden_size:,} → {c.intermediate_size:,} → {c.hidden_size:,}",
         "feed-forward"),
        (" │   │     RMSNorm     post_feedforward_layernorm", None),
        (" │  (+)◀───────╯", None),
        (" ╰─  │", None),
        (f"   norm           RMSNorm, eps {c.rms_norm_eps:g} (counted: all norms)", "norms"),
        ("     │", None),
        (f"   lm_head        {head}", "head"),
        ("     │", None),
        ("   logits", None),
    ]  # fmt: skip
    width = max(len(text) for text, part in rows if part) + 3
    total = sum(parts.values())
    return "\n".join(
        f"{text:<{width}}{count(parts[part]):>9} {parts[part] / total:6.1%}" if part else text
        for text, part in rows
    )


def _pattern(config: Olmo3Config) -> str:
    sliding, full = layer_counts(config)
    runs = [len(list(run)) for kind, run in groupby(config.layer_types)]
    if sliding and full and runs == [runs[0], 1] * full and config.layer_types[0] == SLIDING:
        return f"({runs[0]} sliding + 1 full) × {full}"
    return f"{sliding} sliding, {full} full"


def _sees(config: Olmo3Config, kind: str) -> str:
    return f"{config.sliding_window:,} tokens" if kind == SLIDING else "all tokens"


def _rope(rope: RopeConfig) -> str:
    if rope.rope_type == "default":
        return f"plain RoPE θ {rope.theta:,.0f}"
    return (
        f"YaRN × {rope.factor:g} from {rope.original_max_position_embeddings:,} θ {rope.theta:,.0f}, "
        f"attention factor {rope.attention_factor:.4f}"
    )


def count(parameters: int) -> str:
    """A number of parameters as people read it: 7.30 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)
