"""What the README says is so: its Python runs, its memory table is computed, its figures were measured."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from olmo3_mlx import Olmo3Config
from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.memory.sizes import cache_bytes, weight_bytes
from olmo3_mlx.published import SIZES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    about_layers, sum_of_both, edited = printed.getvalue().splitlines()  # nothing runs into anything
    assert "layers" in about_layers
    assert sum_of_both == "17 + 25 = 42"
    assert re.fullmatch(r"\d+ tokens ran before the answer to the edited question", edited)


@pytest.mark.parametrize("size", ["7b", "32b"])
def test_the_memory_table_is_what_the_program_computes(size: str) -> None:
    config = Olmo3Config.from_dict(SIZES[size])
    weights = [weight_bytes(config, bits) / 2**30 for bits in (None, 8, 4)]
    caches = [
        [cache_bytes(config, tokens, CacheOptions(bits)) / 2**30 for tokens in (4096, 16384, 65536)]
        for bits in (None, 8, 4)
    ]
    row = " | ".join(
        [*(f"{w:.2f}" for w in weights), *(" / ".join(f"{c:.2f}" for c in three) for three in caches)]
    )
    assert re.search(rf"\| {size.upper()} \|.*\| {re.escape(row)} \|", README)


def test_the_figures_of_the_first_screen_stand_in_the_benchmarks_or_the_memory_table() -> None:
    benchmarks = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in README.splitlines() if line.startswith("| "))
    screen = README.partition("**Why this")[2].partition("![")[0]
    figures = re.findall(r"(?<![\d.])\d+\.\d+(?:e-\d+)?(?!\d|\.\d)", screen)
    assert len(figures) > 8
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", benchmarks + table), figure
