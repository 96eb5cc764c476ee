"""The model against an independent oracle, and the oracle against ways in which ports were wrong."""

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import TINY, random_model

from olmo3_mlx import CacheError, Olmo3, OptionError, PromptError
from olmo3_mlx.config import FULL, SLIDING
from olmo3_mlx.model import swiglu

LENGTH = 64
TOLERANCE = 2e-5  # float32 against float64; the gentlest mutant is off by 100 times that

MUTANTS = [
    "rope-swapped",
    "yarn-everywhere",
    "no-yarn",
    "no-rope",
    "rope-interleaved",
    "attention-factor-ignored",
    "window-ignored",
    "window-one-more",
    "window-one-less",
    "pre-norm",
    "no-qk-norm",
    "norm-per-head",
    "kv-heads-interleaved",
]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "grouped-query": TINY,
    "multi-head": {**TINY, "num_key_value_heads": 4},
    "one-kv-head": {**TINY, "num_key_value_heads": 1},
    "no-yarn": {**TINY, "rope_scaling": None},
    "only-full": {**TINY, "layer_types": [FULL] * 4, "sliding_window": None},
    "only-sliding": {**TINY, "layer_types": [SLIDING] * 4},
    "wide-heads": {**TINY, "head_dim": 32},
    "tied": {**TINY, "tie_word_embeddings": True},
    "six-layers": {**TINY, "num_hidden_layers": 6},
}


def tokens(length: int = LENGTH, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, TINY["vocab_size"], length)]


def as_float64(model: Olmo3) -> dict[str, oracle.Array]:
    return {name: np.array(array, dtype=np.float64) for name, array in model.tensors().items()}


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_the_oracle(name: str) -> None:
    config = ARCHITECTURES[name]
    model = random_model(config)
    expected = oracle.forward(config, as_float64(model), tokens())
    assert off(np.array(model(mx.array([tokens()])))[0], expected) < TOLERANCE


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_known_way_to_get_olmo_3_wrong_would_be_caught(tiny: Olmo3, mutant: str) -> None:
    wrong = oracle.forward(TINY, as_float64(tiny), tokens(), mutant=mutant)
    assert off(np.array(tiny(mx.array([tokens()])))[0], wrong) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def stepwise(tiny: Olmo3) -> np.ndarray:
    """The logits of `tokens()`, run one at a time."""
    caches = tiny.make_caches()
    return np.array(mx.concatenate([tiny(mx.array([[token]]), caches)[0] for token in tokens()]))


def test_one_token_at_a_time_gives_the_logits_of_the_oracle(tiny: Olmo3, stepwise: np.ndarray) -> None:
    assert off(stepwise, oracle.forward(TINY, as_float64(tiny), tokens())) < TOLERANCE


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught_one_token_at_a_time_too(tiny: Olmo3, stepwise: np.ndarray, mutant: str) -> None:
    wrong = oracle.forward(TINY, as_float64(tiny), tokens(), mutant=mutant)
    assert off(stepwise, wrong) > 100 * TOLERANCE


def test_the_window_reaches_exactly_as_far_as_it_says() -> None:
    model = random_model({**TINY, "layer_types": [SLIDING], "num_hidden_layers": 1})
    ids = tokens()
    last = model(mx.array([ids]))[0, -1]
    for distance in range(LENGTH):
        changed = list(ids)
        changed[-1 - distance] = (changed[-1 - distance] + 1) % TINY["vocab_size"]
        seen = not mx.array_equal(model(mx.array([changed]))[0, -1], last).item()
        assert seen == (distance < TINY["sliding_window"]), distance


def test_sequences_of_a_batch_do_not_touch_each_other(tiny: Olmo3) -> None:
    batch = [tokens(seed=1), tokens(seed=2), tokens(seed=3)]
    together = tiny(mx.array(batch))
    for row, ids in zip(together, batch, strict=True):
        assert off(np.array(row), np.array(tiny(mx.array([ids]))[0])) < 1e-6


def test_logits_to_keep_are_the_last_of_all_logits(tiny: Olmo3) -> None:
    ids = mx.array([tokens()])
    whole = np.array(tiny(ids))
    for count in (1, 3, LENGTH):
        kept = np.array(tiny(ids, logits_to_keep=count))
        assert kept.shape == (1, count, TINY["vocab_size"])
        assert off(kept, whole[:, -count:]) < 1e-6


def test_an_id_outside_the_vocabulary_is_refused_before_mlx_reads_it(tiny: Olmo3) -> None:
    for bad in (128, -1, 2**31 - 1):
        for ids in ([[1, bad, 2]], [[bad]], [[1], [bad]]):
            with pytest.raises(PromptError, match="vocabulary of 128"):
                tiny(mx.array(ids))


@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(tiny: Olmo3, shape: tuple[int, ...]) -> None:
    with pytest.raises(PromptError, match=r"shape \[B, L\]"):
        tiny(mx.zeros(shape, dtype=mx.int32))


def test_no_logits_to_keep_and_a_negative_rewind_are_refused(tiny: Olmo3) -> None:
    with pytest.raises(OptionError, match="logits_to_keep must be at least 1, not 0"):
        tiny(mx.array([[1]]), logits_to_keep=0)
    with pytest.raises(OptionError, match="rewind must be a whole number of at least 0, not -1"):
        tiny.make_caches(rewind=-1)


def test_caches_of_another_model_are_refused(tiny: Olmo3) -> None:
    caches = tiny.make_caches()[:3]
    with pytest.raises(CacheError, match="expected 4 caches, one per layer, got 3"):
        tiny(mx.array([tokens()]), caches)


def test_parameters_bear_the_names_of_the_checkpoint(tiny: Olmo3) -> None:
    names = {name.replace(".0.", ".N.") for name in tiny.tensors() if ".0." in name or "layers" not in name}
    layer = {
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"self_attn.{p}_norm" for p in "qk"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    }
    assert names == {
        *(f"model.layers.N.{name}.weight" for name in layer),
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_attention_factor_is_honoured_where_the_config_gives_one() -> None:
    scaling = {**TINY["rope_scaling"], "attention_factor": 1.0}
    config = {**TINY, "rope_scaling": scaling}
    model = random_model(config)
    found = np.array(model(mx.array([tokens()])))[0]
    expected = oracle.forward(TINY, as_float64(model), tokens(), mutant="attention-factor-ignored")
    assert off(found, expected) < TOLERANCE


def test_swiglu_is_silu_times_up() -> None:
    gate, up = mx.array([-3.0, 0.0, 2.0]), mx.array([2.0, 5.0, -1.0])
    expected = [-3 / (1 + np.exp(3)) * 2, 0.0, -2 / (1 + np.exp(-2))]
    assert np.allclose(np.array(swiglu(gate, up)), expected, atol=1e-6)


def test_a_group_size_without_bits_and_a_negative_start_are_refused(tiny: Olmo3) -> None:
    with pytest.raises(OptionError, match="kv_group_size=64 is for quantized caches: give kv_bits too"):
        tiny.make_caches(kv_group_size=64)
    with pytest.raises(OptionError, match="kv_start must be a whole number of at least 0, not -1"):
        tiny.make_caches(kv_bits=8, kv_start=-1)
    with pytest.raises(OptionError, match="heads of a multiple of 32 values, this model's have 16"):
        tiny.make_caches(kv_bits=8)  # TINY has heads of 16
