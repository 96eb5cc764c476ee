"""Every example runs on the demo and prints what it says it shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, random_model, save_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"

PRINTS = {
    "generate": r"Olmo 3 7B has 32 layers.*\n\d+ tokens, finish reason stop\n",
    "stream": r"Olmo 3 was built by Ai2.*\n\d+ tokens, finish reason stop\n",
    "chat": r"> My name is Ada\.(.|\n)*42\n(.|\n)*Your name is Ada\.\n.*ran 1\d new tokens.*\n",
    "quantize": r"( +\d+\.\d\d bits per weight, +\d+\.\d\d MB: 17 \+ 25 = 42\n){3}",
}


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_and_short() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert files.keys() == PRINTS.keys() | {"long_context"}
    for path in files.values():
        assert len(path.read_text().splitlines()) <= 40, path


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_prints_what_it_shows(name: str) -> None:
    assert re.fullmatch(PRINTS[name], run(name))


def test_the_example_of_a_long_context_shows_which_caches_stop_growing(tmp_path: Path) -> None:
    """With a small model: the demo takes five seconds to read so much."""
    config = {**TINY, "vocab_size": 8192, "sliding_window": 128, "max_position_embeddings": 1024}
    folder = save_checkpoint(tmp_path / "model", config, random_model(config).tensors())
    printed = run("long_context", "--model", str(folder), "--tokens", "512")
    assert re.fullmatch(
        r"window: 128 tokens\n( +\d+ tokens: sliding +\d+\.\d\d MB, full +\d+\.\d\d MB\n){4}", printed
    )
    rows = re.findall(r"sliding +([\d.]+) MB, full +([\d.]+) MB", printed)
    sliding, full = zip(*((float(a), float(b)) for a, b in rows), strict=True)
    assert sliding[2] == sliding[-1]
    assert full[-1] > full[1]


def test_examples_take_another_model(tiny_checkpoint: Path) -> None:
    assert "finish reason" in run("generate", "--model", str(tiny_checkpoint), "Hello")
