"""What errors in the embedding and in outputs of layers cost, against the divergence that they cause."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_calibrate import a_source, a_text, kl

from convert.calibration.fisher import Fisher
from convert.calibration.gptq import quantized
from convert.calibration.grids import searched
from convert.calibration.metric import Metric
from convert.reading.layers import Layers, run, split
from olmo3_mlx.quantization import Quantization


def test_an_embedding_fitted_to_the_rest_of_the_model_costs_less(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    weight = Layers(source).weight("model.embed_tokens.weight")
    scheme = Quantization(3, 32)
    hessian = Fisher(source, a_text(16)).embedding()
    fitted = quantized([weight], Metric.of(hessian), [scheme], [mx.bfloat16])[0].dense()
    plain = searched(weight, mx.ones(weight.shape[1]), scheme, mx.bfloat16).dense()
    unseen = a_text(8, seed=9)
    cost, before = (kl(source, {"model.embed_tokens.weight": w}, unseen) for w in (fitted, plain))
    assert cost < 0.9 * before


def test_the_hessian_tells_costly_directions_from_cheap_ones(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    weight = Layers(source).weight("model.embed_tokens.weight")
    values, vectors = np.linalg.eigh(Fisher(source, a_text(16)).embedding())
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
    whole = Fisher(source, text).embedding()
    one = source.config.num_attention_heads * text.shape[1] ** 2 * 4  # bytes of its scores
    monkeypatch.setattr("olmo3_mlx.caches.attention.SCORES_BYTES", one)
    assert mx.allclose(Fisher(source, text).embedding(), whole, rtol=1e-4, atol=1e-6)


def test_the_hessian_is_repeatable(tmp_path: Path) -> None:
    source = a_source(tmp_path / "a")
    first, again = (Fisher(source, a_text(2)).embedding() for _ in range(2))
    assert np.array_equal(first, again)


def test_an_error_along_costly_outputs_costs_more(tmp_path: Path) -> None:
    source, text = a_source(tmp_path / "a"), a_text(16)
    layers, fisher = Layers(source), Fisher(source, text)
    states = split(layers.embed(text))
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    found = fisher.outputs(0, states, names)
    assert tuple(found) == names
    for name, information in found.items():
        path = f"model.layers.0.{name}.weight"
        weight = layers.weight(path)
        values, vectors = np.linalg.eigh(information)
        assert values[-1] > 3 * abs(values[0])
        signs = mx.random.bernoulli(0.5, (1, weight.shape[1]), key=mx.random.key(0)) * 0.04 - 0.02
        cheap, costly = (
            kl(source, {path: weight + mx.array(v.astype(np.float32))[:, None] * signs}, a_text(8, seed=9))
            for v in (vectors[:, 0], vectors[:, -1])
        )
        assert costly > 1.5 * cheap, name


def test_a_run_that_goes_on_finds_the_same_of_later_blocks(tmp_path: Path) -> None:
    source, text = a_source(tmp_path / "a"), a_text(4)
    layers, names = Layers(source), ("self_attn.o_proj",)
    whole, late = Fisher(source, text), Fisher(source, text)
    whole.embedding()
    states = split(layers.embed(text))
    for index in range(layers.count):
        found = whole.outputs(index, states, names)
        if index:
            assert mx.array_equal(found[names[0]], late.outputs(index, states, names)[names[0]])
        states = run(layers.block(index), states)
