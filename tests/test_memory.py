"""Memory figures against what MLX reports; plans that fit, refusals that name what would; the watch."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model, save_checkpoint

from olmo3_mlx import Olmo3, Olmo3Config, load
from olmo3_mlx.caches.cache import Cache
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.names import DEMO
from olmo3_mlx.errors import CheckpointError, MemoryFitError, OptionError
from olmo3_mlx.memory import working_space
from olmo3_mlx.memory.machine import MemoryWatch, machine_bytes, small_buffer_pool, wired
from olmo3_mlx.memory.plan import MemoryFit, MemoryPlan, plan
from olmo3_mlx.memory.sizes import cache_bytes, weight_bytes
from olmo3_mlx.memory.working_space import working_bytes
from olmo3_mlx.published import SIZES
from olmo3_mlx.quantization import Quantization, QuantizationConfig

GIB = 2**30
SEVEN = Olmo3Config.from_dict(SIZES["7b"])
SMALL: dict[str, Any] = {
    **TINY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "sliding_window": 32, "vocab_size": 64, "max_position_embeddings": 65536,
}  # fmt: skip


def sized(**changes: Any) -> Olmo3Config:
    names = {
        "hidden": "hidden_size", "inner": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "kv": "num_key_value_heads", "window": "sliding_window",
        "vocab": "vocab_size", "dim": "head_dim",
    }  # fmt: skip
    return Olmo3Config.from_dict({**SMALL, **{names[k]: v for k, v in changes.items()}})


def fill(caches: list[Cache], config: Olmo3Config, tokens: int, dtype: mx.Dtype, chunk: int = 512) -> None:
    for cache in caches:
        for start in range(0, tokens, chunk):
            shape = (1, config.num_key_value_heads, min(chunk, tokens - start), config.head_dim)
            cache.append(mx.ones(shape, dtype), mx.ones(shape, dtype))
            mx.eval(cache.state)


# Caches


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_bits": 8},
        {"kv_bits": 4},
        {"kv_bits": 4, "kv_group_size": 32},
        {"rewind": 0},
        {"kv_bits": 8, "kv_start": 300},
    ],
)
def test_cache_bytes_are_those_of_real_caches_to_the_byte(options: dict[str, Any], dtype: mx.Dtype) -> None:
    config = sized(hidden=256, layers=5, kv=2, window=100)
    growing = Olmo3(config).make_caches(**options)
    for tokens in (1, 256, 257, 300, 301, 611, 612, 739, 740, 1500):
        for chunk, caches in ((64, growing), (2048, Olmo3(config).make_caches(**options))):
            fill(caches, config, tokens - caches[0].offset, dtype, chunk)
            held = sum(array.nbytes for cache in caches for array in cache.state)
            assert cache_bytes(config, tokens, CacheOptions.of(**options), itemsize=dtype.size) == held, (
                tokens,
                chunk,
            )
    assert cache_bytes(config, 0, CacheOptions.of(**options)) == 0


def test_the_caches_of_the_7b_at_16k_keep_what_is_promised() -> None:
    assert cache_bytes(SEVEN, 16384, CacheOptions(8)) <= 1.9 * GIB
    assert cache_bytes(SEVEN, 16384, CacheOptions(4)) <= 1.1 * GIB


@pytest.mark.parametrize("wrong", [{"kv_bits": 5}, {"kv_bits": 8, "kv_group_size": 48}, {"rewind": -1}])
def test_cache_bytes_refuse_what_make_caches_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        cache_bytes(SEVEN, 100, CacheOptions.of(**wrong))


# Weights


def loaded_bytes(folder: Path, **options: Any) -> int:
    return sum(array.nbytes for array in load(folder, **options)[0].tensors().values())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_stored_weights_take_what_they_take_when_loaded(tmp_path: Path, dtype: mx.Dtype) -> None:
    model = random_model({**TINY, "vocab_size": 8192})
    tensors = {name: array.astype(dtype) for name, array in model.tensors().items()}
    folder = save_checkpoint(tmp_path, {**TINY, "vocab_size": 8192}, tensors)
    assert Checkpoint.in_folder(folder).weight_bytes() == loaded_bytes(folder)
    assert Checkpoint.in_folder(folder).weight_bytes(mx.bfloat16) == loaded_bytes(folder, dtype="bfloat16")
    assert Checkpoint.in_folder(folder).itemsize() == load(folder)[0].model.norm.weight.dtype.size


def test_quantized_stored_weights_count_what_the_cpu_backend_widens() -> None:
    assert Checkpoint.in_folder(DEMO).weight_bytes() == loaded_bytes(DEMO)
    assert Checkpoint.in_folder(DEMO).itemsize() == load(DEMO)[0].model.norm.weight.dtype.size
    assert Checkpoint.in_folder(DEMO).itemsize(mx.bfloat16) == 2


def test_the_lab_checkpoints_take_what_they_say(lab: Path) -> None:
    assert Checkpoint.in_folder(lab).weight_bytes() == loaded_bytes(lab)


def test_weights_that_are_cut_short_are_refused_before_they_are_counted(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, TINY, random_model(TINY).tensors())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        Checkpoint.in_folder(folder).weight_bytes()


# Working space


def peaks(config: Olmo3Config, chunk: int, held: int, kv_bits: int | None, dtype: mx.Dtype) -> Iterator[int]:
    """Bytes that a pass needs beside the weights and the caches as they are after it, of a few passes.

    MLX allocates ahead of what it runs, for up to ten operations. On a busy machine it may be that the one
    who runs them keeps up, and a pass takes less than it can: the estimate is of what it takes at most.
    """
    model = Olmo3(config)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    for _ in range(8):
        caches = model.make_caches(kv_bits=kv_bits)
        fill(caches, config, held, dtype)
        gc.collect()  # what earlier tests left would go while this is measured
        mx.synchronize()
        mx.clear_cache()
        before = mx.get_active_memory() - sum(cache.nbytes for cache in caches)
        mx.reset_peak_memory()
        logits = model(mx.zeros((1, chunk), mx.int32), caches, logits_to_keep=1)
        mx.eval([cache.state for cache in caches], mx.softmax(logits.astype(mx.float32)))
        del logits
        yield mx.get_peak_memory() - before - sum(cache.nbytes for cache in caches)


def largest(found: Iterator[int], enough: float, at_most: int) -> int:
    """The largest peak, looked for until one is `enough`; no peak at all may be above `at_most`."""
    most = 0
    for one in found:
        assert one <= at_most, at_most / one
        most = max(most, one)
        if most >= enough:
            break
    return most


on_cpu = pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="was fitted to the CPU")


@on_cpu
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kv_bits", "chunk", "held"),
    [
        ({"inner": 2048}, None, 512, 0),
        ({"hidden": 256, "inner": 512, "layers": 4}, None, 128, 1000),
        ({"hidden": 256, "inner": 512, "layers": 4, "kv": 1, "window": 256}, None, 512, 1000),
        ({"hidden": 256, "inner": 512, "layers": 4, "window": 256}, 8, 128, 1000),
        ({"hidden": 256, "inner": 512, "layers": 4, "window": 256}, 4, 128, 1000),
        ({"hidden": 256, "inner": 512, "layers": 4}, 4, 64, 2000),
        ({"hidden": 512, "heads": 2, "kv": 2}, None, 128, 0),
    ],
)
def test_working_space_is_estimated_from_above_and_within_a_factor(
    shape: dict[str, int], kv_bits: int | None, chunk: int, held: int, dtype: mx.Dtype
) -> None:
    config = sized(**shape)
    estimate = working_bytes(config, chunk, held + chunk, CacheOptions(kv_bits), itemsize=dtype.size)
    measured = largest(peaks(config, chunk, held, kv_bits, dtype), estimate / 2.2, at_most=estimate)
    assert estimate <= 2.2 * measured, estimate / measured


def without(count: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The estimate with one term less."""

    def drop(patch: pytest.MonkeyPatch) -> None:
        if count in working_space._Counts._fields:
            patch.setattr(working_space, "_ON_CPU", working_space._ON_CPU._replace(**{count: 0}))
        else:
            patch.setattr(working_space._Pass, count, lambda *_: 0)

    return drop


