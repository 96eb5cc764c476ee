"""Caches by their properties: however a text is split, whatever is taken back, the logits are those
of a fresh run; and they never hold more than they say. Those of quantized caches are those of a
quantized cache that saw the same text and nothing else."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model

from olmo3_mlx import CacheError, KVCache, Olmo3, OptionError, RotatingKVCache, load, rewind
from olmo3_mlx.caches.attention import KeysValues
from olmo3_mlx.caches.buffered import STEP
from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.caches.quantized import KVQuantization, QuantizedKeysValues
from olmo3_mlx.caches.rotating import SLACK

TOLERANCE = 1e-4  # on logits of about 10, in float32
VOCABULARY = TINY["vocab_size"]

# Heads that can be quantized: grouped-query like TINY, and 5 query heads on one kv head like the 32B.
# Narrow and of few layers, which shows as well whether a cache is right: fresh runs take most of the time.
SLIDING, FULL = "sliding_attention", "full_attention"
NARROW = {**TINY, "hidden_size": 32, "intermediate_size": 32}
GROUPED = {**NARROW, "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "head_dim": 32}
TWO_LAYERS = {**NARROW, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
ONE_HEAD = {**TWO_LAYERS, "head_dim": 64, "num_attention_heads": 5, "num_key_value_heads": 1}
SMALL = {**TWO_LAYERS, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}

Form = dict[str, Any]  # what make_caches takes beside `rewind`
PLAIN: Form = {}
FORMS = [PLAIN, {"kv_bits": 8}, {"kv_bits": 4}]


def name_of(form: Form) -> str:
    return "-".join(f"{key}={value}" for key, value in form.items()) or "unquantized"


each_form = pytest.mark.parametrize("form", FORMS, ids=name_of)
each_quantized = pytest.mark.parametrize("form", FORMS[1:], ids=name_of)


@pytest.fixture(scope="module")
def models() -> Callable[..., Olmo3]:
    """Models by their configs, each built once."""
    built: dict[str, Olmo3] = {}

    def model(config: dict[str, Any], **changes: object) -> Olmo3:
        config = {**config, **changes}
        return built.setdefault(repr(config), random_model(config))

    return model


def fresh(model: Olmo3, ids: list[int], form: Form) -> mx.array:
    """The logits [L, V] of a text read at once, with caches of this form."""
    return model(mx.array([ids]), model.make_caches(**form) if form else None)[0]


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def append(model: Olmo3, ids: list[int], caches: list[Cache], chunks: list[int]) -> mx.array:
    """Run ids in chunks; all their logits [L, V]."""
    pieces, start = [], 0
    for chunk in chunks:
        pieces.append(model(mx.array([ids[start : start + chunk]]), caches)[0])
        start += chunk
    assert start == len(ids)
    return mx.concatenate(pieces)


def quantize(caches: list[Cache]) -> None:
    """Quantize what they hold, as they do themselves once they hold enough."""
    for cache in caches:
        assert isinstance(cache, KVCache | RotatingKVCache)
        cache._quantize()


def split(rng: random.Random, total: int, longest: int) -> list[int]:
    chunks = []
    while total:
        chunks.append(min(rng.randint(1, longest), total))
        total -= chunks[-1]
    return chunks


def worst(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max())


class Noted:
    """Logits that were found, to be held against fresh runs: one for all texts that begin alike."""

    def __init__(self, model: Olmo3, form: Form) -> None:
        self.model, self.form = model, form
        self.left: list[tuple[list[int], mx.array, object]] = []

    def add(self, said: list[int], found: mx.array, where: object) -> None:
        """The logits [L, V] of the last L of the ids `said`."""
        mx.eval(found)
        self.left.append((said, found, where))

    def check(self) -> None:
        while self.left:
            longest = max((said for said, _, _ in self.left), key=len)
            expected = fresh(self.model, longest, self.form)
            alike = [note for note in self.left if longest[: len(note[0])] == note[0]]
            self.left = [note for note in self.left if longest[: len(note[0])] != note[0]]
            for said, found, where in alike:
                assert worst(found, expected[len(said) - len(found) : len(said)]) < TOLERANCE, where


@pytest.mark.parametrize(("longest", "slack"), [(1, 5), (9, 0), (40, 0), (300, 5), (450, 300)])
@pytest.mark.parametrize("config", [GROUPED, ONE_HEAD], ids=["4-on-2", "5-on-1"])
@each_form
def test_any_split_into_chunks_equals_no_split(
    models: Callable[..., Olmo3], config: dict[str, Any], form: Form, longest: int, slack: int
) -> None:
    model = models(config)
    rng = random.Random(longest)
    ids = draw(rng, 450 if slack == 300 else 300)  # more than a compaction of the window of 8
    chunks = split(rng, len(ids), longest)
    if longest == 1:  # one at a time at the beginning, and where the caches grow and are compacted
        chunks = [*[1] * 12, 238, *[1] * 50]
    found = append(model, ids, model.make_caches(rewind=slack, **form), chunks)
    assert worst(found, fresh(model, ids, form)) < TOLERANCE


@pytest.mark.parametrize(("window", "slack"), [(1, 0), (1, 3), (2, 0), (8, 3), (130, 3)])
@each_form
def test_windows_of_every_kind_survive_many_wraps(
    models: Callable[..., Olmo3], window: int, slack: int, form: Form
) -> None:
    model = models(SMALL, sliding_window=window)
    rng = random.Random(window)
    ids = draw(rng, 800)
    found = append(
        model, ids, model.make_caches(rewind=slack, **form), [400, *split(rng, len(ids) - 400, 90)]
    )
    assert worst(found, fresh(model, ids, form)) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
@each_form
def test_rewinding_equals_never_having_gone_there(
    models: Callable[..., Olmo3], seed: int, form: Form
) -> None:
    model = models(GROUPED)
    rng = random.Random(seed)
    caches = model.make_caches(rewind=64, **form)
    said: list[int] = []
    noted = Noted(model, form)
    for turn in range(6):
        new = draw(rng, rng.randint(1, rng.choice([20, 120])))
        longest = rng.choice([20, 200]) if len(new) > 20 else 1
        said = said + new
        noted.add(said, append(model, new, caches, split(rng, len(new), longest)), turn)
        back = rng.randint(0, min(64, len(said)))
        rewind(caches, back)
        said = said[: len(said) - back]
        assert {cache.offset for cache in caches} == {len(said)}
    noted.check()


@each_form
def test_every_position_around_a_wrap_can_be_rewound_to(models: Callable[..., Olmo3], form: Form) -> None:
    model = models(SMALL)
    rng = random.Random(0)
    capacity = RotatingKVCache(8, 16).capacity
    ids = draw(rng, capacity + 6)
    whole = fresh(model, ids, form)
    for length in range(capacity - 2, capacity + 6):
        for back in (1, 7, 8, 16):
            caches = model.make_caches(rewind=16, **form)
            append(model, ids[:length], caches, [length - 4, 1, 1, 1, 1])
            rewind(caches, back)
            again = model(mx.array([ids[length - back : length]]), caches)[0]
            assert worst(again, whole[length - back : length]) < TOLERANCE, (length, back)


@pytest.mark.parametrize("window", [8, 128])
@each_form
def test_every_position_can_be_rewound_to_after_many_wraps(
    models: Callable[..., Olmo3], window: int, form: Form
) -> None:
    model = models(SMALL, sliding_window=window)
    rng = random.Random(window)
    ids = draw(rng, 4 * (window + SLACK + 16))
    whole = fresh(model, ids, form)
    caches = model.make_caches(rewind=16, **form)
    append(model, ids, caches, split(rng, len(ids), 150))
    for back in range(1, 17):
        rewind(caches, back)
        again = model(mx.array([ids[-back:]]), caches)[0]
        assert worst(again, whole[-back:]) < TOLERANCE, back


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


@pytest.mark.parametrize("slack", [0, 5, 300])
@pytest.mark.parametrize("longest", [1, 20, 150, 600])
def test_as_many_positions_as_promised_can_always_be_taken_back(slack: int, longest: int) -> None:
    rng = random.Random(longest)
    cache = RotatingKVCache(8, slack)
    furthest = 0  # what was dropped on the way there is gone
    for new in split(rng, 2000, longest):
        cache.append(mx.zeros((1, 1, new, 1)), mx.zeros((1, 1, new, 1)))
        mx.eval(cache.state)
        furthest = max(furthest, cache.offset)
        assert cache.offset - cache.rewindable <= max(0, furthest - slack)
        if rng.random() < 0.1:
            cache.rewind(rng.randint(0, min(slack, cache.rewindable)))


def test_a_fresh_cache_can_go_back_to_its_beginning(tiny: Olmo3) -> None:
    caches = tiny.make_caches(rewind=0)
    ids = draw(random.Random(2), 30)
    tiny(mx.array([ids]), caches)
    rewind(caches, 30)
    assert worst(tiny(mx.array([ids]), caches)[0], tiny(mx.array([ids]))[0]) < TOLERANCE


# Bytes of a key and a value of 2 heads and 64 dimensions in bfloat16: 16 bits a value, 8.25, 4.75.
SIZES = {16: 512, 8: 264, 4: 152}


@pytest.mark.parametrize("bits", SIZES)
@pytest.mark.parametrize("start", [0, 400])
@pytest.mark.parametrize("chunk", [1, 64, 2048])
def test_no_form_holds_more_bytes_than_it_says(bits: int, start: int, chunk: int) -> None:
    how, total = KVQuantization(bits, 64, 64) if bits < 16 else None, 600 if chunk == 1 else 1500
    for cache in (RotatingKVCache(128, 32, how, start), KVCache(how, start)):
        for first in range(0, total, chunk):
            new = mx.ones((1, 2, min(chunk, total - first), 64), mx.bfloat16)
            cache.append(new, new)
            mx.eval(cache.state)
            quantized = bits < 16 and cache.offset > start
            assert cache.nbytes <= cache.room_for(cache.offset) * SIZES[bits if quantized else 16]
        assert cache.nbytes == cache.room_for(total) * SIZES[bits]
        if isinstance(cache, RotatingKVCache):
            assert cache.room_for(10**9) == cache.capacity == 127 + 32 + SLACK


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


@pytest.mark.parametrize("how", [None, KVQuantization(4, 64, 64)])
def test_memory_held_is_what_the_caches_say(how: KVQuantization | None) -> None:
    """A view of a long prefill must not keep the whole of it alive behind a small buffer."""
    cache = RotatingKVCache(64, rewind=0, quantization=how)
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
        view = cache.append(x, x)
        assert isinstance(view, KeysValues)
        keys, values = view
        x = keys[:, :, -chunk:] + values[:, :, -chunk:]  # attention, as far as memory goes
        del keys, values, view
    mx.eval(x)
    one_layer = 2 * 4 * 64 * 4 * (full + chunk)  # keys and values, old and new, in float32
    assert mx.get_peak_memory() - before < 3 * one_layer


def test_a_decoding_step_attends_to_the_window_without_a_mask() -> None:
    cache = RotatingKVCache(8)
    for position in range(600):
        one = mx.full((1, 1, 1, 2), float(position))
        view = cache.append(one, one)
        assert isinstance(view, KeysValues)
        keys, values = view
        expected = list(range(max(0, position - 7), position + 1))
        assert keys[0, 0, :, 0].tolist() == values[0, 0, :, 1].tolist() == expected


# Copies, and caches restored from them.

Saved = list[list[list[mx.array]]]  # for each layer, stretches one behind the other


def saved(caches: Sequence[Any], pieces: int = 1) -> Saved:
    """What is needed to go on from here: everything of full layers, the window's past of sliding ones."""
    layers = []
    for cache in caches:
        stop = cache.offset
        start = max(0, stop - (cache.window - 1)) if isinstance(cache, RotatingKVCache) else 0
        edges = [start + (stop - start) * i // pieces for i in range(pieces + 1)]
        layers.append([cache.copy(a, b) for a, b in pairwise(edges) if a < b])
    return layers


def restore(caches: Sequence[Any], layers: Saved, position: int) -> None:
    """Go on from there."""
    for cache, stretches in zip(caches, layers, strict=True):
        held = sum(stretch[0].shape[2] for stretch in stretches)
        if isinstance(cache, RotatingKVCache):
            cache.restart(position - held)
        else:
            cache.rewind(cache.offset)
        for stretch in stretches:
            cache.extend(stretch)
        assert cache.offset == position


@pytest.mark.parametrize(("config", "pieces"), [(GROUPED, 1), (ONE_HEAD, 3)], ids=["4-on-2", "5-on-1"])
@pytest.mark.parametrize("length", [3, 7, 8, 140, 300])
@each_form
def test_a_restored_cache_goes_on_as_if_it_had_got_there(
    models: Callable[..., Olmo3], config: dict[str, Any], pieces: int, length: int, form: Form
) -> None:
    model = models(config)
    rng = random.Random(length)
    ids = draw(rng, length + 30)
    caches = model.make_caches(rewind=4, **form)
    append(model, ids[:length], caches, split(rng, length, 70))
    layers = saved(caches, pieces)
    expected = fresh(model, ids, form)[length:]
    other = model.make_caches(rewind=4, **form)
    append(model, draw(rng, 200), other, [170, 30])  # another conversation
    for target in (caches, model.make_caches(rewind=4, **form), other):
        restore(target, layers, length)
        found = append(model, ids[length:], target, [1, 20, 9])
        assert worst(found, expected) < TOLERANCE


@each_form
def test_a_restored_cache_can_go_back_in_what_came_after(models: Callable[..., Olmo3], form: Form) -> None:
    model = models(GROUPED)
    rng = random.Random(7)
    ids = draw(rng, 60)
    caches = model.make_caches(rewind=16, **form)
    model(mx.array([ids]), caches)
    layers = saved(caches)
    restore(caches, layers, 60)
    sliding = [cache for cache in caches if isinstance(cache, RotatingKVCache)]
    assert {(cache.rewindable, cache.first) for cache in sliding} == {(0, 53)}
    with pytest.raises(CacheError, match="cannot take 1 of 60 positions back: 0 at most"):
        rewind(caches, 1)
    more = draw(rng, 5)
    model(mx.array([more]), caches)
    rewind(caches, 3)
    more[2:] = draw(rng, 3)
    found = model(mx.array([more[2:]]), caches)[0]
    assert worst(found, fresh(model, ids + more, form)[-3:]) < TOLERANCE
    with pytest.raises(CacheError):
        rewind(caches, 6)


@each_form
def test_what_was_restored_near_the_beginning_can_go_back_to_it(
    models: Callable[..., Olmo3], form: Form
) -> None:
    model = models(GROUPED)
    ids = draw(random.Random(8), 7)
    caches = model.make_caches(rewind=0, **form)
    model(mx.array([ids]), caches)
    restore(caches, saved(caches), 7)
    rewind(caches, 7)
    assert worst(model(mx.array([ids]), caches)[0], fresh(model, ids, form)) < TOLERANCE


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("span", [(0, 256), (0, 100), (30, 256), (255, 256)])
@pytest.mark.parametrize("how", [None, KVQuantization(4, 64, 64)])
def test_copies_do_not_change_with_the_buffer_and_do_not_keep_it(
    how: KVQuantization | None, span: tuple[int, int], heads: int
) -> None:
    before = mx.get_active_memory()
    cache = KVCache(how)
    new = mx.random.normal((1, heads, STEP, 64))  # they fill the buffer
    cache.append(new, new)
    mx.eval(cache.state)
    copies = cache.copy(*span)
    kept = [mx.array(part.tolist(), part.dtype) for part in copies]
    cache.rewind(STEP - span[0])
    cache.append(-2 * new, 3 * new)
    mx.eval(cache.state)
    for part, was in zip(copies, kept, strict=True):
        assert part.shape[2] == span[1] - span[0]
        assert mx.array_equal(part, was)
    del cache, new, kept, was
    held = sum(part.nbytes for part in copies)
    assert mx.get_active_memory() - before <= held + 4 * 20_000  # MLX shares what is at most a page longer


def test_what_is_extended_with_copies_does_not_write_into_them() -> None:
    one, two = KVCache(), KVCache()
    new = mx.random.normal((1, 1, STEP, 8))
    one.append(new, new)
    copies = one.copy(0, STEP)
    two.extend(copies)
    two.rewind(10)
    two.append(0 * new[:, :, :10], 0 * new[:, :, :10])
    mx.eval(two.state)
    assert mx.array_equal(copies[0], new)
    assert mx.array_equal(one.copy(0, STEP)[1], new)


@pytest.mark.parametrize("how", [None, KVQuantization(8, 32, 32)])
def test_only_positions_that_are_held_can_be_copied(how: KVQuantization | None) -> None:
    cache = RotatingKVCache(8, 4, how)
    with pytest.raises(CacheError, match="expected positions in 0 to 0, got 0 to 1"):
        cache.copy(0, 1)
    for _ in range(4):
        cache.append(mx.ones((1, 1, 50, 32)), mx.ones((1, 1, 50, 32)))
    first = cache.first
    assert 0 < first <= 200 - 7 - 4
    for start, stop in ((first - 1, 200), (0, 10), (first, 201), (150, 150), (160, 150), (-5, 200)):
        with pytest.raises(CacheError, match=f"expected positions in {first} to 200, got {start} to {stop}"):
            cache.copy(start, stop)
    assert cache.copy(first, 200)[0].shape[2] == 200 - first
    cache.restart(90)
    assert (cache.first, cache.offset, cache.nbytes, cache.state) == (90, 90, 0, [])
    with pytest.raises(CacheError, match="expected positions in 90 to 90"):
        cache.copy(89, 90)


@each_quantized
def test_unquantized_copies_go_into_quantized_caches_and_the_other_way_round(
    models: Callable[..., Olmo3], form: Form
) -> None:
    """As happens where a text was copied before and is restored after it grew past kv_start."""
    model = models(GROUPED)
    ids = draw(random.Random(3), 70)
    late = {**form, "kv_start": 50}
    caches = model.make_caches(rewind=4, **late)
    model(mx.array([ids[:40]]), caches)
    plain = saved(caches)
    assert {len(stretch) for layer in plain for stretch in layer} == {2}
    expected = append(model, ids[40:], caches, [5, 25])
    quantized = saved(caches)
    assert {len(stretch) for layer in quantized for stretch in layer} == {4}

    restore(caches, plain, 40)  # they are quantized by now, and stay so
    assert all(cache.quantized for cache in caches)
    again = model.make_caches(rewind=4, **late)
    model(mx.array([ids[:40]]), again)
    quantize(again)
    assert (
        worst(append(model, ids[40:], caches, [5, 25]), append(model, ids[40:], again, [5, 25])) < TOLERANCE
    )

    other = model.make_caches(rewind=4, **late)
    restore(other, quantized, 70)  # not quantized yet: now they are
    assert all(cache.quantized for cache in other)
    after = draw(random.Random(4), 20)
    restore(caches, quantized, 70)
    assert worst(append(model, after, other, [20]), append(model, after, caches, [20])) < TOLERANCE
    assert expected.shape == (30, VOCABULARY)


# Quantized late.


@each_quantized
def test_kv_start_quantizes_once_the_text_is_longer_and_for_good(
    models: Callable[..., Olmo3], form: Form
) -> None:
    model = models(GROUPED)
    ids = draw(random.Random(5), 330)
    caches = model.make_caches(rewind=64, **form, kv_start=300)
    whole = fresh(model, ids[:300], PLAIN)
    found = append(model, ids[:300], caches, [170, 130])
    assert worst(found, whole) < TOLERANCE
    assert not any(cache.quantized for cache in caches)
    assert all(len(cache.state) == 2 for cache in caches)
    model(mx.array([[ids[300]]]), caches)
    assert all(cache.quantized for cache in caches)
    rewind(caches, 40)
    assert all(cache.quantized and len(cache.state) == 4 for cache in caches)
    found = append(model, ids[261:], caches, [69])
    # What came before was computed from exact keys and values, what lies 40 back and on was not.
    other = model.make_caches(rewind=64, **form, kv_start=300)
    append(model, ids[:261], other, [261])
    quantize(other)
    assert worst(found, append(model, ids[261:], other, [69])) < TOLERANCE


@pytest.mark.parametrize("how_on", ["append", "extend"])
def test_a_cache_rewound_to_its_beginning_can_still_be_quantized(how_on: str) -> None:
    how = KVQuantization(8, 32, 32)
    for cache in (KVCache(how, start=4), RotatingKVCache(8, 0, how, start=4)):
        three, nine = mx.ones((1, 1, 3, 32)), mx.ones((1, 1, 9, 32))
        cache.append(three, three)
        cache.rewind(3)
        if how_on == "append":
            cache.append(nine, nine)
        else:
            cache.extend(how.encode(nine, nine))
        assert cache.quantized
        assert cache.offset == 9


@pytest.mark.parametrize("chunk", [1, 9, 200])
@each_quantized
def test_a_cache_quantized_late_is_the_one_quantized_by_hand_at_that_moment(
    models: Callable[..., Olmo3], form: Form, chunk: int
) -> None:
    model = models(SMALL)
    ids = draw(random.Random(chunk), 250 + chunk)
    late = model.make_caches(rewind=8, **form, kv_start=250)
    by_hand = model.make_caches(rewind=8, **form, kv_start=10**6)
    for caches in (late, by_hand):
        append(model, ids[:250], caches, [200, 50])
        assert not any(cache.quantized for cache in caches)
    quantize(by_hand)
    new = mx.array([ids[250:]])
    assert worst(model(new, late)[0], model(new, by_hand)[0]) < TOLERANCE
    for ours, theirs in zip(late, by_hand, strict=True):
        for a, b in zip(
            ours.copy(ours.first, ours.offset), theirs.copy(ours.first, ours.offset), strict=True
        ):
            assert mx.array_equal(a, b)


@each_quantized
def test_a_first_pass_beyond_kv_start_is_quantized_at_once(models: Callable[..., Olmo3], form: Form) -> None:
    model = models(GROUPED)
    ids = draw(random.Random(6), 120)
    late = model.make_caches(**form, kv_start=100)
    assert worst(model(mx.array([ids]), late)[0], fresh(model, ids, form)) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"kv_bits": 5}, {"kv_bits": 0}, {"kv_bits": 8, "kv_group_size": 48}, {"kv_start": -1}, {"rewind": -1}],
)
def test_options_of_caches_outside_their_range_are_refused(
    models: Callable[..., Olmo3], options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=f"{list(options)[-1]} must"):
        models(GROUPED).make_caches(**options)


