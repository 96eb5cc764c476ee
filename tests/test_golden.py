"""Trained checkpoints against transformers 4.57.6: logits to 520 or 1,500 tokens and greedy ids."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from olmo3_mlx import Olmo3, load
from olmo3_mlx.generation.loop import decode, prefill
from olmo3_mlx.generation.sampling import Sampler, SamplingOptions


@pytest.fixture(scope="module")
def models(shared: Path) -> dict[str, Olmo3]:
    return {
        name: load(shared / "lab" / name, dtype="float32")[0] for name in ("olmo3-lab-chat", "olmo3-lab-gqa")
    }


@pytest.mark.parametrize(
    ("length", "chunk"),
    [
        (520, 520),  # beyond the window of 128, and the 512 positions from which YaRN stretches
        pytest.param(1500, 1500, marks=pytest.mark.slow),
        pytest.param(1500, 128, marks=pytest.mark.slow),
    ],
)
def test_logits_equal_transformers(
    models: dict[str, Olmo3], lab: Path, shared: Path, length: int, chunk: int
) -> None:
    golden = np.load(shared / "golden" / f"{lab.name}.npz")
    model, ids = models[lab.name], mx.array(golden["ids"][:length])[None]
    caches = model.make_caches()
    logits = mx.concatenate([model(ids[:, i : i + chunk], caches) for i in range(0, length, chunk)], axis=1)
    found = np.array(logits)[0]
    positions = golden["positions"][golden["positions"] < length]
    expected = golden["logits"][: len(positions)]
    assert len(positions) >= 14
    assert np.abs(found[positions] - expected).max() / np.abs(expected).max() < 5e-6
    loss = nn.losses.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert np.abs(np.array(loss) - golden["nll"][: length - 1]).max() < 1e-4


@pytest.mark.parametrize(
    ("chunk", "count"),
    [
        (128, 30),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((128, 200), (2048, 20), (100, 20), (7, 20))
        ),
    ],
)
def test_greedy_ids_equal_transformers_whatever_the_prefill_chunk(
    models: dict[str, Olmo3], lab: Path, shared: Path, chunk: int, count: int
) -> None:
    golden = np.load(shared / "golden" / f"{lab.name}.npz")
    model = models[lab.name]
    prompt = golden["ids"][: int(golden["prompt_length"])].tolist()
    caches = model.make_caches()
    logits = prefill(model, prompt, caches, chunk=chunk)
    found = list(decode(model, logits, caches, Sampler(SamplingOptions()), count))
    assert found == golden["greedy"][:count].tolist()
