"""The memory that calibrating takes, estimated before it begins."""

from convert.size import in_words
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import MemoryFitError, Setting
from olmo3_mlx.memory.machine import machine_bytes
from olmo3_mlx.model import Olmo3

_MATRICES = 4  # of a layer's inputs by its inputs, at once: see solving
_SLACK = 1.3  # over what follows; measured 1.17 and 1.28 at the 32B's and the 7B's shape (BENCHMARKS.md)


def calibrating_bytes(config: Olmo3Config, tokens: int) -> int:
    """The bytes that calibrating on so many tokens takes at most, estimated for models of real size: the
    matrices of the widest layer, a block twice and both models' hidden states, all in float32.
    """
    shapes = [s for path, s in Olmo3(config).quantizable().items() if ".layers." in path]
    widest = max(inputs for _, inputs in shapes)
    block = sum(rows * inputs for rows, inputs in shapes) // config.num_hidden_layers
    return int(_SLACK * 4 * (_MATRICES * widest**2 + 2 * block + 2 * tokens * config.hidden_size))


def check_memory(config: Olmo3Config, tokens: int) -> None:
    """Raise MemoryFitError if this machine has less than calibrating takes."""
    needed, available = calibrating_bytes(config, tokens), machine_bytes()
    if needed > available:
        raise MemoryFitError(
            f"calibrating this model takes about {in_words(needed)}, this machine has {in_words(available)}: "
            "leave out ",
            Setting("calibrate"),
            " and ",
            Setting("target_bpw"),
            " (a recipe such as mixed_4_5 needs little), or set OLMO3_MEMORY if it has more",
            needed=needed,
            available=available,
        )
