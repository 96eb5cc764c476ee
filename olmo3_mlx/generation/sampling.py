"""Logits to one token: greedy, or sampled from what temperature and filters leave."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from olmo3_mlx.option_checks import check_number

_LARGEST_FACTOR = 1e30  # beyond this, float32 differences of logits overflow anyway


@dataclass(frozen=True)
class SamplingOptions:
    """The settings for picking a token. Raises OptionError for values outside their range.

    temperature         divides the logits; 0 picks the likeliest token, and the filters do nothing
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the likeliest tokens that together reach probability p; 1 keeps all
    min_p               keep tokens at least p times as likely as the likeliest; 0 keeps all
    repetition_penalty  divides positive and multiplies negative logits of all tokens seen so far,
                        the prompt's included (Keskar et al. 2019, arXiv:1909.05858); 1 is none
    seed                makes sampling repeatable; None takes a fresh one
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, lambda t: 0 <= t <= 100, "from 0 to 100")
        check_number("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1")
        check_number("top_k", self.top_k, lambda k: k >= 0, "0 or more", whole=True)
        check_number("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        check_number("repetition_penalty", penalty, lambda r: 0 < r <= 100, "above 0 and at most 100")
        if self.seed is not None:
            in_range = "from 0 to 2**64 - 1"
            check_number("seed", self.seed, lambda s: 0 <= s < 2**64, in_range, whole=True)


class Sampler:
    """Picks tokens for one answer; it remembers what was seen and its place in the random sequence.

    The steps and their order are those of transformers: penalty, temperature, top-k, top-p, min-p.
    """

    def __init__(self, options: SamplingOptions, seen: Sequence[int] = ()) -> None:
        """`seen` are the prompt's ids, which only the repetition penalty looks at."""
        self.options = options
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self._key = mx.random.key(seed)
        self._prompt = list(seen)
        self._seen: mx.array | None = None  # [V], True where a token has been seen

    def __call__(self, logits: mx.array) -> mx.array:
        """logits [1, V] -> token [1], lazily: nothing is evaluated here."""
        logits = logits.astype(mx.float32)
        if self.options.repetition_penalty != 1:
            logits = self._penalise(logits)
        token = self._draw(logits) if self.options.temperature > 0 else mx.argmax(logits, axis=-1)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _penalise(self, logits: mx.array) -> mx.array:
        if self._seen is None:
            self._seen = mx.zeros(logits.shape[-1], dtype=mx.bool_)
            if self._prompt:
                self._seen[mx.array(self._prompt)] = True
        penalty = self.options.repetition_penalty
        return mx.where(self._seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)

    def _draw(self, logits: mx.array) -> mx.array:
        options = self.options
        # From the highest down, so that a tiny temperature leaves just that one and no NaN.
        logits = logits - mx.max(logits, axis=-1, keepdims=True)
        logits = logits * min(1 / options.temperature, _LARGEST_FACTOR)
        if 0 < options.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, options.top_k)
        if options.top_p < 1:
            logits = keep_top_p(logits, options.top_p)
        if options.min_p > 0:
            logits = keep_min_p(logits, options.min_p)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logits, key=key)


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """logits [..., V], all but the k highest set to -inf; what ties with the k-th stays."""
    return _keep(logits, logits >= mx.min(mx.topk(logits, k), axis=-1, keepdims=True))


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751): [..., V] -> [..., V].

    Keeps the fewest likeliest tokens whose probabilities reach p; what ties with the last stays.
    """
    ordered = mx.sort(mx.softmax(logits, axis=-1), axis=-1)[..., ::-1]
    before = mx.cumsum(ordered, axis=-1) - ordered
    least = mx.min(mx.where(before < p, ordered, math.inf), axis=-1, keepdims=True)
    return _keep(logits, mx.softmax(logits, axis=-1) >= least)


def keep_min_p(logits: mx.array, p: float) -> mx.array:
    """Min-p (Nguyen et al. 2024, arXiv:2407.01082): keep tokens at least p times the likeliest."""
    return _keep(logits, logits >= mx.max(logits, axis=-1, keepdims=True) + math.log(p))


def _keep(logits: mx.array, kept: mx.array) -> mx.array:
    return mx.where(kept, logits, -math.inf)
