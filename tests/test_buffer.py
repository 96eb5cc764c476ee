"""The buffer by itself: what is written comes back, the rest is room."""

import mlx.core as mx
import pytest

from olmo3_mlx.caches.buffer import Buffer


def numbered(start: int, stop: int, width: int = 3) -> mx.array:
    """Positions [1, 2, stop - start, width] that bear their numbers."""
    column = mx.arange(start, stop).astype(mx.float32)[None, None, :, None]
    return mx.broadcast_to(column, (1, 2, stop - start, width))


def numbers(array: mx.array) -> list[float]:
    return array[0, 1, :, -1].tolist()  # type: ignore[return-value]


def test_an_empty_buffer_holds_and_shows_nothing() -> None:
    buffer = Buffer()
    assert (buffer.room, buffer.nbytes, buffer.length, buffer.arrays) == (0, 0, 0, [])


def test_what_is_written_comes_back_in_every_array() -> None:
    buffer = Buffer()
    buffer.replace([numbered(0, 2), numbered(0, 2, 5).astype(mx.uint32)], room=8)
    buffer.write([numbered(2, 5), numbered(2, 5, 5).astype(mx.uint32)])
    assert (buffer.room, buffer.length, buffer.nbytes) == (8, 5, 8 * 2 * (3 + 5) * 4)
    assert [array.dtype for array in buffer.arrays] == [mx.float32, mx.uint32]
    for array in buffer.newest(4):
        assert numbers(array) == [1, 2, 3, 4]
    assert [array.shape[2] for array in buffer.newest(0)] == [0, 0]


def test_room_behind_the_filled_positions_is_zero() -> None:
    buffer = Buffer()
    buffer.replace([numbered(1, 3)], room=5)
    assert numbers(buffer.arrays[0]) == [1, 2, 0, 0, 0]


def test_shortening_it_gives_the_positions_to_what_comes_next() -> None:
    buffer = Buffer()
    buffer.replace([numbered(0, 6)], room=8)
    buffer.length = 3
    buffer.write([numbered(40, 42)])
    assert numbers(buffer.newest(5)[0]) == [0, 1, 2, 40, 41]


def test_replacing_and_clearing_forget_what_was_there() -> None:
    buffer = Buffer()
    buffer.replace([numbered(0, 6)], room=6)
    buffer.replace(buffer.newest(2), room=4)
    assert (numbers(buffer.newest(2)[0]), buffer.room) == ([4, 5], 4)
    buffer.clear()
    assert (buffer.room, buffer.nbytes, buffer.length) == (0, 0, 0)


def test_parts_that_do_not_match_the_arrays_are_refused() -> None:
    buffer = Buffer()
    buffer.replace([numbered(0, 2), numbered(0, 2)], room=4)
    with pytest.raises(ValueError, match="zip"):
        buffer.write([numbered(2, 3)])


def test_views_taken_earlier_do_not_change_when_it_is_written_to() -> None:
    buffer = Buffer()
    buffer.replace([numbered(0, 4)], room=8)
    (before,) = buffer.newest(2)
    buffer.length = 2
    buffer.write([numbered(70, 74)])
    assert numbers(before) == [2, 3]
    assert numbers(buffer.newest(6)[0]) == [0, 1, 70, 71, 72, 73]


def test_writing_does_not_copy_the_buffer() -> None:
    buffer = Buffer()
    buffer.replace([mx.zeros((1, 4, 0, 64))], room=4096)
    mx.eval(buffer.arrays)
    one = mx.ones((1, 4, 1, 64))
    mx.eval(one)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(5):
        buffer.write([one])
        mx.eval(buffer.arrays)
    assert mx.get_peak_memory() - before < buffer.nbytes // 10


@pytest.mark.parametrize("room", [10, 20])
def test_a_replaced_buffer_does_not_keep_a_longer_array_alive(room: int) -> None:
    buffer = Buffer()
    before = mx.get_active_memory()
    buffer.replace([mx.random.normal((1, 1, 100_000, 8))[:, :, -10:]], room)
    mx.eval(buffer.arrays)
    assert mx.get_active_memory() - before < 100_000
