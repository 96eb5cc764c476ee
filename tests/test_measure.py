"""How far one checkpoint is from another, against float64 NumPy."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle
import pytest
from conftest import TINY, random_model, save_checkpoint

from convert.card import divergence
from convert.card.measure import measure
from convert.card.quality import HISTOGRAM_EDGES, quantiles, standard_error
from convert.reading.layers import Layers
from convert.reading.source import Source
from olmo3_mlx import Olmo3
from olmo3_mlx.errors import CheckpointError, ConvertError, OptionError, PromptError

TOKENS = mx.random.randint(0, 128, (3, 40), key=mx.random.key(7))


def save(folder: Path, model: Olmo3, config: dict[str, Any] = TINY) -> Source:
    return Source.open(save_checkpoint(folder, config, model.tensors()))


def noisy(seed: int, spread: float, only: str = "") -> Olmo3:
    """TINY, with noise on the matrices whose names start with `only`."""
    model = random_model(TINY)
    key = mx.random.key(seed)
    weights = {}
    for name, array in model.tensors().items():
        key, draw = mx.random.split(key)
        if "norm" not in name and name.startswith(only):
            weights[name] = array * (1 + spread * mx.random.normal(array.shape, key=draw))
    model.load_weights(list(weights.items()), strict=False)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    """TINY, and TINY with noise."""
    folder = tmp_path_factory.mktemp("pair")
    return save(folder / "original", random_model(TINY)), save(folder / "result", noisy(1, 0.05))


def numpy_tensors(source: Source) -> dict[str, oracle.Array]:
    return {
        name: np.array(tensor.rows(0, tensor.shape[0]).astype(mx.float32), np.float64)
        for name, tensor in source.tensors.items()
    }


def log_softmax(logits: oracle.Array) -> oracle.Array:
    shifted = logits - logits.max(-1, keepdims=True)
    found: oracle.Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def log_probabilities(source: Source, tokens: mx.array, config: dict[str, Any] = TINY) -> oracle.Array:
    """What float64 NumPy makes of each position that has a next token: [N * (L - 1), V]."""
    tensors = numpy_tensors(source)
    each = [log_softmax(oracle.forward(config, tensors, row.tolist()))[:-1] for row in np.array(tokens)]
    return np.concatenate(each)


def test_every_figure_is_what_float64_numpy_finds(pair: tuple[Source, Source]) -> None:
    quality = measure(*pair, TOKENS)
    p, q = (log_probabilities(source, TOKENS) for source in pair)
    actual = np.array(TOKENS)[:, 1:].ravel()
    kl = (np.exp(p) * (p - q)).sum(-1)
    spoken = [x[np.arange(len(actual)), actual] for x in (p, q)]
    apart = np.abs(np.exp(spoken[0]) - np.exp(spoken[1]))
    assert quality.tokens == 3 * 39
    assert quality.perplexity == pytest.approx([math.exp(-x.mean()) for x in spoken], rel=1e-4)
    assert quality.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert quality.kl_median == pytest.approx(np.median(kl), rel=5e-3)
    assert quality.kl_99 == pytest.approx(np.quantile(kl, 0.99), rel=5e-3)
    assert quality.kl_max == pytest.approx(kl.max(), rel=5e-3)
    assert quality.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    assert quality.probability_mean == pytest.approx(apart.mean(), rel=1e-3)
    assert quality.probability_99 == pytest.approx(np.quantile(apart, 0.99), rel=5e-3)
    expected, _ = np.histogram(kl, [0, *HISTOGRAM_EDGES, np.inf])
    assert sum(quality.histogram) == quality.tokens
    assert np.abs(np.array(quality.histogram) - expected).sum() <= 4  # of those at an edge
    worst = quality.worst[0]
    at = int(kl.argmax())
    assert (worst.sequence, worst.position) == (at // 39, at % 39 + 1)
    assert worst.actual == actual[at]
    assert worst.top == (p[at].argmax(), q[at].argmax())
    assert worst.top_probability == pytest.approx((np.exp(p[at].max()), np.exp(q[at].max())), rel=1e-3)
    assert worst.actual_probability == pytest.approx([np.exp(x[at]) for x in spoken], rel=1e-2)
    assert [w.kl for w in quality.worst] == sorted((w.kl for w in quality.worst), reverse=True)


def test_identical_checkpoints_are_no_distance_apart(pair: tuple[Source, Source]) -> None:
    quality = measure(pair[0], pair[0], TOKENS)
    assert quality.kl_max == 0 == quality.kl_error == quality.probability_99
    assert quality.agreement == 1
    assert quality.perplexity[0] == quality.perplexity[1]
    assert {e.accumulated for e in quality.layers} == {0} == {e.added for e in quality.layers}


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_pieces_of_the_vocabulary_and_of_the_positions_change_nothing(
    pair: tuple[Source, Source], monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    whole = measure(*pair, TOKENS)
    monkeypatch.setattr(divergence, "HEAD_BYTES", 4 * 64 * rows)
    monkeypatch.setattr(divergence, "LOGITS_BYTES", 4 * rows * 23)
    pieces = measure(*pair, TOKENS)
    assert pieces.kl_mean == pytest.approx(whole.kl_mean, rel=1e-5)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert [(w.sequence, w.position, w.top) for w in pieces.worst] == [
        (w.sequence, w.position, w.top) for w in whole.worst
    ]
    assert pieces.agreement == whole.agreement


def test_layer_errors_are_those_of_the_states_and_added_is_one_layers_doing(
    pair: tuple[Source, Source], tmp_path: Path
) -> None:
    original = pair[0]
    result = save(tmp_path / "one", noisy(3, 0.1, only="model.layers.2."))
    quality = measure(original, result, TOKENS)
    errors = {e.name: e for e in quality.layers}
    assert [e.kind for e in quality.layers] == ["embedding", "sliding", "sliding", "sliding", "full"]
    for name in ("embed_tokens", "layers.0", "layers.1"):
        assert errors[name].accumulated == 0 == errors[name].added
    assert errors["layers.2"].added == errors["layers.2"].accumulated > 0.01
    assert errors["layers.3"].added == 0 < errors["layers.3"].accumulated

    layers = [Layers(source) for source in (original, result)]
    ours, theirs = (each.embed(TOKENS) for each in layers)
    for index in range(4):
        ours, theirs = (
            each.block(index)(state, None) for each, state in zip(layers, (ours, theirs), strict=True)
        )
    a, b = np.array(ours, np.float64), np.array(theirs, np.float64)
    expected = (np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)).mean()
    assert errors["layers.3"].accumulated == pytest.approx(expected, rel=1e-4)


def test_sizes_count_scales_and_what_is_not_quantized(pair: tuple[Source, Source], tmp_path: Path) -> None:
    model = random_model(TINY)
    nn.quantize(model, group_size=32, bits=4)
    config = {**TINY, "quantization": {"group_size": 32, "bits": 4}}
    result = save(tmp_path / "4bit", model, config)
    quality = measure(pair[0], result, TOKENS)
    assert quality.sizes[0].bits_per_weight == 32
    assert quality.sizes[1].bytes == sum(array.nbytes for array in model.tensors().values())
    assert quality.sizes[0].parameters == quality.sizes[1].parameters
    assert 0 < quality.kl_median < quality.kl_99 <= quality.kl_max


def test_tied_heads_are_compared_too(tmp_path: Path) -> None:
    config = {**TINY, "tie_word_embeddings": True}
    pair = []
    for name, model in (("original", random_model(TINY)), ("result", noisy(2, 0.05))):
        tensors = {path: t for path, t in model.tensors().items() if path != "lm_head.weight"}
        pair.append(Source.open(save_checkpoint(tmp_path / name, config, tensors)))
    quality = measure(pair[0], pair[1], TOKENS)
    p, q = (log_probabilities(source, TOKENS, config) for source in pair)
    kl = (np.exp(p) * (p - q)).sum(-1)
    actual = np.array(TOKENS)[:, 1:].ravel()
    expected = [math.exp(-x[np.arange(len(actual)), actual].mean()) for x in (p, q)]
    assert quality.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert quality.perplexity == pytest.approx(expected, rel=1e-4)


def test_of_both_models_only_one_block_and_pieces_of_heads_are_in_memory(tmp_path: Path) -> None:
    config = {**TINY, "num_hidden_layers": 12, "vocab_size": 4096, "intermediate_size": 4096}
    model = random_model(config)
    original, result = (save(tmp_path / name, model, config) for name in ("a", "b"))
    del model
    mx.clear_cache()
    tokens = TOKENS[:, :8]
    block = 4 * (3 * 64 * 4096 + 64 * 64 * 3)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    measure(original, result, tokens)
    assert mx.get_peak_memory() - before < 3 * block < 12 * block / 2


def test_progress_reaches_the_total_once_and_never_goes_back(pair: tuple[Source, Source]) -> None:
    seen: list[tuple[int, int]] = []
    measure(*pair, TOKENS, lambda done, total: seen.append((done, total)))
    parameters = sum(t.size for t in random_model(TINY).tensors().values())
    assert {total for _, total in seen} == {2 * parameters}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (2 * parameters, 2 * parameters)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 256}, r"vocab_size \(128 and 256\)"),
        ({"num_hidden_layers": 8}, r"differ in num_hidden_layers \(4 and 8\)$"),
        (
            {"layer_types": ["sliding_attention", *["full_attention"] * 3]},
            r"differ in layer_types \(of layers\.1: sliding_attention and full_attention\)$",
        ),
        ({"num_key_value_heads": 4}, r"num_key_value_heads \(2 and 4\)"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    pair: tuple[Source, Source], tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    config = {**TINY, **change}
    with pytest.raises(ConvertError, match=named):
        measure(pair[0], save(tmp_path / "other", random_model(config), config), TOKENS)


def test_another_window_or_rope_is_a_stage_of_training_and_can_be_compared(
    pair: tuple[Source, Source], tmp_path: Path
) -> None:
    config = {**TINY, "sliding_window": 4, "rope_scaling": None}
    quality = measure(pair[0], save(tmp_path / "stage", random_model(config), config), TOKENS)
    assert quality.kl_mean > 0.01


def test_tokens_that_cannot_be_measured_are_refused(pair: tuple[Source, Source]) -> None:
    with pytest.raises(PromptError, match="shape"):
        measure(*pair, TOKENS[0])
    with pytest.raises(OptionError, match="from 2 tokens to as many as the context, 256, not 1"):
        measure(*pair, TOKENS[:, :1])
    with pytest.raises(OptionError, match="not 300"):
        measure(*pair, mx.zeros((1, 300), mx.int32))
    with pytest.raises(PromptError, match="vocabulary of 128"):
        measure(*pair, TOKENS + 100)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused(
    pair: tuple[Source, Source], tmp_path: Path, name: str
) -> None:
    model = random_model(TINY)
    model.load_weights([(name, mx.full(model.tensors()[name].shape, math.nan))], strict=False)
    bad = save(tmp_path / "nan", model)
    for two in ((pair[0], bad), (bad, pair[0])):
        with pytest.raises(CheckpointError, match=rf"^\S*/nan: NaN or infinite values in {name}: "):
            measure(*two, TOKENS)


def test_states_that_overflow_with_finite_weights_are_refused(
    pair: tuple[Source, Source], tmp_path: Path
) -> None:
    model = random_model(TINY)
    name = "model.layers.1.mlp.up_proj.weight"
    model.load_weights([(name, mx.full(model.tensors()[name].shape, 3e38))], strict=False)
    with pytest.raises(
        CheckpointError, match=r"layers\.1 gives what is not finite, although all weights are"
    ):
        measure(pair[0], save(tmp_path / "large", model), TOKENS)


def test_kinds_are_measured_apart_in_one_pass_and_together(pair: tuple[Source, Source]) -> None:
    seen: list[tuple[int, int]] = []
    quality = measure(*pair, TOKENS, lambda *counts: seen.append(counts), kinds=["a", "b", "a"])
    assert seen[-1][1] == 2 * sum(t.size for t in random_model(TINY).tensors().values())
    assert list(quality.kinds) == ["a", "b"]
    for kind, rows in (("a", [0, 2]), ("b", [1])):
        alone = measure(*pair, TOKENS[mx.array(rows)])
        for name, value in vars(quality.kinds[kind]).items():
            assert value == pytest.approx(getattr(alone, name), rel=1e-5), name
    p, q = (log_probabilities(source, TOKENS[1:2]) for source in pair)
    kl = (np.exp(p) * (p - q)).sum(-1)
    found = quality.kinds["b"]
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_999 == pytest.approx(np.quantile(kl, 0.999), rel=5e-3)
    assert found.perplexity_ratio == pytest.approx(found.perplexity[1] / found.perplexity[0])
    assert quality.tokens == sum(each.tokens for each in quality.kinds.values())
    assert quality.kl_mean == pytest.approx((2 * quality.kinds["a"].kl_mean + found.kl_mean) / 3)
    assert [w.kind for w in quality.worst] == ["aba"[w.sequence] for w in quality.worst]


def test_errors_of_quantiles_are_those_of_samples_whose_neighbours_resemble_each_other() -> None:
    rng = np.random.default_rng(1)
    runs = [np.repeat(rng.exponential(size=(4, 16)), 32, axis=1) for _ in range(200)]
    found, errors = quantiles(runs[0])
    assert found == np.quantile(runs[0], (0.5, 0.99, 0.999)).tolist()
    assert quantiles(runs[0]) == (found, errors)
    true = np.std([np.median(values) for values in runs])
    assert np.mean([quantiles(values)[1][0] for values in runs[:10]]) == pytest.approx(true, rel=0.3)
    assert quantiles(np.array([[1.0]])) == ([1.0] * 3, [0.0] * 3)


def test_the_error_of_a_mean_knows_that_neighbours_resemble_each_other() -> None:
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(4, 320))
    alike = np.repeat(rng.normal(size=(4, 10)), 32, axis=1)
    assert standard_error(independent) == pytest.approx(1 / math.sqrt(1280), rel=0.3)
    assert standard_error(alike) == pytest.approx(1 / math.sqrt(40), rel=0.3)
    assert standard_error(np.array([[1.0]])) == 0
