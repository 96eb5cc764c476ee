"""Filters against transformers' definitions, in NumPy; distributions by counting."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from olmo3_mlx import OptionError
from olmo3_mlx.generation.sampling import Sampler, SamplingOptions, keep_min_p, keep_top_k, keep_top_p

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(scale=scale, size=50).astype(np.float32) for scale in (0.1, 1.0, 3.0, 10.0)]


def probabilities(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    shares: np.ndarray = e / e.sum()
    return shares


def kept(filtered: mx.array) -> set[int]:
    return {i for i, value in enumerate(np.array(filtered)[0]) if value != -math.inf}


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("k", [1, 2, 17, 50])
def test_top_k_keeps_the_k_likeliest(logits: np.ndarray, k: int) -> None:
    assert kept(keep_top_k(mx.array(logits[None]), k)) == set(np.argsort(-logits)[:k].tolist())


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, p: float) -> None:
    likely = probabilities(logits)
    order = np.argsort(-likely)
    count = 1 + int((np.cumsum(likely[order]) < p).sum())
    assert kept(keep_top_p(mx.array(logits[None]), p)) == set(order[:count].tolist())


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(logits: np.ndarray, p: float) -> None:
    likely = probabilities(logits)
    expected = set(np.flatnonzero(likely >= p * likely.max()).tolist())
    assert kept(keep_min_p(mx.array(logits[None]), p)) == expected


def test_kept_logits_are_unchanged() -> None:
    logits = mx.array(LOGITS[1][None])
    for filtered in (keep_top_k(logits, 5), keep_top_p(logits, 0.5), keep_min_p(logits, 0.5)):
        for i in kept(filtered):
            assert filtered[0, i].item() == logits[0, i].item()


def draws(options: SamplingOptions, logits: np.ndarray, count: int = 2000) -> np.ndarray:
    sampler = Sampler(options)
    row = mx.array(logits[None])
    tokens = mx.concatenate([sampler(row) for _ in range(count)])
    return np.bincount(np.array(tokens), minlength=len(logits)) / count


def test_sampled_frequencies_follow_temperature_then_filters() -> None:
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0], dtype=np.float32)
    likely = probabilities(logits / 0.7)
    likely[3:] = 0  # top_k 3
    assert (np.cumsum(likely / likely.sum()) < 0.97).sum() == 2  # so top_p keeps all three
    found = draws(SamplingOptions(temperature=0.7, top_k=3, top_p=0.97, seed=1), logits)
    assert np.abs(found - likely / likely.sum()).max() < 0.03


def test_a_top_p_after_top_k_counts_what_top_k_left() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    # Of 0.4 and 0.3 the first is 57 %: reaching 0.5 takes one token, of all four it takes two.
    found = draws(SamplingOptions(temperature=1, top_k=2, top_p=0.5, seed=0), logits, 200)
    assert found.tolist() == [1, 0, 0, 0]


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, top_k=3, top_p=0.1, seed=5))
    assert [sampler(mx.array(row[None])).item() for row in LOGITS] == [int(row.argmax()) for row in LOGITS]


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-38, 1e-6])
def test_a_tiny_temperature_takes_the_likeliest_and_makes_no_nan(temperature: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature, top_p=0.9, min_p=0.1, seed=0))
    assert [sampler(mx.array(row[None])).item() for row in LOGITS] == [int(row.argmax()) for row in LOGITS]


def test_the_same_seed_gives_the_same_tokens_and_others_do_not() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1, seed=seed))
        return [int(sampler(mx.array(LOGITS[0][None]))) for _ in range(20)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_mlx_own_random_state_is_left_alone() -> None:
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    Sampler(SamplingOptions(temperature=1, seed=9))(mx.array(LOGITS[0][None]))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_repetition_penalty_lowers_prompt_and_generated_tokens() -> None:
    logits = mx.array([[3.0, 2.5, -1.0, 2.0]])
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0), seen=[0])
    # 3 / 2 = 1.5: token 1 is the likeliest, then 2.5 / 2 = 1.25 leaves token 3, then 1.5 wins.
    assert [sampler(logits).item() for _ in range(4)] == [1, 3, 0, 0]
    negative = Sampler(SamplingOptions(repetition_penalty=3.0), seen=[1])
    assert negative(mx.array([[-2.0, -1.0]])).item() == 0  # -1 * 3 = -3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e9),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_outside_their_range_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} must be .*, not {value}"):
        SamplingOptions(**{option: value})
