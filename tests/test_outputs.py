"""Rounding rows in parts, each against what errors of those before it do at the model's end."""

import mlx.core as mx
import numpy as np
import pytest
from test_calibrate import a_layer

from convert.calibration.gptq import quantized
from convert.calibration.metric import Metric
from convert.calibration.outputs import Outputs
from olmo3_mlx.quantization import Quantization


def an_information(count: int, seed: int = 0) -> np.ndarray:
    """Some Fisher information [count, count] of few samples, so that outputs go together."""
    slopes = np.random.default_rng(seed).normal(size=(count // 2 + 1, count))
    slopes += 2 * np.random.default_rng(seed + 1).normal(size=(count // 2 + 1, 1))
    return slopes.T @ slopes


@pytest.mark.parametrize("count", [1, 7, 320, 1000])
def test_targets_are_the_best_that_the_rest_can_do_about_errors(count: int) -> None:
    """The minimum of tr(O E E^T) over the rows to come, by float64's solver, with the ridge on O."""
    information = an_information(count)
    exact = information / np.mean(np.diag(information)) + 0.3 * np.eye(count)
    rng = np.random.default_rng(2)
    weight, errors, done = rng.normal(size=(count, 5)), np.zeros((count, 5)), np.zeros(count, bool)
    outputs = Outputs(mx.array(information.astype(np.float32)))
    for part in outputs.parts:
        target = np.array(outputs.target(mx.array(weight[part].astype(np.float32))))
        left = np.flatnonzero(~done)
        wanted = -np.linalg.solve(exact[np.ix_(left, left)], exact[np.ix_(left, done)] @ errors[done])
        assert np.allclose(target, weight[part] - wanted[np.isin(left, np.arange(count)[part])], atol=1e-4)
        errors[part] = rng.normal(size=target.shape)
        outputs.add(mx.array(errors[part].astype(np.float32)))
        done[part] = True
    assert done.all()
    assert len(outputs.parts) <= 3


@pytest.mark.parametrize("bits", [2, 4])
def test_parts_cost_less_at_the_end_than_rows_by_themselves(bits: int) -> None:
    weight, hessian = a_layer(96, 128)
    information, metric = an_information(96), Metric.of(hessian)
    outputs = Outputs(mx.array(information.astype(np.float32)))

    def rounded(rows: mx.array) -> mx.array:
        return quantized([rows], metric, [Quantization(bits, 64)], [mx.bfloat16])[0].dense()

    def cost(errors: mx.array) -> float:
        e = np.array(errors, np.float64)
        return float(np.sum((information @ e) * (e @ np.array(metric.hessian, np.float64))))

    parts = []
    for part in outputs.parts:
        found = rounded(outputs.target(weight[part]))
        outputs.add(weight[part] - found)
        parts.append(weight[part] - found)
    assert cost(mx.concatenate(parts[::-1])) < 0.8 * cost(weight - rounded(weight))
