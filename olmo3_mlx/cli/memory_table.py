"""What a model takes at several contexts, with weights and caches of several precisions, and what fits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.cli.wording import worded
from olmo3_mlx.errors import MemoryFitError
from olmo3_mlx.memory.plan import MemoryFit, MemoryPlan, check_context, in_gib, plan
from olmo3_mlx.memory.sizes import weight_bytes

PRECISIONS: Mapping[str, int | None] = {"bf16": None, "8-bit": 8, "4-bit": 4}
_CONTEXTS = (4096, 16384, 65536)


@dataclass(frozen=True)
class MemoryTable:
    """Plans of `fit` for `weights` (bytes by precision) and `caches` (options by precision)."""

    fit: MemoryFit
    weights: Mapping[str, int]
    caches: Mapping[str, CacheOptions]

    @classmethod
    def of(cls, fit: MemoryFit, stored: int | None, group_size: int | None, start: int) -> "MemoryTable":
        """With weights as they are `stored`, in bytes, if that is known, and with caches of every precision
        that this model's can have, in groups of `group_size` beyond `start` tokens.
        """
        weights = {label: weight_bytes(fit.config, bits) for label, bits in PRECISIONS.items()}
        if stored is not None and stored not in weights.values():
            weights = {"stored": stored, **weights}
        caches = {}
        for label, bits in PRECISIONS.items():
            options = CacheOptions() if bits is None else CacheOptions(bits, group_size, start)
            if group_size is not None or fit.can_have(options):  # a group size that was asked for is refused
                caches[label] = options
        return cls(fit, weights, caches)

    @property
    def contexts(self) -> list[int]:
        """The contexts to show: those that the model has."""
        longest = self.fit.config.max_position_embeddings
        return [n for n in _CONTEXTS if n <= longest] or [longest]

    def facts(self) -> dict[str, Any]:
        """All of it, in bytes and tokens, for programs."""
        plans = {
            label: {str(n): self.fit.at(0, n, options) for n in self.contexts}
            for label, options in self.caches.items()
        }
        return {
            "weight_bytes": dict(self.weights),
            "cache_bytes": {label: {n: p.caches for n, p in row.items()} for label, row in plans.items()},
            "working_bytes": {label: {n: p.working for n, p in row.items()} for label, row in plans.items()},
            "machine_bytes": self.fit.machine,
            "largest_context": {
                label: {name: self.fit.largest(size, options) for name, options in self.caches.items()}
                for label, size in self.weights.items()
            },
        }

    def text(self) -> str:
        """The table; a star marks what does not fit, which the last line says if there is one."""
        largest = self.fit.at(max(self.weights.values()), self.contexts[-1]).total
        size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")

        def cell(total: int) -> str:
            return f"{total / size:.2f}" + (" " if total <= self.fit.machine else "*")

        def row(context: int, label: str, options: CacheOptions) -> str:
            alone = self.fit.at(0, context, options)
            parts = [f"{part / size:.2f}" for part in (alone.caches, alone.working)]
            totals = [cell(alone.total + weights) for weights in self.weights.values()]
            return _row(f"{context:,} tokens, {label} caches", parts, totals)

        table = "\n".join(
            (
                _row(f"memory in {unit}", ["caches", "working"], [f"{w} weights " for w in self.weights]),
                _row("weights alone", ["", ""], [cell(w) for w in self.weights.values()]),
                *(row(n, label, o) for n in self.contexts for label, o in self.caches.items()),
            )
        )
        legend = f"\n* more than the {in_gib(self.fit.machine)} that this machine has for it"
        return table + legend if "*" in table else table

    def verdict(self) -> str:
        """The largest contexts that fit."""

        def row(label: str, options: CacheOptions) -> str:
            largest = (self.fit.largest(size, options) for size in self.weights.values())
            return _row(f"with {label} caches", ["", ""], [f"{n:,} " if n else "none*" for n in largest])

        lines = [
            f"This machine has {in_gib(self.fit.machine)} for it. The largest contexts that fit, in tokens:",
            *(row(label, options) for label, options in self.caches.items()),
        ]
        if mx.default_device().type == mx.DeviceType.cpu:
            lines.append(
                "On MLX's CPU backend quantized weights compute in float32: caches and working space take "
                "twice that."
            )
        return "\n".join(lines)

    def asked(self, context: int | None, options: CacheOptions) -> dict[str, Any]:
        """The plans for this context and these caches, by precision of the weights, for programs."""
        check_context(self.fit.config, context)

        def facts(found: MemoryPlan) -> dict[str, Any]:
            sizes = {
                name: getattr(found, name) for name in ("weights", "caches", "working", "machine", "total")
            }
            return {"context": found.context, "kv_bits": options.bits, **sizes, "fits": found.fits}

        return {
            label: facts(self.fit.at(size, context or max(1, self.fit.largest(size, options)), options))
            for label, size in self.weights.items()
        }

    def answers(self, context: int | None, options: CacheOptions) -> Iterator[str]:
        """A line for each precision of the weights: the plan for this context and caches, or why not."""
        for label, size in self.weights.items():
            try:
                found = plan(self.fit.config, size, options, context=context, machine=self.fit.machine)
            except MemoryFitError as error:
                yield f"{label} weights do not fit: {worded(error)}"
                continue
            yield (
                f"{label} weights: {found.context:,} tokens fit in {in_gib(found.total)}, caches "
                f"{in_gib(found.caches)} and working space {in_gib(found.working)} included"
            )


def _row(label: str, parts: list[str], totals: list[str]) -> str:
    return (f"{label:<28}" + "".join(f"{p:>9}" for p in parts) + "".join(f"{t:>17}" for t in totals)).rstrip()
