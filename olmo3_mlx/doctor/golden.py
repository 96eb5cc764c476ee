"""What the embedded demo says on a machine that is right: golden.json, which ships with the package.

`tests/record_golden.py --record` makes it: ids by this program, then logits by the float64 oracle of the
tests, which shares no code with it, and a rendered conversation.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from olmo3_mlx.doctor.tolerances import NEAR_TIE

GOLDEN = Path(__file__).with_name("golden.json")


@dataclass(frozen=True)
class Golden:
    """The demo's files and words.

    files           SHA-256 of each file that says what it is
    messages, tools a conversation, `rendered` its prompt text and `rendered_ids` that text's ids
    ids             a prompt of `prompt_tokens` ids, and 200 that follow it greedily
    following       the likeliest id after each of `ids` but the last
    leads           how far its logit is above the second one's
    spreads         the standard deviation of the logits there
    positions       places in `ids` whose logits are kept, `logits`, of the vocabulary's ids `sampled`
    """

    files: Mapping[str, str]
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    rendered: str
    rendered_ids: Sequence[int]
    prompt_tokens: int
    ids: Sequence[int]
    following: Sequence[int]
    leads: Sequence[float]
    spreads: Sequence[float]
    positions: Sequence[int]
    sampled: Sequence[int]
    logits: Sequence[Sequence[float]]

    @classmethod
    def read(cls, path: Path = GOLDEN) -> "Golden":
        """What the file says."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def error(self, found: mx.array) -> float:
        """How far logits [n, V] after the first n ids are from the kept ones: at the worst position, the root
        mean square of the differences in units of the logits' standard deviation. Not a number if any is.
        """
        kept = [i for i, position in enumerate(self.positions) if position < found.shape[0]]
        rows, spreads = (mx.array([of[i] for i in kept]) for of in (self.positions, self._kept_spreads))
        expected = mx.array([self.logits[i] for i in kept])
        with mx.stream(mx.cpu):
            difference = found[rows][:, mx.array(list(self.sampled))].astype(mx.float32) - expected
            errors = mx.sqrt((difference * difference).mean(axis=-1)) / spreads
            return worst(errors)

    def other_ids(self, chosen: Sequence[int], tolerance: float, start: int = 0) -> tuple[list[int], int]:
        """The positions from `start` on after which another id was chosen than the likeliest one, and how
        many more there are at which the two likeliest are so near each other that logits within `tolerance`
        may choose either.
        """
        others = [start + i for i, id_ in enumerate(chosen) if id_ != self.following[start + i]]
        wrong = [at for at in others if self.leads[at] > NEAR_TIE * tolerance * self.spreads[at]]
        return wrong, len(others) - len(wrong)

    @property
    def _kept_spreads(self) -> list[float]:
        return [self.spreads[position] for position in self.positions]


def relative_errors(found: mx.array, expected: mx.array) -> mx.array:
    """Root mean squares over logits [n, V] of the differences, in units of the expected ones' standard
    deviation: [n].
    """
    with mx.stream(mx.cpu):
        found, expected = found.astype(mx.float32), expected.astype(mx.float32)
        return mx.sqrt(((found - expected) ** 2).mean(axis=-1)) / mx.sqrt(mx.var(expected, axis=-1))


def worst(errors: mx.array) -> float:
    """The largest; not a number if any is none."""
    with mx.stream(mx.cpu):
        return float("nan") if mx.isnan(errors).any().item() else float(errors.max().item())  # type: ignore[arg-type]
