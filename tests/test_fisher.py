"""What an error in the embedding costs, against the divergence that it really causes."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_calibrate import a_source, a_text, kl

from convert.calibration.fisher import embedding_hessian
from convert.calibration.gptq import quantized
from convert.calibration.grids import searched
from convert.calibration.metric import Metric
from convert.reading.layers import Layers
from olmo3_mlx.quantization import Quantization


def test_an_embedding_fitted_to_the_rest_of_the_model_costs_less(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    weight = Layers(source).weight("model.embed_tokens.weight")
    scheme = Quantization(3, 32)
    hessian = embedding_hessian(source, a_text(16))
    fitted = quantized([weight], Metric.of(hessian), [scheme], [mx.bfloat16])[0].dense()
    plain = searched(weight, mx.ones(weight.shape[1]), scheme, mx.bfloat16).dense()
    unseen = a_text(8, seed=9)
    cost, before = (kl(source, {"model.embed_tokens.weight": w}, unseen) for w in (fitted, plain))
    assert cost < 0.9 * before


def test_the_hessian_tells_costly_directions_from_cheap_ones(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    weight = Layers(source).weight("model.embed_tokens.weight")
    values, vectors = np.linalg.eigh(embedding_hessian(source, a_text(16)))
    assert values[0] > 0
    signs = mx.random.bernoulli(0.5, (len(weight), 1), key=mx.random.key(0)) * 0.02 - 0.01
    cheap, costly = (
        kl(source, {"model.embed_tokens.weight": weight + signs * mx.array(v)[None]}, a_text(8, seed=9))
        for v in (vectors[:, 0].astype(np.float32), vectors[:, -1].astype(np.float32))
    )
    assert costly > 1.5 * cheap


def test_sequences_go_back_one_by_one_as_attention_in_pieces_has_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, text = a_source(tmp_path / "a"), a_text(4)
    whole = embedding_hessian(source, text)
    one = source.config.num_attention_heads * text.shape[1] ** 2 * 4  # bytes of its scores
    monkeypatch.setattr("olmo3_mlx.caches.attention.SCORES_BYTES", one)
    assert mx.allclose(embedding_hessian(source, text), whole, rtol=1e-4, atol=1e-6)


def test_the_hessian_is_repeatable(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    first, again = (embedding_hessian(source, a_text(2)) for _ in range(2))
    assert np.array_equal(first, again)