def test_heads_too_small_to_be_quantized_say_so(tiny: Olmo3) -> None:
    with pytest.raises(OptionError, match="heads of a multiple of 32 values, this model's have 16"):
        tiny.make_caches(kv_bits=8)


@each_quantized
def test_a_quantized_decoding_step_sees_the_window_and_nothing_else(form: Form) -> None:
    cache = RotatingKVCache(8, 0, KVQuantization(form["kv_bits"], 32, 32))
    queries = mx.zeros((1, 2, 1, 32))  # they weigh alike what they see
    for position in range(400):
        view = cache.append(mx.ones((1, 1, 1, 32)), mx.full((1, 1, 1, 32), float(position)))
        assert isinstance(view, QuantizedKeysValues)
        seen = range(max(0, position - 7), position + 1)
        assert view.stop - view.start == len(seen)
        found = float(view.attention(queries, scale=1.0, window=8)[0, 1, 0, 31])
        assert found == pytest.approx(sum(seen) / len(seen), rel=1e-5)  # one scale each: exact


def test_quantized_caches_cost_a_trained_model_little(lab: Path, shared: Path) -> None:
    model, tokenizer = load(lab, dtype="float32")
    text = (shared / "text" / "wuthering_heights.txt").read_text(encoding="utf-8")[20_000:22_000]
    ids = list(tokenizer.encode(text))[:40]
    exact, eight, four = (
        logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for logits in (fresh(model, ids, form) for form in FORMS)
    )
    for found, limit in ((eight, 0.002), (four, 0.06)):
        divergence = float((mx.exp(exact) * (exact - found)).sum(-1).mean())
        assert 0 < divergence < limit


