"""Fixtures: TINY, a model small enough to be checked by an oracle; the demo; the lab, where it is."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from fake_hub import hub, model_files, stop_hub  # noqa: F401  (fixtures)

from olmo3_mlx import Olmo3, Olmo3Config, Tokenizer, load
from olmo3_mlx.checkpoints.names import DEMO

SHARED = Path(__file__).parents[2] / "shared"

# Three sliding layers and a full one, grouped-query, a window of 8, YaRN from 32 to 256.
TINY: dict[str, Any] = {
    "model_type": "olmo3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 8,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2079441541679836,
    },
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
}

# What calibrating repeats to come closer, done once or twice: whether it is right shows as well.
QUICK_CALIBRATION: dict[str, Any] = {
    "convert.calibration.grids._SHRINKS": (1.0, 0.9, 0.8),
    "convert.calibration.gptq.quantized.__kwdefaults__": {"passes": 1},
    "convert.calibration.grids._STEPS": 3,
}


def random_model(config: dict[str, Any], seed: int = 0) -> Olmo3:
    """A float32 model with weights that make attention peaky and norms matter."""
    model = Olmo3(Olmo3Config.from_dict(config))
    key = mx.random.key(seed)
    weights = {}
    for name, array in model.tensors().items():
        key, draw = mx.random.split(key)
        if "norm" in name:  # q and k norms well above 1, so that attention is far from uniform
            scale = 2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            weights[name] = scale * mx.random.uniform(0.5, 1.5, array.shape, key=draw)
        else:
            spread = 1.0 if "embed" in name else array.shape[-1] ** -0.5
            weights[name] = spread * mx.random.normal(array.shape, key=draw)
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return model


def save_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, mx.array], *, tokenizer: bool = True
) -> Path:
    """Write a checkpoint as Hugging Face does; the tokenizer files are the demo's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def cut_tokenizer(folder: Path, vocabulary: int) -> None:
    """Leave the demo's tokenizer in a folder so many ids: its first words, then its tags."""
    path = folder / "tokenizer.json"
    made = json.loads(path.read_text(encoding="utf-8"))
    tags = made["added_tokens"]
    words = {word: n for word, n in made["model"]["vocab"].items() if n < vocabulary - len(tags)}
    made["model"]["vocab"] = words
    made["model"]["merges"] = [pair for pair in made["model"]["merges"] if "".join(pair) in words]
    for n, tag in enumerate(tags, len(words)):
        tag["id"] = n
    path.write_text(json.dumps(made), encoding="utf-8")


def kill_until_there(dest: Path, command: list[str], seconds: Callable[[], float]) -> int:
    """Run a conversion to `dest` that resumes, and kill it so many seconds after it has begun; again until
    `dest` is there. How often it was killed.
    """
    journal, kills = dest.parent / f".{dest.name}.unfinished" / "journal.jsonl", 0
    while not dest.exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not journal.exists() and process.poll() is None:  # the imports are not of interest
            time.sleep(0.01)
        try:
            _, errors = process.communicate(timeout=seconds())
            assert process.returncode == 0, errors
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    return kills


class Told:
    """Keeps what a conversion tells of its stages, `titles` and `moves`, (done, total) of each stage by its
    name; with `stop` ends it by KeyboardInterrupt in that stage, when it has moved so many times.
    """

    def __init__(self, stop: str = "", moves: int = 0) -> None:
        self._stop, self._at = stop, moves
        self.titles: list[str] = []
        self.moves: dict[str, list[tuple[int, int]]] = {}

    def stage(self, title: str) -> None:
        self.titles.append(title)
        self.moves.setdefault(self._name, [])

    def progress(self, done: int, total: int) -> None:
        self.moves[self._name].append((done, total))
        if self._name == self._stop and len(self.moves[self._name]) > self._at:
            raise KeyboardInterrupt

    @property
    def _name(self) -> str:
        return self.titles[-1].partition(",")[0]

    @property
    def callbacks(self) -> dict[str, Any]:
        """As keywords of `convert`."""
        return {"stage": self.stage, "progress": self.progress}

    def assert_each_stage_went_to_its_end(self) -> None:
        for name, moves in self.moves.items():
            done, totals = [d for d, _ in moves], {total for _, total in moves}
            assert len(totals) == 1, name
            assert done == sorted(set(done)), name
            assert done[-1] in totals, name


@pytest.fixture(autouse=True)
def small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quality cards are measured on one short sequence of each text instead of four long ones, for speed."""
    monkeypatch.setattr("convert.preparing._TOKENS", 32)


@pytest.fixture(scope="session")
def tiny() -> Olmo3:
    """TINY with random weights."""
    return random_model(TINY)


@pytest.fixture(scope="session")
def demo() -> tuple[Olmo3, Tokenizer]:
    """The embedded model and its tokenizer."""
    return load("demo")


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY as a checkpoint's folder, with a vocabulary that fits the demo's tokenizer; to be read only."""
    config = {**TINY, "vocab_size": 8192, "eos_token_id": [8190, 8188]}
    model = random_model(config)
    return save_checkpoint(tmp_path_factory.mktemp("original") / "tiny", config, model.tensors())


@pytest.fixture
def tiny_checkpoint(tiny_original: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_original` that a test may change."""
    return Path(shutil.copytree(tiny_original, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material that lies beside the repository on the maintainers' machines; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(params=["olmo3-lab-chat", "olmo3-lab-gqa"])
def lab(request: pytest.FixtureRequest, shared: Path) -> Path:
    """A trained checkpoint: multi-head like the 7B, or grouped-query like the 32B."""
    return shared / "lab" / str(request.param)


pytest.register_assert_rewrite("command_line")
from command_line import (  # noqa: E402, F401  (fixtures; it imports from above)
    a_users_shell,
    long_checkpoint,
    olmo3,
    parrot,
    parrot_checkpoint,
)
