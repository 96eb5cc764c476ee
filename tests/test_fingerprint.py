"""The fingerprint of weights: the same for the same ones, another for any that differ."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model, save_checkpoint

from olmo3_mlx import Olmo3, load
from olmo3_mlx.checkpoints.fingerprint import fingerprint


@pytest.fixture
def model() -> Olmo3:
    return random_model(TINY)


def changed(model: Olmo3, name: str, change: Any) -> Olmo3:
    """The model with one tensor changed."""
    model.load_weights([(name, change(model.tensors()[name]))], strict=False)
    mx.eval(model.parameters())
    return model


def test_the_same_weights_have_the_same_fingerprint(model: Olmo3) -> None:
    found = fingerprint(model)
    assert fingerprint(model) == fingerprint(random_model(TINY)) == found
    assert len(found) == 32
    assert int(found, 16) >= 0


def test_using_a_model_does_not_change_its_fingerprint(model: Olmo3) -> None:
    before = fingerprint(model)
    model(mx.array([[1, 2, 3]]), model.make_caches())
    assert fingerprint(model) == before


def test_loading_again_and_in_another_process_gives_the_same(demo: tuple[Olmo3, Any]) -> None:
    script = """
from olmo3_mlx import load
from olmo3_mlx.checkpoints.fingerprint import fingerprint
print(fingerprint(load("demo")[0]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(demo[0]) == fingerprint(load("demo")[0])


def test_another_folder_with_the_same_weights_has_the_same(tmp_path: Path) -> None:
    config = {**TINY, "vocab_size": 8192}
    tensors = random_model(config).tensors()
    one, two = (load(str(save_checkpoint(tmp_path / name, config, tensors)))[0] for name in "ab")
    assert fingerprint(one) == fingerprint(two)


def test_another_seed_and_another_architecture_differ(model: Olmo3) -> None:
    configs = [{**TINY, "sliding_window": 9}, {**TINY, "rope_theta": 9999.0}, {**TINY, "rms_norm_eps": 1e-5}]
    others = [random_model(config) for config in configs]
    found = {fingerprint(other) for other in [model, random_model(TINY, seed=1), *others]}
    assert len(found) == 5


def test_one_bit_of_any_tensor_makes_another(model: Olmo3) -> None:
    before = fingerprint(model)
    for name, weight in sorted(model.tensors().items())[::3]:
        bits = mx.contiguous(weight).view(mx.uint32)
        one = mx.zeros(weight.size, dtype=mx.uint32)
        one[weight.size // 2] = 1
        flipped = mx.bitwise_xor(bits, one.reshape(bits.shape)).view(weight.dtype)
        assert fingerprint(changed(random_model(TINY), name, lambda old, new=flipped: new)) != before, name


def swapped(first: int, second: int) -> Any:
    def change(weight: mx.array) -> mx.array:
        order = list(range(weight.shape[0]))
        order[first], order[second] = second, first
        return weight[mx.array(order)]

    return change


@pytest.mark.parametrize("rows", [(0, 1), (1, 2), (0, 3), (4, 7)])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_rows_that_changed_places_make_another(model: Olmo3, name: str, rows: tuple[int, int]) -> None:
    """Two tokens or two heads in other places: the same numbers, another model."""
    before = fingerprint(model)
    assert fingerprint(changed(model, name, swapped(*rows))) != before


@pytest.mark.parametrize("places", [(0, 1), (1, 2), (0, 3), (1, 30)])
def test_two_numbers_that_changed_places_make_another(model: Olmo3, places: tuple[int, int]) -> None:
    before = fingerprint(model)
    assert fingerprint(changed(model, "model.norm.weight", swapped(*places))) != before


def test_two_changes_that_cancel_in_a_sum_make_another(model: Olmo3) -> None:
    """One weight up by a bit, another down by one."""
    before = fingerprint(model)

    def change(weight: mx.array) -> mx.array:
        bits = weight.view(mx.uint32)
        delta = mx.zeros(bits.shape, dtype=mx.uint32)
        delta[1], delta[2] = 1, 2**32 - 1
        return (bits + delta).view(weight.dtype)

    assert fingerprint(changed(model, "model.norm.weight", change)) != before


def test_two_tensors_that_changed_places_make_another(model: Olmo3) -> None:
    before = fingerprint(model)
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.gate_proj.weight"]
    one, two = (model.tensors()[name] for name in names)
    model.load_weights([(names[0], two), (names[1], one)], strict=False)
    assert fingerprint(model) != before


def test_another_dtype_makes_another(model: Olmo3) -> None:
    before = fingerprint(model)
    model.set_dtype(mx.bfloat16)
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_weights_of_the_other_sign_make_another(model: Olmo3, name: str) -> None:
    before = fingerprint(model)
    assert fingerprint(changed(model, name, lambda weight: -weight)) != before


def test_weights_with_an_odd_number_of_bytes_are_read_too() -> None:
    model = random_model({**TINY, "vocab_size": 127, "intermediate_size": 95, "hidden_size": 64})
    model.set_dtype(mx.bfloat16)
    assert fingerprint(model) == fingerprint(model)


def test_reading_the_weights_needs_little_memory(demo: tuple[Olmo3, Any]) -> None:
    model = demo[0]
    fingerprint(model)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fingerprint(model)
    largest = max(weight.nbytes for weight in model.tensors().values())
    assert mx.get_peak_memory() - before <= 4 * largest