# Anything, in any order.


def play(model: Olmo3, seed: int, form: Form) -> None:
    """Append, take back, save and restore at random; each append's logits are those of a fresh run."""
    rng = random.Random(seed)
    far = rng.choice([0, 5, 64])
    caches = model.make_caches(rewind=far, **form)
    said: list[int] = []
    noted = Noted(model, form)
    checkpoints: list[tuple[list[int], Saved]] = []
    history: list[str] = []
    for _ in range(rng.randint(5, 8)):
        action = rng.choice(["append", "append", "rewind", "save", "restore", "anew"])
        if action == "rewind" and said:
            possible = min(cache.rewindable for cache in caches)
            count = rng.choice([rng.randint(0, possible), min(possible, rng.randint(0, 9)), possible])
            history.append(f"rewind {count}")
            rewind(caches, count)
            said = said[: len(said) - count]
        elif action == "save" and said:
            history.append("save")
            checkpoints.append((said, saved(caches, rng.randint(1, 3))))
        elif action in ("restore", "anew") and checkpoints:
            said, layers = rng.choice(checkpoints)
            history.append(f"{action} {len(said)}")
            if action == "anew":
                caches = model.make_caches(rewind=far, **form)
            restore(caches, layers, len(said))
        assert {cache.offset for cache in caches} == {len(said)}
        new = draw(rng, rng.randint(1, rng.choice([2, 12, 300])))
        longest = rng.choice([1, 7, 300]) if len(new) < 40 else rng.choice([30, 300])
        chunks = split(rng, len(new), longest)
        history.append(f"append {chunks}")
        said = said + new
        noted.add(said, append(model, new, caches, chunks), (seed, far, history))
    noted.check()


def play_all(models: Callable[..., Olmo3], seeds: range) -> None:
    for seed in seeds:
        model = models(SMALL, sliding_window=(8, 128)[seed % 2])
        play(model, seed, FORMS[seed // 2 % 3])


def test_any_sequence_of_appends_rewinds_and_checkpoints_equals_a_fresh_run(
    models: Callable[..., Olmo3],
) -> None:
    play_all(models, range(18))


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_sequences_equal_fresh_runs(models: Callable[..., Olmo3], hundred: int) -> None:
    play_all(models, range(1000 + 100 * hundred, 1100 + 100 * hundred))
