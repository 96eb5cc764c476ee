"""What fits a machine: weights, caches at a context, and working space, against the memory there is.

Nothing is loaded. An explicit context is obeyed or refused with the numbers and the nearest settings
that fit; the default is the largest context that fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Unpack

import mlx.core as mx

from olmo3_mlx.caches.options import CacheKeywords, CacheOptions
from olmo3_mlx.caches.quantized import BITS
from olmo3_mlx.config import Olmo3Config
from olmo3_mlx.errors import MemoryFitError, OptionError, Setting
from olmo3_mlx.generation.loop import PREFILL_CHUNK
from olmo3_mlx.memory.machine import machine_bytes
from olmo3_mlx.memory.sizes import cache_bytes, weight_bytes
from olmo3_mlx.memory.working_space import passes, working_bytes

LEAST_CONTEXT = 512  # below that a default is of no use


@dataclass(frozen=True)
class MemoryPlan:
    """What a model takes at most while it runs with a context of `context` tokens; sizes in bytes.

    options   those of its caches
    weights   of the model
    caches    holding `context` tokens
    working   what the largest pass needs for a while, see `working_bytes`
    machine   what there is, see `machine_bytes`
    """

    context: int
    options: CacheOptions
    weights: int
    caches: int
    working: int
    machine: int

    @property
    def total(self) -> int:
        """Weights, caches and working space."""
        return self.weights + self.caches + self.working

    @property
    def left(self) -> int:
        """What the machine has besides."""
        return self.machine - self.total

    @property
    def fits(self) -> bool:
        """Whether the machine has that."""
        return self.left >= 0


@dataclass(frozen=True)
class MemoryFit:
    """A model on a machine: what is the same whatever the context and the caches' options.

    `chunk` is the tokens of a prefill pass, `itemsize` the bytes of a number that the model computes
    in, `machine` the bytes that there are.
    """

    config: Olmo3Config
    chunk: int = field(default_factory=lambda: PREFILL_CHUNK[mx.default_device().type])
    itemsize: int = 2
    machine: int = field(default_factory=machine_bytes)

    def at(self, weights: int, context: int, options: CacheOptions | None = None) -> MemoryPlan:
        """The plan for weights of so many bytes and this context, whether it fits or not.

        Raises OptionError for options that this model's caches cannot have.
        """
        c, options = self.config, options or CacheOptions()
        options.quantization(c.head_dim)  # raises, even where the context ends before `start`
        # Just before they are quantized, caches may take more than ever after.
        lengths = (context, min(context, options.start))
        caches = [cache_bytes(c, n, options, itemsize=self.itemsize) for n in lengths]
        working = [working_bytes(c, n, context, options, itemsize=self.itemsize) for n in passes(self.chunk)]
        return MemoryPlan(context, options, weights, max(caches), max(working), self.machine)

    def largest(self, weights: int, options: CacheOptions | None = None) -> int:
        """The largest context that fits, at most the model's; 0 if none does."""
        low, high = 0, self.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(weights, middle, options).fits else (low, middle - 1)
        return low

    def lower_bits(self, options: CacheOptions) -> list[CacheOptions]:
        """The same options with each smaller number of bits that this model's caches can have."""
        lower = [replace(options, bits=bits) for bits in BITS if options.bits is None or bits < options.bits]
        return [less for less in lower if self.can_have(less)]

    def can_have(self, options: CacheOptions) -> bool:
        """Whether this model's caches can have these options, which depends on its head dimension."""
        try:
            options.quantization(self.config.head_dim)
        except OptionError:
            return False
        return True


def plan(
    config: Olmo3Config,
    weights: int,
    options: CacheOptions | None = None,
    *,
    context: int | None = None,
    chunk: int | None = None,
    itemsize: int = 2,
    machine: int | None = None,
    **keywords: Unpack[CacheKeywords],
) -> MemoryPlan:
    """A plan that fits: for this context, or left out for the largest one, at most the model's.

    `weights` is what the model takes, in bytes: see `Checkpoint.plan`, which knows it. `options` are those of
    the caches, or the same as keywords. The other arguments are MemoryFit's.

    Raises MemoryFitError, with the numbers and the nearest settings that fit, if it does not fit, or
    without a context if not even LEAST_CONTEXT tokens do. Raises OptionError for a context that is not
    positive or larger than the model's, and for options that its caches cannot have.
    """
    check_context(config, context)
    options = CacheOptions.of(options, **keywords)
    fit = MemoryFit(
        config,
        PREFILL_CHUNK[mx.default_device().type] if chunk is None else chunk,
        itemsize,
        machine_bytes() if machine is None else machine,
    )
    if context is None:
        least = min(LEAST_CONTEXT, config.max_position_embeddings)
        context = max(least, fit.largest(weights, options))
    found = fit.at(weights, context, options)
    if not found.fits:
        raise _refusal(fit, found)
    return found


def in_gib(size: int) -> str:
    """A size as people read it: in GiB, or in MiB if it is less than one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def check_context(config: Olmo3Config, context: int | None) -> None:
    """Raise OptionError unless it is None or in 1 to the model's context."""
    if context is None:
        return
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise OptionError(Setting("context"), f" must be a number of tokens, at least 1, not {context!r}")
    if context > config.max_position_embeddings:
        longest = config.max_position_embeddings
        raise OptionError(
            Setting("context"), f" must be at most the model's {longest:,} tokens, not {context:,}"
        )


def _refusal(fit: MemoryFit, plan: MemoryPlan) -> MemoryFitError:
    """The error that says what does not fit, and what would."""
    bits = plan.options.bits
    return MemoryFitError(
        f"a context of {plan.context:,} tokens needs {in_gib(plan.total)} (weights {in_gib(plan.weights)}, "
        f"{'caches' if bits is None else f'{bits}-bit caches'} {in_gib(plan.caches)}, working space "
        f"{in_gib(plan.working)}), there are {in_gib(plan.machine)}: ",
        needed=plan.total,
        available=plan.machine,
        nearest=tuple(_nearest(fit, plan)),
    )


def _nearest(fit: MemoryFit, plan: MemoryPlan) -> Iterator[dict[str, int]]:
    """The smallest change of one setting that fits, for each; of weights and caches if none does."""
    largest = fit.largest(plan.weights, plan.options)
    if largest:
        yield {"context": largest}
    lower = {less.bits: less for less in fit.lower_bits(plan.options) if less.bits is not None}
    kv_bits = next((n for n, less in lower.items() if fit.at(plan.weights, plan.context, less).fits), None)
    if kv_bits:
        yield {"kv_bits": kv_bits}
    stored = 16 if fit.config.quantization is None else fit.config.quantization.default.bits
    smaller = [(bits, weight_bytes(fit.config, bits)) for bits in (8, 4) if bits < stored]
    smaller = [(bits, size) for bits, size in smaller if size < plan.weights]
    for bits, size in smaller:
        if fit.at(size, plan.context, plan.options).fits:
            yield {"weight_bits": bits}
            return
    if not kv_bits:
        for bits, size in smaller:
            for kv_bits, less in lower.items():
                if fit.at(size, plan.context, less).fits:
                    yield {"weight_bits": bits, "kv_bits": kv_bits}
                    return
