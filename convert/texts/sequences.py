"""Texts cut into sequences of tokens, a fair share of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import mlx.core as mx

from convert.texts.kinds import Label, Tokenized
from olmo3_mlx.errors import OptionError


@dataclass(frozen=True)
class TextRead:
    """A text, as far as it was read: so many sequences of so many tokens."""

    label: Label
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """The number of tokens read."""
        return self.sequences * self.length

    def figures(self) -> dict[str, Any]:
        """What programs are told of it."""
        label = self.label
        return {
            "kind": label.kind,
            "name": label.name,
            "about": label.about,
            "sha256": label.sha256,
            "sequences": self.sequences,
            "length": self.length,
        }


@dataclass(frozen=True)
class Sequences:
    """Sequences of tokens [N, L], the kind of each of the N, and what was read of which text."""

    tokens: mx.array
    kinds: tuple[str, ...]
    texts: tuple[TextRead, ...]


def as_many_of_each(texts: Sequence[Tokenized], length: int, count: int) -> Sequences:
    """Cut `count` sequences of `length` tokens out of each text, text by text.

    Raises OptionError for a text that is too short, and for a count or length that cannot be.
    """
    if length < 2 or count < 1:
        raise OptionError(f"expected 1 or more sequences of 2 or more tokens, not {count} of {length}")
    for text in texts:
        if text.count < length * count:
            raise OptionError(
                f"{text.label.name} is too short: {length * count} tokens are needed "
                f"({_in_words(count, length)}), it has {text.count}: give a longer one"
            )
    rows = [cut(text, length, count) for text in texts]
    kinds = tuple(text.label.kind for text in texts for _ in range(count))
    return Sequences(mx.array([*chain(*rows)]), kinds, tuple(TextRead(t.label, count, length) for t in texts))


def shared_out(texts: Sequence[Tokenized], length: int, count: int, least: int) -> Sequences:
    """Cut `count` sequences of `length` tokens out of all texts together, or as many as they have, if those
    are at least `least`. Each text gives the same number of them; what it has not got, the others give. Any
    first ones of the sequences are a fair mix of the kinds.

    Raises OptionError for texts that are too short.
    """
    whole = [text.count // length for text in texts]
    _check_long_enough(texts, whole, length, least)
    shares = _shares(whole, count)
    kept = [(text, share) for text, share in zip(texts, shares, strict=True) if share]
    rows = []
    for place, (text, share) in enumerate(kept):
        spread = _spread(cut(text, length, share))
        rows += [((i + 0.5) / share, place, text.label.kind, row) for i, row in enumerate(spread)]
    rows.sort(key=lambda row: row[:2])
    return Sequences(
        mx.array([row for *_, row in rows]),
        tuple(kind for _, _, kind, _ in rows),
        tuple(TextRead(text.label, share, length) for text, share in kept),
    )


def cut(text: Tokenized, length: int, count: int) -> list[list[int]]:
    """Cut `count` sequences of `length` tokens out of a text that has as many, evenly spread and apart. Where
    there is room, one begins where a document does.
    """
    ids = list(chain(*text.documents))
    starts = [0, *accumulate(map(len, text.documents))]
    rows, free = [], 0  # the first token that is not taken
    for i in range(count):
        even = i * (len(ids) - length) // max(1, count - 1)
        last = len(ids) - (count - i) * length  # so that the others fit behind it
        near = [start for start in starts if free <= start <= last]
        start = min(near, key=lambda start: abs(start - even)) if near else min(max(even, free), last)
        if abs(start - even) > length // 2:  # not at the price of the spread
            start = min(max(even, free), last)
        rows.append(ids[start : start + length])
        free = start + length
    return rows


def _check_long_enough(texts: Sequence[Tokenized], whole: Sequence[int], length: int, least: int) -> None:
    has = ", ".join(f"{text.label.name} {text.count:,}" for text in texts)
    if sum(whole) < least:
        one = texts[0].label.name if len(texts) == 1 else "the texts"
        verb, they, them = (
            ("is", "it has", "a longer one, or others too")
            if len(texts) == 1
            else ("are", "they have", "more")
        )
        each = f" ({has})" if len(texts) > 1 else ""
        raise OptionError(
            f"{one} {verb} too short: {length * least} tokens are needed ({_in_words(least, length)}), "
            f"{they} {sum(text.count for text in texts)}{each}: give {them}"
        )
    for text, sequences in zip(texts, whole, strict=True):
        if not sequences:
            raise OptionError(
                f"{text.label.name} is too short: {length} tokens are needed, one sequence, it has "
                f"{text.count}: give a longer one, or leave it out"
            )


def _in_words(count: int, length: int) -> str:
    return f"{count} sequence{'s' if count > 1 else ''} of {length}"


def _shares(whole: Sequence[int], count: int) -> list[int]:
    """How many of `count` each gives: all the same, but no more than it has."""
    shares = [0] * len(whole)
    for _ in range(min(count, sum(whole))):  # one by one to whom has the least
        shares[min((i for i in range(len(whole)) if shares[i] < whole[i]), key=lambda i: shares[i])] += 1
    return shares


def _spread(rows: list[list[int]]) -> list[list[int]]:
    """The rows in an order whose beginnings are spread over all of them: by their places' bits, backwards."""
    bits = max(1, (len(rows) - 1).bit_length())
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: f"{i:0{bits}b}"[::-1])]
