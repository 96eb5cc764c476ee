"""The memory that calibrating takes, estimated before it begins."""

from convert.size import in_words
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import MemoryFitError, Setting
from olmo3_mlx.memory.machine import machine_bytes
from olmo3_mlx.model import Olmo3

_MATRICES = 2.65  # of a layer's inputs by its inputs, at once: moments, their factor, what is made of them
_WORKING = 8  # arrays as large as the rows that are quantized at once
ROWS_BYTES = 2**28  # of those, in float32, at most
_LEAST = 2**29  # bytes that choosing bits and the embedding take for logits, whatever the model's size


def calibrating_bytes(config: Olmo3Config, tokens: int) -> int:
    """The bytes that calibrating on so many tokens takes at most, estimated for models of real size: the
    matrices of the widest layer, both models' hidden states, and the rows at work, all in float32. Measured
    were 0.89 and 0.99 of it at the 7B's and the 32B's shape (BENCHMARKS.md).
    """
    shapes = [s for path, s in Olmo3(config).quantizable().items() if ".layers." in path]
    widest = max(inputs for _, inputs in shapes)
    block = 4 * sum(rows * inputs for rows, inputs in shapes) // config.num_hidden_layers
    working = max(_WORKING * min(block, ROWS_BYTES), _LEAST)
    return int(4 * (_MATRICES * widest**2 + 2 * tokens * config.hidden_size) + working)


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
