"""Calibrated quantization: what is written is what was meant, better than rounding, and repeatable."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, random_model, save_checkpoint

from convert.calibration.allocation import _options, allocate, at_four_bits
from convert.calibration.calibration import Calibration
from convert.calibration.gptq import _gptq, quantized, settled
from convert.calibration.grids import searched, solved
from convert.calibration.matrix import QuantizedMatrix
from convert.calibration.memory import calibrating_bytes
from convert.calibration.metric import Metric
from convert.calibration.moments import Moments
from convert.calibration.sensitivity import choose, costs
from convert.reading.layers import Layers
from convert.reading.source import Source
from olmo3_mlx import Olmo3Config, Tokenizer
from olmo3_mlx.published import SIZES
from olmo3_mlx.quantization import Quantization


def dequantized(tensors: Mapping[str, mx.array], path: str, scheme: Quantization) -> mx.array:
    scales, biases = tensors[f"{path}.scales"], tensors.get(f"{path}.biases")
    if biases is not None:  # in affine mode, where floating-point scales may be of any type
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        tensors[f"{path}.weight"], scales, biases,
        group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode, dtype=mx.float32,
    )  # fmt: skip


def a_source(folder: Path, **changes: Any) -> Source:
    two = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = {**TINY, **two, **changes}
    tensors = {name: array.astype(mx.bfloat16) for name, array in random_model(config).tensors().items()}
    return Source.open(save_checkpoint(folder, config, tensors, tokenizer=False))


def a_text(rows: int = 4, length: int = 64, seed: int = 1) -> mx.array:
    return mx.random.randint(0, TINY["vocab_size"], (rows, length), key=mx.random.key(seed))


def every(source: Source, scheme: Quantization) -> dict[str, Quantization]:
    return {
        name.removesuffix(".weight"): scheme
        for name, tensor in source.tensors.items()
        if len(tensor.shape) == 2 and tensor.shape[1] % scheme.group_size == 0
    }


def calibrated(source: Source, plan: Mapping[str, Quantization], text: mx.array) -> dict[str, mx.array]:
    calibration = Calibration(source, plan, text)
    tensors = calibration.embedding()
    for index in range(source.config.num_hidden_layers):
        tensors |= calibration.block(index)
    return tensors | calibration.head()


def kl(source: Source, weights: Mapping[str, mx.array], text: mx.array) -> float:
    model = random_model(dict(source.data))
    original = {name: Layers(source).weight(name) for name in source.tensors}
    model.load_weights(list(original.items()))
    reference = model(text)
    model.load_weights(list({**original, **weights}.items()))
    a, b = (x - mx.logsumexp(x, -1, keepdims=True) for x in (reference, model(text)))
    return float((mx.exp(a) * (a - b)).sum(-1).mean())


def a_layer(rows: int = 48, n: int = 128, seed: int = 0) -> tuple[Any, Any]:
    """Weights, and the Hessian of inputs that go together, a few of them much larger than others."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(n, n)) * np.exp(draw.normal(size=n)) / n**0.5
    x = (draw.normal(size=(4 * n, n)) @ mixing).astype(np.float32)
    return mx.array(draw.normal(size=(rows, n)).astype(np.float32)), mx.array(x.T @ x)


def one(weight: mx.array, metric: Metric, scheme: Quantization, **options: Any) -> QuantizedMatrix:
    """A layer quantized by itself."""
    return quantized([weight], metric, [scheme], [mx.bfloat16], **options)[0]


def error(weight: Any, hessian: Any, matrix: QuantizedMatrix) -> float:
    left = weight - matrix.dense()
    return float((left @ hessian * left).sum().item())


@pytest.mark.parametrize("bits", [3, 4])
def test_each_step_lowers_the_error_of_the_outputs(bits: int) -> None:
    weight, hessian = a_layer()
    scheme = Quantization(bits, 64)
    plain = error(weight, hessian, searched(weight, mx.diag(hessian), scheme, mx.bfloat16))
    gptq = error(weight, hessian, one(weight, Metric.of(hessian), scheme, passes=0))
    refitted = error(weight, hessian, one(weight, Metric.of(hessian), scheme, passes=2))
    assert gptq < 0.7 * plain
    assert refitted < 0.9 * gptq


