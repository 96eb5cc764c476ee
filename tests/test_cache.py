"""Caches by their properties: however a text is split, whatever is taken back, the logits are those
of a fresh run; and they never hold more than they say."""

import random

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, random_model

from olmo3_mlx import CacheError, KVCache, Olmo3, RotatingKVCache, rewind
from olmo3_mlx.attention import attention_mask
from olmo3_mlx.cache import SLACK, STEP

TOLERANCE = 1e-4  # on logits of about 10, in float32
VOCABULARY = TINY["vocab_size"]


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def append(model: Olmo3, ids: list[int], caches: list, chunks: list[int]) -> mx.array:
    """Run ids in chunks; all their logits [L, V]."""
    pieces, start = [], 0
    for chunk in chunks:
        pieces.append(model(mx.array([ids[start : start + chunk]]), caches)[0])
        start += chunk
    assert start == len(ids)
    return mx.concatenate(pieces)


def split(rng: random.Random, total: int, longest: int) -> list[int]:
    chunks = []
    while total:
        chunks.append(min(rng.randint(1, longest), total))
        total -= chunks[-1]
    return chunks


def worst(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max().item())


@pytest.mark.parametrize(
    ("longest", "slack"), [(1, 5), (3, 0), (9, 5), (40, 0), (40, 512), (300, 5), (700, 0), (700, 512)]
)
def test_any_split_into_chunks_equals_no_split(tiny: Olmo3, longest: int, slack: int) -> None:
    rng = random.Random(longest)
    ids = draw(rng, 700)  # several compactions of the window of 8
    whole = tiny(mx.array([ids]))[0]
    found = append(tiny, ids, tiny.make_caches(slack), split(rng, len(ids), longest))
    assert worst(found, whole) < TOLERANCE


@pytest.mark.parametrize(("window", "slack"), [(1, 0), (1, 3), (2, 0), (8, 3), (130, 3)])
def test_windows_of_every_kind_survive_many_wraps(window: int, slack: int) -> None:
    model = random_model({**TINY, "sliding_window": window})
    rng = random.Random(window)
    ids = draw(rng, 1100)
    whole = model(mx.array([ids]))[0]
    found = append(model, ids, model.make_caches(slack), [400, *split(rng, len(ids) - 400, 90)])
    assert worst(found, whole) < TOLERANCE


@pytest.mark.parametrize("seed", range(6))
def test_rewinding_equals_never_having_gone_there(tiny: Olmo3, seed: int) -> None:
    rng = random.Random(seed)
    caches = tiny.make_caches(rewind=64)
    said: list[int] = []
    for _ in range(10):
        new = draw(rng, rng.randint(1, 150))
        found = append(tiny, new, caches, split(rng, len(new), rng.choice([1, 20, 200])))
        said += new
        expected = tiny(mx.array([said]))[0, -len(new) :]
        assert worst(found, expected) < TOLERANCE
        back = rng.randint(0, min(64, len(said)))
        rewind(caches, back)
        said = said[: len(said) - back]
        assert {cache.offset for cache in caches} == {len(said)}


def test_every_position_around_a_wrap_can_be_rewound_to(tiny: Olmo3) -> None:
    rng = random.Random(0)
    capacity = RotatingKVCache(8, 16).capacity
    ids = draw(rng, capacity + 6)
    whole = tiny(mx.array([ids]))[0]
    for length in range(capacity - 5, capacity + 6):
        for back in (1, 7, 8, 16):
            caches = tiny.make_caches(rewind=16)
            append(tiny, ids[:length], caches, [length - 12, *[1] * 12])
            rewind(caches, back)
            again = tiny(mx.array([ids[length - back : length]]), caches)[0]
            assert worst(again, whole[length - back : length]) < TOLERANCE, (length, back)


