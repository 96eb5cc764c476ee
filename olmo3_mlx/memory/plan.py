"""What fits a machine: weights, caches at a context, and working space, against the memory there is.

Nothing is loaded. An explicit context is obeyed or refused with the numbers and the nearest settings
that fit; the default is the largest context that fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypedDict

import mlx.core as mx

from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import MemoryFitError, OptionError
from olmo3_mlx.generation.loop import PREFILL_CHUNK
from olmo3_mlx.memory.machine import machine_bytes
from olmo3_mlx.memory.sizes import cache_bytes, position_bytes, weight_bytes
from olmo3_mlx.memory.working_space import passes, working_bytes

LEAST_CONTEXT = 512  # below that a default is of no use


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes at most while it runs with a context of `context` tokens; sizes in bytes.

    kv_bits   8 or 4, None where caches are not quantized
    weights   of the model
    caches    holding `context` tokens
    working   what the largest pass needs for a while, see `working_bytes`
    machine   what there is, see `machine_bytes`
    """

    context: int
    kv_bits: int | None
    weights: int
    caches: int
    working: int
    machine: int

    @property
    def total(self) -> int:
        """Weights, caches and working space."""
        return self.weights + self.caches + self.working

    @property
    def fits(self) -> bool:
        """Whether the machine has that."""
        return self.total <= self.machine


class CacheOptions(TypedDict):
    """The arguments that `cache_bytes` and `working_bytes` share."""

    kv_bits: int | None
    kv_group_size: int | None
    kv_start: int
    rewind: int
    itemsize: int


@dataclass(frozen=True)
class MemoryFit:
    """How a model would run on which machine: what is the same whatever the context and kv_bits.

    `chunk` is the tokens of a prefill pass, `itemsize` the bytes of a number that the model computes
    in, `machine` the bytes that there are; the rest are `make_caches`'s arguments.
    """

    config: Olmo3Config
    kv_group_size: int | None = None
    kv_start: int = 0
    rewind: int = 512
    chunk: int = field(default_factory=lambda: PREFILL_CHUNK[mx.default_device().type])
    itemsize: int = 2
    machine: int = field(default_factory=machine_bytes)

    def at(self, weights: int, context: int, kv_bits: int | None = None) -> MemoryPlan:
        """The plan for this context, whether it fits or not. Raises OptionError for a wrong option."""
        c = self.config
        how: CacheOptions = {
            "kv_bits": kv_bits,
            "kv_group_size": self.kv_group_size,
            "kv_start": self.kv_start,
            "rewind": self.rewind,
            "itemsize": self.itemsize,
        }
        position_bytes(c, kv_bits=kv_bits, kv_group_size=self.kv_group_size)  # raises even below kv_start
        # Just before they are quantized, caches may take more than ever after.
        caches = [cache_bytes(c, n, **how) for n in (context, min(context, self.kv_start))]
        working = [working_bytes(c, n, context, **how) for n in passes(self.chunk)]
        return MemoryPlan(context, kv_bits, weights, max(caches), max(working), self.machine)

    @property
    def quantizes(self) -> bool:
        """Whether this model's caches can be quantized, which depends on its head dimension."""
        try:
            position_bytes(self.config, kv_bits=8, kv_group_size=self.kv_group_size)
        except OptionError:
            return False
        return True

    def largest(self, weights: int, kv_bits: int | None = None) -> int:
        """The largest context that fits, at most the model's; 0 if none does."""
        low, high = 0, self.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(weights, middle, kv_bits).fits else (low, middle - 1)
        return low


def plan(
    config: Olmo3Config,
    weights: int,
    *,
    context: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int | None = None,
    kv_start: int = 0,
    rewind: int = 512,
    chunk: int | None = None,
    itemsize: int = 2,
    machine: int | None = None,
) -> MemoryPlan:
    """A plan that fits: for this context, or left out for the largest one, at most the model's.

    `weights` is what the model takes, in bytes: see `stored_weight_bytes` and `stored_itemsize`. The
    other arguments are MemoryFit's.

    Raises MemoryFitError, with the numbers and the nearest settings that fit, if it does not fit, or
    without a context if not even LEAST_CONTEXT tokens do. Raises OptionError for a context that is not
    positive or larger than the model's, and for what `make_caches` refuses.
    """
    check_context(config, context)
    fit = MemoryFit(
        config,
        kv_group_size,
        kv_start,
        rewind,
        PREFILL_CHUNK[mx.default_device().type] if chunk is None else chunk,
        itemsize,
        machine_bytes() if machine is None else machine,
    )
    if context is None:
        least = min(LEAST_CONTEXT, config.max_position_embeddings)
        context = max(least, fit.largest(weights, kv_bits))
    made = fit.at(weights, context, kv_bits)
    if not made.fits:
        raise _refusal(fit, made)
    return made


def in_gib(size: int) -> str:
    """A size as people read it: in GiB, or in MiB if it is less than one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def check_context(config: Olmo3Config, context: int | None) -> None:
    """Raise OptionError unless it is None or in 1 to the model's context."""
    if context is None:
        return
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise OptionError(f"context must be a number of tokens, at least 1, not {context!r}")
    if context > config.max_position_embeddings:
        raise OptionError(
            f"context must be at most the model's {config.max_position_embeddings:,} tokens, not {context:,}"
        )


def _refusal(fit: MemoryFit, plan: MemoryPlan) -> MemoryFitError:
    """The error that says what does not fit, and what would."""
    caches = "caches" if plan.kv_bits is None else f"{plan.kv_bits}-bit caches"
    return MemoryFitError(
        f"a context of {plan.context:,} tokens needs {in_gib(plan.total)} (weights {in_gib(plan.weights)}, "
        f"{caches} {in_gib(plan.caches)}, working space {in_gib(plan.working)}), there are "
        f"{in_gib(plan.machine)}: ",
        needed=plan.total,
        available=plan.machine,
        nearest=tuple(_nearest(fit, plan)),
    )


def _nearest(fit: MemoryFit, plan: MemoryPlan) -> Iterator[dict[str, int]]:
    """The smallest change of one setting that fits, for each; of weights and caches if none does."""
    largest = fit.largest(plan.weights, plan.kv_bits)
    if largest:
        yield {"context": largest}
    lower = [bits for bits in (8, 4) if plan.kv_bits is None or bits < plan.kv_bits]
    lower = lower if fit.quantizes else []
    kv_bits = next((bits for bits in lower if fit.at(plan.weights, plan.context, bits).fits), None)
    if kv_bits:
        yield {"kv_bits": kv_bits}
    smaller = [(bits, weight_bytes(fit.config, bits)) for bits in (8, 4)]
    smaller = [(bits, size) for bits, size in smaller if size < plan.weights]
    for bits, size in smaller:
        if fit.at(size, plan.context, plan.kv_bits).fits:
            yield {"weight_bits": bits}
            return
    if not kv_bits:
        for bits, size in smaller:
            for kv in lower:
                if fit.at(size, plan.context, kv).fits:
                    yield {"weight_bits": bits, "kv_bits": kv}
                    return
