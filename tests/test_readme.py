"""What the README says is so: its Python runs, its memory table is computed."""

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
    assert "layers" in printed.getvalue()


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
