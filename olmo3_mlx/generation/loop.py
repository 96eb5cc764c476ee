"""The loop: a prompt's ids into caches (prefill), then one id after another (decode).

Knows ids, caches and a model; no text. The model is anything that fits LanguageModel.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from olmo3_mlx.caches.cache import Cache, rewind
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.errors import OptionError, PromptError
from olmo3_mlx.token_ids import check_token_ids

# Tokens in one forward pass. A GPU wants many; a CPU is as fast with few, and sooner interrupted.
PREFILL_CHUNK = {mx.DeviceType.gpu: 2048, mx.DeviceType.cpu: 256}

_CLEAR_EVERY = 256  # tokens between returns of MLX's spare buffers to the system


class LanguageModel(Protocol):
    """tokens [B, L] and caches -> logits [B, L, V], or of the last n positions only."""

    config: Any  # of which vocab_size and max_position_embeddings are asked

    def __call__(
        self,
        tokens: mx.array,
        caches: list[Cache],
        *,
        logits_to_keep: int | None = None,
        checked: bool = False,
    ) -> mx.array:
        """Run the tokens after what the caches hold, which is updated; see Olmo3.__call__."""
        ...

    def make_caches(self, options: CacheOptions | None = None) -> list[Cache]:
        """Empty caches, one per layer, in the form that `options` say."""
        ...


Sample = Callable[[mx.array], mx.array]  # logits [1, V] -> token [1]
Progress = Callable[[int, int], None]  # tokens done, tokens in all


def check_prompt(ids: Sequence[int], vocab_size: int, context: int) -> None:
    """Raise PromptError for a prompt that `check_token_ids` refuses, or that leaves no room for an answer in
    a context of `context` tokens.
    """
    check_token_ids(ids, vocab_size)
    if len(ids) >= context:
        raise PromptError(
            f"the prompt has {len(ids)} tokens, the context is {context}: shorten it, so that an answer "
            f"fits too"
        )


def prefill(
    model: LanguageModel,
    ids: Sequence[int],
    caches: list[Cache],
    *,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> mx.array:
    """Run a prompt, `chunk` tokens a pass (PREFILL_CHUNK unless given); return the logits [1, V]
    after its last token.

    The last token has no pass of its own, and only its position goes through the head. `progress`
    is called after each pass, when the caches hold what was done: raising from it stops cleanly.
    """
    chunk = PREFILL_CHUNK[mx.default_device().type] if chunk is None else chunk
    if chunk < 1:
        raise OptionError(f"the prefill chunk must be at least 1, not {chunk}")
    if not ids:
        raise PromptError("the prompt is empty: expected at least one token")
    logits = mx.zeros((1, 0))
    for start in range(0, len(ids), chunk):
        tokens = mx.array([ids[start : start + chunk]])
        logits = model(tokens, caches, logits_to_keep=1)[:, -1]
        last = start + chunk >= len(ids)
        # Without a use of the logits the head is never evaluated.
        mx.eval([cache.state for cache in caches], logits if last else [])
        mx.clear_cache()
        if progress is not None:
            progress(min(start + chunk, len(ids)), len(ids))
    return logits


def decode(
    model: LanguageModel,
    logits: mx.array,
    caches: list[Cache],
    sample: Sample,
    max_tokens: int,
) -> Generator[int]:
    """Yield up to `max_tokens` ids, the first from `logits` [1, V].

    The next step is queued before the current id is read, so that a GPU never waits for Python.
    When the loop is over, exhausted or closed, the caches hold every id that was yielded but the last.
    """
    token = sample(logits)
    mx.async_eval(token)
    for count in range(1, max_tokens + 1):
        queued = count < max_tokens
        if queued:
            following = sample(model(token[None], caches, logits_to_keep=1, checked=True)[:, -1])
            mx.async_eval(following)
        chosen = int(token.item())  # type: ignore[arg-type]
        try:
            yield chosen
        except BaseException:
            if queued:
                rewind(caches, 1)
            raise
        if queued:
            token = following
        if count % _CLEAR_EVERY == 0:
            mx.clear_cache()
