"""Token ids are checked before a model sees them: MLX reads out of bounds for an id that has no row."""

from collections.abc import Sequence

import mlx.core as mx

from olmo3_mlx.errors import PromptError


def check_token_ids(ids: Sequence[int] | mx.array, vocab_size: int) -> None:
    """Raise PromptError for no ids at all, and for one outside 0 to vocab_size - 1."""
    if not len(ids):
        raise PromptError("the prompt is empty: expected at least one token")
    for token in _extremes(ids) if isinstance(ids, mx.array) else (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"token id {token} is outside the model's vocabulary of {vocab_size}: the tokenizer belongs "
                f"to another model"
            )


def _extremes(ids: mx.array) -> list[int]:
    # On the CPU's stream, so that it does not wait for what a GPU still has to do.
    return [int(extreme(ids, stream=mx.cpu).item()) for extreme in (mx.min, mx.max)]  # type: ignore[arg-type]