def test_rewinding_too_far_says_how_far_and_changes_nothing(tiny: Olmo3) -> None:
    rng = random.Random(1)
    ids = draw(rng, 600)
    caches = tiny.make_caches(rewind=4)
    append(tiny, ids[:-1], caches, [*[50] * 11, 49])
    possible = min(cache.rewindable for cache in caches)
    assert 4 <= possible < 599
    with pytest.raises(CacheError, match=f"cannot take {possible + 1} of 599 .* {possible} at most"):
        rewind(caches, possible + 1)
    with pytest.raises(CacheError):
        rewind(caches, -1)
    assert {cache.offset for cache in caches} == {599}
    assert worst(tiny(mx.array([ids[-1:]]), caches)[0], tiny(mx.array([ids]))[0, -1:]) < TOLERANCE


def test_a_fresh_cache_can_go_back_to_its_beginning(tiny: Olmo3) -> None:
    caches = tiny.make_caches(rewind=0)
    ids = draw(random.Random(2), 30)
    tiny(mx.array([ids]), caches)
    rewind(caches, 30)
    assert worst(tiny(mx.array([ids]), caches)[0], tiny(mx.array([ids]))[0]) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 64, 2048])
def test_sliding_caches_stop_growing_and_full_ones_do_not(chunk: int) -> None:
    sliding, full = RotatingKVCache(128, rewind=32), KVCache()
    position = 2 * 2 * 16 * 4  # a key and a value, 2 heads, 16 dimensions, float32
    for start in range(0, 3000, chunk):
        new = mx.zeros((1, 2, min(chunk, 3000 - start), 16))
        for cache in (sliding, full):
            cache.append(new, new)
            mx.eval(cache.state)
        assert sliding.nbytes <= (127 + 32 + SLACK) * position
        assert full.offset * position <= full.nbytes < (full.offset + STEP) * position
    assert sliding.nbytes == sliding.room_for(3000) * position == sliding.capacity * position
    assert full.nbytes == full.room_for(3000) * position


def test_memory_held_is_what_the_caches_say() -> None:
    """A view of a long prefill must not keep the whole of it alive behind a small buffer."""
    cache = RotatingKVCache(64, rewind=0)
    before = mx.get_active_memory()
    for _ in range(4):
        new = mx.random.normal((1, 4, 4096, 64))
        cache.append(new, new)
        del new
        mx.eval(cache.state)
    assert mx.get_active_memory() - before < 2 * cache.nbytes


@pytest.mark.parametrize("chunk", [1024, 1])
def test_the_layers_make_room_one_after_the_other(chunk: int) -> None:
    """All of them at once would need as much again as all sliding caches hold."""
    layers = [RotatingKVCache(512, rewind=0) for _ in range(8)]
    full = 512 - 1 + SLACK
    for cache in layers:
        cache.append(mx.random.normal((1, 4, full, 64)), mx.random.normal((1, 4, full, 64)))
        mx.eval(cache.state)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    x = mx.random.normal((1, 4, chunk, 64))
    for cache in layers:
        keys, values = cache.append(x, x)
        x = keys[:, :, -chunk:] + values[:, :, -chunk:]  # attention, as far as memory goes
        del keys, values
    mx.eval(x)
    one_layer = 2 * 4 * 64 * 4 * (full + chunk)  # keys and values, old and new, in float32
    assert mx.get_peak_memory() - before < 3 * one_layer


def test_a_decoding_step_attends_to_the_window_without_a_mask() -> None:
    cache = RotatingKVCache(8)
    for position in range(600):
        one = mx.full((1, 1, 1, 2), float(position))
        keys, values = cache.append(one, one)
        expected = list(range(max(0, position - 7), position + 1))
        assert keys[0, 0, :, 0].tolist() == values[0, 0, :, 1].tolist() == expected


def test_masks_say_who_sees_whom() -> None:
    assert attention_mask(1, 0) is None
    assert attention_mask(1, 500) is None
    assert attention_mask(4, 3) == "causal"
    assert attention_mask(4, 4, window=8) == "causal"
    mask = attention_mask(3, 2, window=3)
    assert isinstance(mask, mx.array)
    expected = [
        [True, True, True, False, False],
        [False, True, True, True, False],
        [False, False, True, True, True],
    ]
    assert np.array(mask).tolist() == expected
