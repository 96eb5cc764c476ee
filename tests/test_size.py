"""Sizes as people read them."""

import pytest

from convert.size import Size, in_words


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "0.00 MB"),
        (5_200_000, "5.20 MB"),
        (999_999_999, "1000.00 MB"),
        (10**9, "1.00 GB"),
        (14_600_000_000, "14.60 GB"),
    ],
)
def test_bytes_are_said_in_the_unit_that_suits_them(count: int, message: str) -> None:
    assert in_words(count) == Size(1, count).in_words == message


def test_bits_per_weight_count_every_byte() -> None:
    assert Size(1000, 563).bits_per_weight == 4.504
