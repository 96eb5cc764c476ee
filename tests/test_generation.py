"""The loop on a mock model: what it runs, in which order, and what it leaves in the caches."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from olmo3_mlx import CacheOptions, KVCache, Olmo3, OptionError, PromptError
from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.generation.loop import check_prompt, decode, prefill
from olmo3_mlx.generation.sampling import Sampler, SamplingOptions

GREEDY = Sampler(SamplingOptions())


class Counting:
    """A model that answers each token with the next number, and records what it was given."""

    config: Any = None  # the loop asks for none

    def __init__(self, vocabulary: int = 100) -> None:
        self.vocabulary = vocabulary
        self.passes: list[int] = []
        self.kept: list[int | None] = []

    def __call__(
        self,
        tokens: mx.array,
        caches: list[Cache],
        *,
        logits_to_keep: int | None = None,
        checked: bool = False,
    ) -> mx.array:
        self.passes.append(tokens.shape[1])
        self.kept.append(logits_to_keep)
        for cache in caches:
            new = tokens[:, None, :, None].astype(mx.float32)
            cache.append(new, new)
        following = (tokens[:, -(logits_to_keep or 0) :] + 1) % self.vocabulary
        return (mx.arange(self.vocabulary) == following[..., None]).astype(mx.float32)

    def make_caches(self, options: CacheOptions | None = None) -> list[Cache]:
        return [KVCache()]


def held(cache: Cache) -> list[int]:
    """The tokens in a cache of Counting."""
    return [int(i) for i in np.array(cache.state[0][0, 0, : cache.offset, 0])]


def test_the_prompt_is_one_pass_with_the_head_on_one_position() -> None:
    model = Counting()
    caches = model.make_caches()
    logits = prefill(model, [5, 6, 7, 8], caches)
    assert (model.passes, model.kept) == ([4], [1])
    assert logits.shape == (1, 100)
    assert mx.argmax(logits).item() == 9
    assert held(caches[0]) == [5, 6, 7, 8]


def test_a_long_prompt_goes_in_chunks_and_reports_progress() -> None:
    model = Counting()
    done: list[tuple[int, int]] = []
    prefill(model, list(range(10)), model.make_caches(), chunk=4, progress=lambda *at: done.append(at))
    assert model.passes == [4, 4, 2]
    assert done == [(4, 10), (8, 10), (10, 10)]


def test_on_a_cpu_a_chunk_is_small_enough_to_be_interrupted() -> None:
    model = Counting(vocabulary=1000)
    prefill(model, list(range(600)), model.make_caches())
    expected = [256, 256, 88] if mx.default_device().type == mx.DeviceType.cpu else [600]
    assert model.passes == expected


def test_raising_from_progress_leaves_whole_chunks() -> None:
    model = Counting()
    caches = model.make_caches()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prefill(model, list(range(10)), caches, chunk=4, progress=stop)
    assert held(caches[0]) == [0, 1, 2, 3]


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        prefill(Counting(), [1], [], chunk=0)


@pytest.mark.parametrize("read", [1, 2, 5, 8])
def test_the_caches_hold_all_that_was_yielded_but_the_last(read: int) -> None:
    model = Counting()
    caches = model.make_caches()
    tokens = decode(model, prefill(model, [1, 2], caches), caches, GREEDY, 8)
    found = [next(tokens) for _ in range(read)]
    tokens.close()
    assert found == list(range(3, 3 + read))
    assert held(caches[0]) == [1, 2, *found[:-1]]


def test_no_step_is_run_beyond_max_tokens() -> None:
    model = Counting()
    caches = model.make_caches()
    assert len(list(decode(model, prefill(model, [1], caches), caches, GREEDY, 5))) == 5
    assert model.passes == [1] * 5  # the prompt, and one for each token but the last


def test_the_next_step_is_queued_before_a_token_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting()
    caches = model.make_caches()
    queued: list[Any] = []
    monkeypatch.setattr(mx, "async_eval", queued.append)
    tokens = decode(model, prefill(model, [1], caches), caches, GREEDY, 5)
    next(tokens)
    assert len(queued) == 2  # the token that was read, and the one after it
    next(tokens)
    assert len(queued) == 3


def test_decoding_equals_a_full_recompute(tiny: Olmo3) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    caches = tiny.make_caches()
    found = list(decode(tiny, prefill(tiny, ids, caches, chunk=4), caches, GREEDY, 40))
    expected: list[int] = []
    for _ in range(40):
        logits = tiny(mx.array([ids + expected]))[0, -1]
        expected.append(int(mx.argmax(logits)))
    assert found == expected


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "empty"),
        ([1, 100], "token id 100 is outside the model's vocabulary of 100"),
        ([1, -1], "token id -1"),
        ([1] * 50, "50 tokens, the context is 50"),
    ],
)
def test_a_prompt_that_cannot_be_run_is_refused(ids: list[int], said: str) -> None:
    with pytest.raises(PromptError, match=said):
        check_prompt(ids, vocab_size=100, context=50)


def test_a_prompt_that_leaves_room_for_one_token_is_taken() -> None:
    check_prompt([99] * 49, vocab_size=100, context=50)