@pytest.mark.parametrize("n", [40, 256, 700])
def test_a_metric_inverts_its_hessian(n: int) -> None:
    """700 columns: three blocks, and halves of unequal size."""
    _, hessian = a_layer(1, n)
    metric = Metric.of(hessian)
    exact = np.array(hessian, np.float64)
    exact += 0.01 * np.mean(np.diag(exact)) * np.eye(n)
    rows = np.random.default_rng(1).normal(size=(3, n))
    wanted = np.linalg.solve(exact, rows.T).T
    found = np.array(metric.inverse(mx.array(rows.astype(np.float32))))
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    whole = np.zeros((n, n), np.float32)
    for place, (column, _) in enumerate(metric.parts):
        whole[256 * place :, 256 * place : 256 * (place + 1)] = column
    assert np.array_equal(np.tril(whole), whole)
    ordered = np.array(metric.hessian)[np.array(metric.order)][:, np.array(metric.order)]
    assert np.abs(whole @ whole.T - ordered).max() < 1e-4 * np.abs(ordered).max()


def test_conjugate_gradients_solve_each_row_for_itself() -> None:
    draw = np.random.default_rng(0)
    half = draw.normal(size=(5, 6, 6))
    systems = (half @ half.transpose(0, 2, 1) / 6 + 2 * np.eye(6)).astype(np.float32)
    right = draw.normal(size=(5, 2, 3)).astype(np.float32)
    right[2] = 0
    found = solved(
        lambda x: (mx.array(systems) @ x.reshape(5, 6, 1)).reshape(5, 2, 3),
        mx.array(right),
        mx.array(np.diagonal(systems, axis1=1, axis2=2).reshape(5, 2, 3)),
    )
    wanted = np.linalg.solve(systems, right.reshape(5, 6, 1)).reshape(5, 2, 3)
    assert np.abs(np.array(found) - wanted).max() < 1e-4


def test_dead_inputs_are_no_trouble() -> None:
    weight, hessian = a_layer()
    hessian[5:20] = hessian[:, 5:20] = 0
    matrix = one(weight, Metric.of(hessian), Quantization(4, 32))
    assert mx.isfinite(matrix.dense()).all().item()
    nothing = one(weight, Metric.of(mx.zeros_like(hessian)), Quantization(4, 32))
    assert float(mx.abs(nothing.dense() - weight).max()) < 1


def test_constant_groups_come_back_exactly() -> None:
    weight = mx.full((4, 64), 0.5)
    weight[1] = 0
    matrix = one(weight, Metric.of(mx.eye(64)), Quantization(4, 64))
    assert float(mx.abs(matrix.dense() - weight).max()) < 1e-6


def test_the_aim_makes_good_half_of_a_drift_in_the_inputs() -> None:
    draw = np.random.default_rng(0)
    original = mx.array(draw.normal(size=(512, 32)).astype(np.float32))
    weight = mx.array(draw.normal(size=(8, 32)).astype(np.float32))
    for weights in (None, {"a": weight}):  # the drift by itself, and its products with the weights
        moments = Moments.of(iter([(0.8 * original, original)]), weights)
        aim = moments.aimed("a", slice(2, 8), weight[2:8])
        assert float(mx.abs(aim - 1.125 * weight[2:8]).max()) < 0.02  # half of 1 / 0.8 - 1


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"tie_word_embeddings": True}])
def test_calibrated_is_nearer_than_rounded_on_unseen_tokens(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = a_source(tmp_path / "a", **changes)
    scheme = Quantization(4, 32)
    plan = every(source, scheme)
    tensors = calibrated(source, plan, a_text(16))
    assert {name.rpartition(".")[0] for name in tensors} == plan.keys()
    ours = {f"{path}.weight": dequantized(tensors, path, scheme) for path in plan}
    plain = {}
    for path in plan:
        weight = Layers(source).weight(f"{path}.weight").astype(mx.bfloat16)
        codes = dict(
            zip(
                (f"{path}.{kind}" for kind in ("weight", "scales", "biases")),
                mx.quantize(weight, group_size=32, bits=4),
                strict=True,
            )
        )
        plain[f"{path}.weight"] = dequantized(codes, path, scheme)
        for name, array in codes.items():
            assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype), name
    unseen = a_text(16, seed=9)
    assert kl(source, ours, unseen) < 0.85 * kl(source, plain, unseen)


