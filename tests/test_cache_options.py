"""CacheOptions: one value that checks itself, knows its bytes and its name on disk."""

from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model

from olmo3_mlx import CacheOptions, Olmo3, OptionError, Session
from olmo3_mlx.caches.quantized import KVQuantization
from olmo3_mlx.memory.plan import plan

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "bits that no kernel has": ({"bits": 5}, "kv_bits must be one of 8, 4, not 5"),
    "a group size that no kernel has": ({"bits": 8, "group_size": 48}, "kv_group_size must be 32, 64 or 128"),
    "a group size without bits": ({"group_size": 64}, "is for quantized caches: give kv_bits too"),
    "a start without bits": ({"start": 100}, "kv_start=100 is for quantized caches: give kv_bits too"),
    "a negative start": ({"start": -1}, "kv_start must be a whole number of at least 0, not -1"),
    "a negative rewind": ({"rewind": -1}, "rewind must be a whole number of at least 0, not -1"),
    "half a token": ({"rewind": 1.5}, "rewind must be a whole number of at least 0, not 1.5"),
    "a truth value": ({"start": True}, "kv_start must be a whole number of at least 0, not True"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_options_outside_their_range_are_refused_before_any_model(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        CacheOptions(**options)


def test_a_group_size_is_held_against_the_heads_when_they_are_known() -> None:
    assert CacheOptions(8).quantization(128) == KVQuantization(8, 128, 128)
    assert CacheOptions(8).quantization(256) == KVQuantization(8, 128, 256)
    assert CacheOptions(4, 32).quantization(64) == KVQuantization(4, 32, 64)
    assert CacheOptions().quantization(64) is None
    with pytest.raises(OptionError, match="divide the head dimension 64"):
        CacheOptions(8, 128).quantization(64)


def test_keywords_say_the_same() -> None:
    options = CacheOptions(4, 64, 100, 16)
    assert CacheOptions.of(kv_bits=4, kv_group_size=64, kv_start=100, rewind=16) == options
    assert CacheOptions.of(options) is options
    assert CacheOptions.of() == CacheOptions()
    assert CacheOptions.of(options, kv_bits=8, rewind=1) == CacheOptions(8, 64, 100, 1)
    with pytest.raises(OptionError, match="expected CacheOptions, or keywords such as kv_bits=8, not 512"):
        CacheOptions.of(512)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown option bits: expected kv_bits, kv_group_size"):
        CacheOptions.of(bits=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_bytes_of_a_position_are_those_of_the_arrays(bits: int | None, dtype: mx.Dtype) -> None:
    options, heads, head_dim = CacheOptions(bits), 3, 64
    keys = mx.random.normal((1, heads, 5, head_dim)).astype(dtype)
    quantization = options.quantization(head_dim)
    arrays = [keys, keys] if quantization is None else quantization.encode(keys, keys)
    assert 5 * options.position_bytes(heads, head_dim, dtype.size) == sum(array.nbytes for array in arrays)


def test_up_to_start_tokens_are_held_as_the_model_computes() -> None:
    options = CacheOptions(8, 32, start=100)
    assert options.holding(100) == CacheOptions()
    assert options.holding(101) == options


def test_the_form_on_disk_says_all_that_one_cache_needs_of_another() -> None:
    assert CacheOptions().form(64, mx.bfloat16) == "bfloat16"
    assert CacheOptions(rewind=3).form(64, mx.bfloat16) == "bfloat16"  # its own affair
    assert CacheOptions(4).form(64, mx.float32) == "float32, 4 bits in groups of 64 from 0 tokens on"
    assert CacheOptions(8, 32, 7).form(64, mx.float32) == "float32, 8 bits in groups of 32 from 7 tokens on"


def test_caches_sessions_and_plans_take_the_one_value_or_the_keywords() -> None:
    model: Olmo3 = random_model({**TINY, "hidden_size": 128, "num_attention_heads": 4})
    options = CacheOptions(8, rewind=16)
    keys = mx.zeros((1, 2, 3, 32))
    for caches in (model.make_caches(options), model.make_caches(kv_bits=8, rewind=16)):
        for cache in caches:
            cache.append(keys, keys)
        assert all(cache.quantized for cache in caches)
        assert caches[0].kept == model.config.sliding_window - 1 + 16
    assert Session(model, options).caches[0].kept == caches[0].kept
    assert Session(model, kv_bits=8, rewind=16).caches[0].kept == caches[0].kept
    assert plan(model.config, 0, options) == plan(model.config, 0, kv_bits=8, rewind=16)
    assert plan(model.config, 0, options).options == options


def test_a_session_within_a_plan_has_its_context_and_shares_what_it_leaves() -> None:
    model = random_model(TINY)
    found = plan(model.config, 0, context=100, machine=2**30)
    session = Session.within(model, found)
    assert session.context == 100
    assert session._snapshots.store.limit == found.left // 2


@pytest.mark.parametrize("value", [8.0, [8], "8", True])
def test_bits_and_group_size_are_whole_numbers_of_python(value: Any) -> None:
    """Others would pass a comparison, and fail in the middle of the first pass."""
    with pytest.raises(OptionError, match="kv_bits must be one of 8, 4, not"):
        CacheOptions(value)
    with pytest.raises(OptionError, match="kv_group_size must be 32, 64 or 128, not"):
        CacheOptions(8, value)


def test_a_group_is_as_much_of_a_head_as_it_can_be() -> None:
    assert CacheOptions(8).quantization(96) == KVQuantization(8, 32, 96)
    with pytest.raises(
        OptionError, match=r"^kv_bits=8 is for heads of a multiple of 32 values, this model's"
    ):
        CacheOptions(8).quantization(16)