@on_cpu
@pytest.mark.parametrize(
    ("term", "shape", "how"),
    [
        ("intermediate", {"inner": 2048}, (None, 512, 0)),
        ("hidden", {"hidden": 512, "heads": 2, "kv": 1}, (None, 512, 0)),
        ("queries", {"heads": 2, "kv": 1, "dim": 256}, (None, 512, 0)),
        ("keys", {"heads": 1, "kv": 1, "dim": 512}, (None, 512, 0)),
        ("_scores", {"hidden": 128, "heads": 8, "kv": 8}, (None, 512, 600)),
        ("_joined", {"hidden": 256, "heads": 1, "kv": 1, "window": 2048}, (None, 130, 3000)),
        ("growth", {"hidden": 256, "layers": 4}, (None, 1, 4096)),
        ("_quantized", {"hidden": 256, "layers": 4}, (8, 16, 2000)),
        ("_quantized", {"hidden": 256, "layers": 4}, (4, 16, 2000)),
        ("head", {"vocab": 100_000}, (None, 1, 100)),
    ],
)
def test_every_term_of_the_working_space_is_needed(
    term: str, shape: dict[str, int], how: tuple[int | None, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sized(**shape)
    kv_bits, chunk, held = how
    estimate = working_bytes(config, chunk, held + chunk, CacheOptions(kv_bits), itemsize=4)
    without(term)(monkeypatch)
    less = working_bytes(config, chunk, held + chunk, CacheOptions(kv_bits), itemsize=4)
    assert largest(peaks(config, chunk, held, kv_bits, mx.float32), less + 1, at_most=estimate) > less


def test_working_space_on_a_gpu_is_above_what_was_measured_there() -> None:
    """Peaks in MiB of the 7B's shape with 16 layers, bfloat16, on an H100 with MLX 0.32.4."""
    config = Olmo3Config.from_dict({**SIZES["7b"], "num_hidden_layers": 16})
    measured = {
        (None, 8, 8000): 42,
        (None, 32, 8000): 131,
        (None, 64, 8000): 240,
        (None, 128, 8000): 480,
        (None, 448, 8000): 699,
        (None, 511, 8000): 386,
        (None, 512, 8000): 377,
        (None, 2048, 0): 316,
        (None, 2048, 8000): 683,
        (None, 2048, 30000): 885,
        (8, 32, 8000): 439,
        (8, 128, 8000): 515,
        (8, 448, 8000): 928,
        (8, 2048, 0): 1190,
        (8, 2048, 8000): 1372,
        (8, 2048, 30000): 1486,
    }
    for (kv_bits, chunk, held), mib in measured.items():
        estimate = working_bytes(config, chunk, held + chunk, CacheOptions(kv_bits), on_gpu=True) / 2**20
        assert mib <= estimate, (kv_bits, chunk, held, estimate)
        assert chunk < 2048 or estimate <= 3.1 * mib, (kv_bits, chunk, held, estimate)


# Plans


def test_the_default_context_is_the_largest_that_fits_and_one_more_would_not() -> None:
    weights = weight_bytes(SEVEN, 4)
    made = plan(SEVEN, weights, machine=8 * GIB, chunk=256)
    assert made.fits
    assert 512 <= made.context < 65536
    assert made.total == made.weights + made.caches + made.working <= 8 * GIB
    assert made.caches == cache_bytes(SEVEN, made.context)
    with pytest.raises(MemoryFitError):
        plan(SEVEN, weights, machine=8 * GIB, chunk=256, context=made.context + 1)
    assert plan(SEVEN, weights, machine=8 * GIB, chunk=256, context=made.context) == made


def test_the_default_context_is_the_models_where_there_is_room() -> None:
    assert plan(SEVEN, weight_bytes(SEVEN, 4), machine=64 * GIB).context == 65536


def test_quantized_caches_make_room_for_more_tokens() -> None:
    weights = weight_bytes(SEVEN, 4)
    fit = MemoryFit(SEVEN, machine=8 * GIB, chunk=8)  # few enough not to unpack any
    assert (
        fit.largest(weights) < fit.largest(weights, CacheOptions(8)) < fit.largest(weights, CacheOptions(4))
    )


def test_what_fits_grows_with_the_machine_and_what_it_takes_grows_with_the_context() -> None:
    for kv_bits, start in ((None, 0), (8, 0), (4, 3000)):
        fit, options = MemoryFit(SEVEN, machine=8 * GIB), CacheOptions(kv_bits, start=start)
        totals = [fit.at(0, context, options).total for context in (1, 500, 2999, 3001, 5000, 20000, 65536)]
        assert totals == sorted(totals)


def test_a_context_that_does_not_fit_is_refused_with_the_numbers_and_what_would() -> None:
    with pytest.raises(MemoryFitError) as caught:
        plan(SEVEN, weight_bytes(SEVEN, 8), context=65536, machine=16 * GIB, chunk=64)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("a context of 65,536 tokens needs 1")
    for part in ("weights 7.22 GiB", "caches 9.73 GiB", "working space", "there are 16.00 GiB"):
        assert part in message
    context = int(message.partition("context=")[2].partition(",")[0])
    assert plan(SEVEN, weight_bytes(SEVEN, 8), context=context, machine=16 * GIB, chunk=64).fits
    assert "or kv_bits=8, or weights of 4 bits" in message


def test_a_refusal_names_kv_bits_4_where_8_are_too_many() -> None:
    weights = weight_bytes(SEVEN, 4)
    machine = MemoryFit(SEVEN, chunk=32).at(weights, 65536, CacheOptions(4)).total
    with pytest.raises(MemoryFitError, match=r" caches .* or kv_bits=4$"):
        plan(SEVEN, weights, context=65536, machine=machine, chunk=32)
    with pytest.raises(MemoryFitError, match=r"8-bit caches .* or kv_bits=4$"):
        plan(SEVEN, weights, context=65536, kv_bits=8, machine=machine, chunk=32)


def test_a_refusal_names_both_where_only_smaller_weights_and_caches_fit_together() -> None:
    machine = MemoryFit(SEVEN, chunk=32).at(weight_bytes(SEVEN, 4), 65536, CacheOptions(4)).total
    with pytest.raises(MemoryFitError, match="what fits is weights of 4 bits with kv_bits=4"):
        plan(SEVEN, weight_bytes(SEVEN), context=65536, machine=machine, chunk=32)


def test_weights_that_leave_no_room_are_refused_without_a_context_too() -> None:
    with pytest.raises(MemoryFitError, match="what fits is weights of 8 bits"):
        plan(SEVEN, weight_bytes(SEVEN), machine=12 * GIB)
    with pytest.raises(MemoryFitError, match="nothing fits but a smaller model"):
        plan(SEVEN, weight_bytes(SEVEN), machine=2 * GIB)


def test_weights_that_have_few_bits_already_are_not_advised_to_have_them() -> None:
    """A little more than our estimate of them: groups of 32 take more, say."""
    quantized = replace(SEVEN, quantization=QuantizationConfig(Quantization(4, 32)))
    size = int(weight_bytes(SEVEN, 4) * 1.1)
    with pytest.raises(MemoryFitError, match="what fits is context=") as caught:
        plan(quantized, size, context=65536, machine=size + GIB, chunk=32)
    assert "weights of" not in str(caught.value).partition("what fits is")[2]


def test_a_head_that_cannot_be_quantized_is_never_advised_to_be() -> None:
    config = sized(hidden=64)  # heads of 16
    whole = MemoryFit(config).at(0, 60000).total
    with pytest.raises(MemoryFitError) as caught:
        plan(config, 0, context=60000, machine=whole - 1)
    assert "kv_bits" not in str(caught.value)


@pytest.mark.parametrize("context", [0, -1, True, 1.5, "512", 65537])
def test_a_context_that_no_model_has_is_a_wrong_option(context: Any) -> None:
    with pytest.raises(OptionError, match="context must be"):
        plan(SEVEN, 0, context=context)


def test_a_plan_knows_whether_it_fits() -> None:
    assert MemoryPlan(1, CacheOptions(), 1, 2, 3, 6).fits
    assert not MemoryPlan(1, CacheOptions(), 1, 2, 3, 5).fits


# The machine


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12345678", 12345678),
        ("8G", 8 * GIB),
        ("900M", 900 * 2**20),
        ("1.5g", 3 * GIB // 2),
        ("4 GiB", 4 * GIB),
    ],
)
def test_a_variable_says_how_much_memory_to_use(
    text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", text)
    assert machine_bytes() == size
    assert plan(sized(), 0).machine == size


@pytest.mark.parametrize("text", ["0", "-1", "much", "8X", "nan", "1e9", "0.1"])
def test_a_variable_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", text)
    with pytest.raises(OptionError, match="OLMO3_MEMORY must be bytes, or like 8G or 900M"):
        machine_bytes()


def test_without_the_variable_the_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLMO3_MEMORY", "")
    assert machine_bytes() > 2**28


def test_a_containers_limit_is_the_machines_memory_unless_the_machine_has_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OLMO3_MEMORY", raising=False)
    monkeypatch.setattr("olmo3_mlx.memory.machine.mx.default_device", lambda: mx.Device(mx.cpu))
    for limit, least, most in ((2**26, 2**26, 2**26), (2**62, 2**28, 2**50), (None, 2**28, 2**50)):
        monkeypatch.setattr("olmo3_mlx.memory.machine.container_bytes", lambda limit=limit: limit)
        assert least <= machine_bytes() <= most


class FakeMetal:
    """A Mac as far as `wired` sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit, self.calls = 7, list[str]()
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 100})
        monkeypatch.setattr(mx, "set_wired_limit", self.set)
        monkeypatch.setattr(mx, "synchronize", lambda: self.calls.append("synchronize"))

    def set(self, limit: int) -> int:
        self.calls.append(f"set {limit}")
        before, self.limit = self.limit, limit
        return before


@pytest.mark.parametrize(("usual", "within"), [(2**33, 2**30), (2**25, 2**25)])
def test_little_is_kept_only_as_long_as_asked(usual: int, within: int) -> None:
    before = mx.set_cache_limit(usual)
    try:
        with pytest.raises(KeyError), small_buffer_pool():
            assert mx.set_cache_limit(within) == within
            raise KeyError
        assert mx.set_cache_limit(before) == usual
    finally:
        mx.set_cache_limit(before)


def test_the_wired_limit_is_what_mlx_recommends_and_restored_after_running_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metal = FakeMetal(monkeypatch)
    with wired():
        assert metal.limit == 100
        with wired():
            assert metal.limit == 100
        assert metal.limit == 100
    assert metal.calls == ["set 100", "set 100", "synchronize", "set 100", "synchronize", "set 7"]


def test_the_wired_limit_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    metal = FakeMetal(monkeypatch)
    with pytest.raises(KeyError), wired():
        raise KeyError
    assert metal.limit == 7


def test_without_metal_nothing_is_wired(monkeypatch: pytest.MonkeyPatch) -> None:
    metal = FakeMetal(monkeypatch)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with wired():
        pass
    assert metal.calls == []


def test_the_watch_tells_when_memory_would_pass_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "get_active_memory", lambda: 60)
    watch = MemoryWatch(100)
    assert not watch.exhausted()
    assert not watch.exhausted(40)
    assert watch.exhausted(41)
    monkeypatch.setenv("OLMO3_MEMORY", "59")
    assert MemoryWatch().exhausted()
    with pytest.raises(OptionError):
        MemoryWatch(0)


def test_the_watch_sees_real_arrays() -> None:
    watch = MemoryWatch(mx.get_active_memory() + 2**20)
    assert not watch.exhausted()
    array = mx.zeros((2**19,))
    mx.eval(array)
    assert watch.exhausted()
    del array
    assert not watch.exhausted()
