"""What the machine has for a model, and keeping within it while running. All in bytes."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from olmo3_mlx.errors import OptionError
from olmo3_mlx.memory.container import container_bytes

_RAN_OUT = re.compile(r"alloc|out ?of ?memory|insufficient memory", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def machine_bytes() -> int:
    """What this machine has for a model: on a Mac the working set that MLX recommends, on a CUDA
    machine the GPU's memory, elsewhere all of RAM, or what a container's limit leaves of it; or what
    the variable OLMO3_MEMORY says.

    OLMO3_MEMORY is a number of bytes, or one with K, M, G or T behind it (powers of 1024), such as
    12G or 1.5G. Raises OptionError for anything else.
    """
    wanted = os.environ.get("OLMO3_MEMORY", "")
    if wanted.strip():
        return _parsed(wanted)
    info = mx.device_info() if mx.default_device().type == mx.DeviceType.gpu else {}
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if key in info:
            return int(info[key])
    memory = physical_bytes()
    return min(memory, container_bytes() or memory)


def physical_bytes() -> int:
    """All of the machine's RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _parsed(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text.strip(), flags=re.ASCII | re.IGNORECASE)
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not 1 <= size < 2**63:
        raise OptionError(f"OLMO3_MEMORY must be bytes, or like 8G or 900M, not {text!r}")
    return int(size)


@contextmanager
def wired() -> Iterator[None]:
    """On a Mac keep the model in memory that the system does not page out, as much as MLX recommends.

    The limit from before is restored at the end, so that uses can be nested. Elsewhere nothing happens.
    """
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()  # work that still runs relies on the limit
        mx.set_wired_limit(before)


@contextmanager
def small_buffer_pool() -> Iterator[None]:
    """Let MLX keep at most 1 GiB of freed buffers meanwhile: work on ever other sizes would pile them up."""
    before = mx.set_cache_limit(2**30)
    mx.set_cache_limit(min(before, 2**30))  # on a CPU it keeps less anyway
    try:
        yield
    finally:
        mx.set_cache_limit(before)


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, as Python and MLX's backends say it."""
    if isinstance(error, MemoryError):
        return True
    # "[malloc] Unable to allocate", "CallbackErrorOutOfMemory" on Metal, "out of memory" on CUDA
    return isinstance(error, RuntimeError) and bool(_RAN_OUT.search(str(error)))


class MemoryWatch:
    """Tells an answer in progress when to stop, before memory runs out."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit` in bytes; left out, it is `machine_bytes()`. Raises OptionError if not positive."""
        self.limit = machine_bytes() if limit is None else limit
        if self.limit < 1:
            raise OptionError(f"the memory limit must be at least 1 byte, not {self.limit}")

    def exhausted(self, next_bytes: int = 0) -> bool:
        """Whether what MLX holds now, and `next_bytes` more, would pass the limit.

        Costs the reading of one counter; waits for no computation. Buffers that MLX keeps to use
        again are not counted, as it gives them back when it needs room.
        """
        return mx.get_active_memory() + next_bytes > self.limit
