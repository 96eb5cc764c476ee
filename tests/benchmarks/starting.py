"""How fast two checkouts start: a cold `olmo3 generate`, `import olmo3_mlx`, and mlx-lm in the same run.

    python tests/benchmarks/starting.py BEFORE AFTER [--rounds N]

BEFORE and AFTER are folders of this repository (with an environment in .venv, else this Python runs them). A
round is one process of each, one after another; every other round the other way round. The command is that of
against_mlx_lm.py: the whole process's wall time for a question and at most 20 tokens, on AFTER's demo for
all. The import's time is taken within its process, as Python itself starts alike. Ratios are medians of the
rounds' ratios, as the machine may be shared. The first round warms the disk's caches and is not counted.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from against_mlx_lm import QUESTION, spread, wall
from same_output_cases.playing import Checkout

IMPORT = "import time; begin = time.perf_counter(); import olmo3_mlx; print(time.perf_counter() - begin)"


def generating(checkout: Checkout, model: Path) -> Callable[[], float]:
    """Seconds of a cold process."""
    command = [*checkout.olmo3, "generate", QUESTION, "--model", str(model), "--max-tokens", "20"]
    return lambda: timed(command, checkout)


def timed(command: list[str], checkout: Checkout) -> float:
    begin = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(checkout),
        cwd=tempfile.gettempdir(),
    )
    return time.perf_counter() - begin


def importing(checkout: Checkout) -> Callable[[], float]:
    """Seconds of the import alone."""

    def seconds() -> float:
        done = subprocess.run(
            [checkout.python, "-c", IMPORT],
            check=True, capture_output=True, text=True, env=environment(checkout), cwd=tempfile.gettempdir(),
        )  # fmt: skip
        return float(done.stdout)

    return seconds


def environment(checkout: Checkout) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout.folder)}


def mlx_lm(checkout: Checkout, model: Path) -> Callable[[], float]:
    """Seconds of a cold process of mlx-lm, from the checkout's environment."""
    script = Path(checkout.python).with_name("mlx_lm.generate")
    command = [str(script), "--model", str(model), "--prompt", QUESTION, "--max-tokens", "20"]
    return lambda: wall(command)


def measured(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in every round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        names = list(sides) if number % 2 else list(reversed(sides))
        taken = {name: sides[name]() for name in names}
        if number:
            for name, seconds in taken.items():
                found[name].append(seconds)
    return found


def ratios(found: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(found[above], found[below], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    before, after = Checkout.at(args.before), Checkout.at(args.after)
    demo = after.folder / "olmo3_mlx" / "demo"
    sides = {"generate, before": generating(before, demo), "generate, after": generating(after, demo)}
    sides |= {"import, before": importing(before), "import, after": importing(after)}
    sides["mlx-lm"] = mlx_lm(after, demo)
    found = measured(sides, args.rounds)
    print("| seconds | median | range | rounds |\n|---|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {spread(seconds, 3)} |")
    print("\n| ratio | median | range | rounds |\n|---|---|---|---|")
    for what in ("generate", "import"):
        both = ratios(found, f"{what}, after", f"{what}, before")
        print(f"| {what}, after over before | {spread(both)} |")
    for side in ("before", "after"):
        print(f"| generate, {side}, over mlx-lm | {spread(ratios(found, f'generate, {side}', 'mlx-lm'))} |")


if __name__ == "__main__":
    main()
