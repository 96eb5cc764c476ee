"""What the README says is so: its Python runs, its memory table is computed, its files exist."""

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


def test_every_file_is_listed_with_a_line_and_every_listed_file_exists() -> None:
    (listing,) = re.findall(r"## The files\n+```\n(.*?)```", README, flags=re.DOTALL)
    listed, folder = set(), ""
    for line in listing.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        elif name.endswith(".py"):
            listed.add(folder + name)
    real = {path.relative_to(ROOT) for top in ("olmo3_mlx", "convert") for path in (ROOT / top).rglob("*.py")}
    assert listed == {
        path.as_posix() for path in real if not path.name.startswith("__") and "cli" not in path.parts
    }
