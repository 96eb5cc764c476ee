"""Drawing rows of tokens from a model, many at a time (ancestral sampling, as Liu et al. 2023 draw text to
quantize on: "LLM-QAT", arXiv:2305.17888).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from convert.progress import untold
from convert.sampling.rows import Row
from olmo3_mlx.generation.loop import LanguageModel

_CLEAR_EVERY = 256  # steps between returns of MLX's spare buffers to the system
_WARM, _TIMED = 2, 8  # steps: the first are slower, and after so many it can be told how long all take


def sampled(
    model: LanguageModel,
    rows: Sequence[Row],
    length: int,
    together: int,
    *,
    passed: Callable[[int], None] = untold,
    remaining: Callable[[float], None] = untold,
) -> list[list[int]]:
    """Draw `length` tokens for each row, `together` of them at a time, at temperature 1 from all of the
    vocabulary. Each row has noise of its own, so that what is drawn does not depend on the others but for the
    rounding of their products.

    `passed` is told of tokens that are done, `remaining`, once, how many seconds the rest will take.
    """
    drawn: list[list[int]] = []
    for start in range(0, len(rows), together):
        tell = untold if start else remaining
        batch = rows[start : start + together]
        clock = _Clock(length * -(-len(rows) // together), tell)
        drawn += _batch(model, batch, start, length, passed=passed, stepped=clock.step)
    return drawn


def _batch(
    model: LanguageModel,
    rows: Sequence[Row],
    first: int,
    length: int,
    *,
    passed: Callable[[int], None],
    stepped: Callable[[], None],
) -> list[list[int]]:
    """Draw the rows of which the first is number `first`."""
    caches = model.make_caches()
    keys = mx.stack([mx.random.split(mx.random.key(first + place), length) for place in range(len(rows))])
    following, steps = [0] * len(rows), []
    for step in range(length):
        ids = [row.next(token) for row, token in zip(rows, following, strict=True)]
        steps.append(ids)
        if step < length - 1:
            logits = model(mx.array(ids)[:, None], caches, logits_to_keep=1, checked=True)[:, -1]
            noise = mx.vmap(partial(_noise, logits.shape[-1]))(keys[:, step])
            # The largest of the logits with Gumbel noise is a draw from their softmax.
            following = (logits.astype(mx.float32) + noise).argmax(-1).tolist()  # type: ignore[assignment]
        if step % _CLEAR_EVERY == _CLEAR_EVERY - 1:
            mx.clear_cache()
        passed(len(rows))
        stepped()
    return [list(row) for row in zip(*steps, strict=True)]


def _noise(vocab_size: int, key: mx.array) -> mx.array:
    return mx.random.gumbel((vocab_size,), key=key)


class _Clock:
    """Tells after some steps how long the others will take."""

    def __init__(self, steps: int, tell: Callable[[float], None]) -> None:
        self._steps, self._tell = steps, tell
        self._done, self._begun = 0, 0.0

    def step(self) -> None:
        """A step is done."""
        self._done += 1
        if self._done == _WARM:
            self._begun = time.monotonic()
        elif self._done == _TIMED:
            each = (time.monotonic() - self._begun) / (_TIMED - _WARM)
            self._tell(each * (self._steps - self._done))
