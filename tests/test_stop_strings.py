"""StopStrings: an answer ends where a stop string begins, and no part of one is ever shown."""

import random
from collections.abc import Sequence

import pytest

from olmo3_mlx.errors import OptionError
from olmo3_mlx.text.stop_strings import StopStrings

SEEDS = range(2000)


def a_text(rng: random.Random, least: int, most: int) -> str:
    """Of a small alphabet, so that texts are full of stop strings and of their beginnings."""
    return "".join(rng.choices("abc\n😀"[: rng.randint(1, 5)], k=rng.randint(least, most)))


def in_pieces(rng: random.Random) -> list[str]:
    """A text in pieces, some of them empty."""
    text = a_text(rng, 0, 30)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 10)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def shown_in_all(pieces: Sequence[str], stop: Sequence[str]) -> str:
    """What somebody who reads the answer to its end has seen."""
    stops = StopStrings(stop)
    return "".join(stops.add(piece) for piece in pieces) + stops.finish()


def assert_ends_at_the_first_stop(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    came = shown = ""
    for piece in pieces:
        came += piece
        shown += stops.add(piece)
        starts = [came.index(s) for s in stop if s in came]
        if starts:
            assert stops.found
            assert shown == came[: min(starts)]  # as shown only grows, no part of it was ever shown
            assert stops.add(piece) == stops.finish() == ""
            return
        assert not stops.found
        held = came.removeprefix(shown)
        assert shown + held == came
        assert not held or any(s.startswith(held) for s in stop)  # no more held back than may stop
    assert shown + stops.finish() == came
    assert not stops.found


def test_the_shown_text_ends_at_the_first_stop_string_that_the_pieces_complete() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        stop = [a_text(rng, 1, 4) for _ in range(rng.randint(0, 4))]
        assert_ends_at_the_first_stop(in_pieces(rng), stop)


def test_one_stop_string_cuts_a_text_at_the_same_place_however_it_is_split() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        pieces, stop = in_pieces(rng), a_text(rng, 1, 4)
        assert shown_in_all(pieces, [stop]) == "".join(pieces).partition(stop)[0], (pieces, stop)


def test_a_stop_string_is_never_shown_in_part() -> None:
    stops = StopStrings(["</answer>"])
    assert [stops.add(piece) for piece in ("42", " <", "/ans", "wer", "> and more")] == [
        "42",
        " ",
        "",
        "",
        "",
    ]
    assert stops.found
    assert stops.finish() == ""


def test_what_was_held_back_is_shown_when_it_turns_out_to_be_no_stop_string() -> None:
    stops = StopStrings(["</answer>"])
    assert [stops.add(piece) for piece in ("a </ans", "wers> b")] == ["a ", "</answers> b"]


def test_a_beginning_of_a_stop_string_at_the_end_of_the_text_is_shown() -> None:
    stops = StopStrings(["\n\n"])
    assert [stops.add("done\n"), stops.finish(), stops.finish()] == ["done", "\n", ""]
    assert not stops.found


def test_a_stop_string_that_begins_inside_a_failed_one_is_found() -> None:
    assert shown_in_all("aaab!", ["aab"]) == "a"
    assert shown_in_all("ababac!", ["abac"]) == "ab"


def test_of_two_stop_strings_in_one_piece_the_one_that_begins_first_ends_the_text() -> None:
    assert shown_in_all(["one END two STOP"], ["STOP", "END"]) == "one "


def test_the_held_text_of_a_long_stop_string_does_not_hide_a_short_one() -> None:
    assert shown_in_all("xabcd", ["abcde", "cd"]) == "xab"


def test_nothing_is_shown_once_a_stop_string_was_found() -> None:
    stops = StopStrings(["."])
    assert stops.add("One. Two.") == "One"
    assert stops.add(" Three.") == ""


def test_without_stop_strings_each_piece_is_shown_as_it_comes() -> None:
    stops = StopStrings([])
    assert [stops.add("a"), stops.add("\n"), stops.finish()] == ["a", "\n", ""]


@pytest.mark.parametrize("stop", [[""], ["a", ""]])
def test_an_empty_stop_string_is_refused(stop: Sequence[str]) -> None:
    with pytest.raises(OptionError, match="empty"):
        StopStrings(stop)