def test_the_same_text_gives_the_same_bytes_and_another_text_others(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    plan = {path: how for path, how in every(source, Quantization(3, 32)).items() if ".0." not in path}
    first, again, other = (calibrated(source, plan, a_text(2, seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[n].view(mx.uint8), again[n].view(mx.uint8)) for n in first)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not np.array_equal(first[name], other[name])


class Quantized(Layers):
    """A source with some layers as they were quantized."""

    def __init__(self, source: Source, tensors: Mapping[str, mx.array], scheme: Quantization) -> None:
        super().__init__(source)
        self._quantized, self._scheme = tensors, scheme

    def weight(self, name: str) -> mx.array:
        path = name.removesuffix(".weight")
        if f"{path}.scales" in self._quantized:
            return dequantized(self._quantized, path, self._scheme)
        return super().weight(name)


def test_skipping_blocks_made_before_changes_nothing(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    scheme = Quantization(4, 32)
    plan = every(source, scheme)
    whole = calibrated(source, plan, a_text(2))
    resumed = Calibration(source, plan, a_text(2))
    resumed.embedding()
    resumed.skip(0, Quantized(source, whole, scheme))
    for name, array in (resumed.block(1) | resumed.head()).items():
        assert np.array_equal(array.view(mx.uint8), whole[name].view(mx.uint8)), name


@pytest.mark.parametrize(("size", "measured"), [("7b", 3.99e9), ("32b", 11.56e9)])
def test_what_calibrating_takes_is_estimated_from_above(size: str, measured: float) -> None:
    """Measured on a GPU at these shapes with 32,768 tokens (BENCHMARKS.md)."""
    needed = calibrating_bytes(Olmo3Config.from_dict(SIZES[size]), 32768)
    assert measured < needed < 1.25 * measured


def test_layers_out_of_the_plan_are_left_alone(tmp_path: Path) -> None:
    plan = {"model.layers.1.mlp.up_proj": Quantization(4, 32)}
    tensors = calibrated(a_source(tmp_path / "a"), plan, a_text(1))
    assert {name.rpartition(".")[0] for name in tensors} == {"model.layers.1.mlp.up_proj"}


@pytest.fixture
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are weighed against each other by a few rows and ranges."""
    monkeypatch.setattr("convert.calibration.grids._SHRINKS", (1.0, 0.9, 0.8))
    monkeypatch.setattr("convert.calibration.allocation._SAMPLED_ROWS", 16)


@pytest.mark.usefixtures("few_tries")
@pytest.mark.parametrize("target", [3.6, 5.0, 7.0])
def test_a_plan_keeps_to_its_budget_and_uses_it(tmp_path: Path, target: float) -> None:
    source = a_source(tmp_path / "a")
    plan = choose(source, a_text(1, 16), target)
    bits = 0.0
    for name, tensor in source.tensors.items():
        scheme = plan.get(name.removesuffix(".weight"))
        size = int(np.prod(tensor.shape))
        bits += size * (16 if scheme is None else scheme.bits + 32 / scheme.group_size)
    parameters = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    assert target - 0.2 < bits / parameters <= target


@pytest.mark.parametrize("rows", [4096, 50])
def test_costs_are_shares_of_what_rounding_each_layer_alone_does(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By gradients of drawn tokens, which are a few hundred here."""
    source = a_source(tmp_path / "a")
    monkeypatch.setattr("convert.reading.layers._ROWS_BYTES", 4 * source.config.hidden_size * rows)
    text = a_text(16, 64)
    found = costs(source, text)
    assert abs(sum(found.values()) - 1) < 1e-6
    measured = {}
    for path in found:
        weight = Layers(source).weight(f"{path}.weight")
        measured[path] = kl(source, {f"{path}.weight": at_four_bits(weight)}, text)
    whole = sum(measured.values())
    for path, share in found.items():
        assert abs(share / (measured[path] / whole) - 1) < 0.3, path


def test_kinds_of_text_count_alike_in_costs(tmp_path: Path) -> None:
    """Three sequences of one kind and one of another give the mean of the shares that each kind has alone."""
    source = a_source(tmp_path / "a")
    text = a_text(4, 16)
    mixed = costs(source, text, ("a", "b", "a", "a"))
    plain = costs(source, text)
    assert any(abs(mixed[path] / plain[path] - 1) > 0.05 for path in mixed)
    assert abs(sum(mixed.values()) - 1) < 1e-6


@pytest.mark.slow
def test_a_trained_block_is_nearer_to_the_original_than_rounded(lab: Path) -> None:
    """On text that it was not calibrated on, with the embedding already quantized in both."""
    source = Source.open(lab)
    tokenizer = Tokenizer.from_folder(lab)
    ids = tokenizer.encode((lab.parents[1] / "text" / "treasure_island.txt").read_text()[100_000:140_000])
    text, unseen = mx.array(ids[:4096]).reshape(8, 512), mx.array(ids[6000:6512])[None]
    plan = every(source, Quantization(4, 64))
    calibration = Calibration(source, plan, text)
    calibrated_tensors = calibration.embedding() | calibration.block(0)
    layers = Layers(source)
    path = "model.embed_tokens"
    hidden = dequantized(calibrated_tensors, path, plan[path])[unseen]
    wanted = layers.block(0)(layers.embed(unseen), None)
    errors = []
    for calibrate in (True, False):
        block = layers.block(0)
        for name in [
            path.removeprefix("model.layers.0.") for path in plan if path.startswith("model.layers.0.")
        ]:
            path = f"model.layers.0.{name}"
            weight = layers.weight(f"{path}.weight").astype(mx.bfloat16)
            parts = zip(
                ("weight", "scales", "biases"), mx.quantize(weight, group_size=64, bits=4), strict=True
            )
            tensors = calibrated_tensors if calibrate else {f"{path}.{kind}": array for kind, array in parts}
            block.load_weights([(f"{name}.weight", dequantized(tensors, path, plan[path]))], strict=False)
        errors.append(float(mx.square(block(hidden, None) - wanted).mean()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("columns", [40, 256, 300])
def test_columns_settle_at_the_codes_of_one_after_another(columns: int) -> None:
    weight, hessian = a_layer(8, columns)
    scheme = Quantization(4, columns // 4)
    metric = Metric.of(hessian)
    matrix = searched(weight, mx.diag(metric.hessian), scheme, mx.bfloat16)
    found = np.array(_gptq([weight], metric, [matrix])).T

    exact = np.array(metric.hessian, np.float64)
    order = np.array(metric.order)
    lower = np.linalg.cholesky(exact[order][:, order])
    group = np.arange(columns)[order] // scheme.group_size
    scales, biases = (np.array(each, np.float64)[:, group] for each in (matrix.scales, matrix.biases))
    left = np.array(weight, np.float64)[:, order]
    codes, errors = np.zeros_like(left), np.zeros_like(left)
    for j in reversed(range(columns)):
        carried = errors[:, j + 1 :] @ lower[j + 1 :, j] / lower[j, j]
        codes[:, j] = np.clip(np.round((left[:, j] + carried - biases[:, j]) / scales[:, j]), 0, matrix.top)
        errors[:, j] = left[:, j] - codes[:, j] * scales[:, j] - biases[:, j]
    assert (
        np.mean(codes != found[:, order]) < 0.01
    )  # a rounding that float32 decides otherwise changes others


def test_columns_settle_in_far_fewer_rounds_than_there_are_columns() -> None:
    weight, hessian = a_layer(64, 256)
    metric, rounds = Metric.of(hessian), 0
    within = mx.tril(metric.parts[0].column / mx.diag(metric.parts[0].column), -1).T

    def again(codes: mx.array) -> mx.array:
        nonlocal rounds
        rounds += 1
        return mx.round(weight.T + within @ (weight.T - codes))

    codes = settled(mx.round(weight.T), again)
    assert mx.array_equal(codes, again(codes)).item()
    assert rounds < 100


@pytest.mark.usefixtures("few_tries")
def test_a_large_layer_is_no_reason_to_waste_bits(tmp_path: Path) -> None:
    """The head as large as all else: a step of it that no longer fits must not leave it at the bottom."""
    source = a_source(tmp_path / "a", vocab_size=2048)
    sizes = {name.removesuffix(".weight"): np.prod(tensor.shape) for name, tensor in source.tensors.items()}
    blocks = [path for path in every(source, Quantization(4, 32)) if "layers" in path]
    found = {**dict.fromkeys(blocks, 0.002), "lm_head": 0.05, "model.embed_tokens": 0.0001}
    few = [Quantization(bits, 32) for bits in (3, 4, 8)]
    options = {
        path: dict(zip(few, _options(source, path, found[path], few, None), strict=True)) for path in found
    }

    def cost(plan: Mapping[str, Quantization]) -> float:
        return sum(options[path][scheme][1] for path, scheme in plan.items())

    for target in np.arange(4.2, 8.5, 0.4):
        plan = allocate(source, found, float(target), few)
        rest = 16 * sum(size for path, size in sizes.items() if path not in plan)
        spent = rest + sum(sizes[path] * options[path][scheme][0] for path, scheme in plan.items())
        assert spent <= target * sum(sizes.values())
        # No better plan with all blocks alike.
        for head, embedding, block in product(few, few, few):
            other = {**dict.fromkeys(blocks, block), "lm_head": head, "model.embed_tokens": embedding}
            bits = rest + sum(sizes[path] * options[path][scheme][0] for path, scheme in other.items())
            if bits <= target * sum(sizes.values()):
                assert cost(plan) <= cost(other) * 1.0001
