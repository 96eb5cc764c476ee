"""Checks of what a machine is and has, before anything is computed: versions, memory."""

import os
from collections.abc import Iterator
from functools import cache

import mlx.core as mx

from olmo3_mlx.doctor.facts import Facts
from olmo3_mlx.doctor.finding import FAILED, Check, Outcome, judged
from olmo3_mlx.doctor.known_faults import KNOWN_FAULTS, matching
from olmo3_mlx.doctor.tolerances import on_gpu
from olmo3_mlx.memory.machine import machine_bytes, physical_bytes
from olmo3_mlx.memory.plan import in_gib

_VERSIONS_ADVICE = "install MLX's packages anew, all of one version: pip install --force-reinstall mlx"
_MEMORY_ADVICE = "close other programs, or correct the variable OLMO3_MEMORY, and look again"


def machine_checks() -> Iterator[Check]:
    """Versions, what is known to be wrong with them, and memory."""
    facts = cache(Facts.here)
    yield Check("versions", lambda: versions(facts()), _VERSIONS_ADVICE)
    yield Check("known faults", lambda: known_faults(facts()), _VERSIONS_ADVICE)
    yield Check("memory", memory, _MEMORY_ADVICE)


def versions(facts: Facts) -> Outcome:
    """That MLX is of one version throughout, and which all others are."""
    if facts.unlike:
        return judged(False, f"{', '.join(facts.unlike)} beside mlx {facts.mlx}: {facts}")
    return judged(True, str(facts))


def known_faults(facts: Facts) -> Outcome:
    """That the combination is not known to go wrong; what may go wrong is named."""
    found = matching(facts)
    said = "; ".join(f"{fault.name} ({fault.source})" for fault in found)
    if any(fault.certain for fault in found):
        return Outcome(FAILED, said, "; ".join(fault.advice for fault in found))
    if found:
        return judged(True, f"the checks below decide: {said}")
    return judged(True, f"none of {len(KNOWN_FAULTS)} known combinations")


def memory() -> Outcome:
    """What the machine has, what of it is to be used, and what MLX holds of that."""
    limit, used = machine_bytes(), mx.get_active_memory()
    said = [f"machine {in_gib(physical_bytes())}", f"limit {in_gib(limit)}"]
    if os.environ.get("OLMO3_MEMORY", "").strip():
        said[-1] += " (OLMO3_MEMORY)"
    info = mx.device_info() if on_gpu() else {}
    if "max_recommended_working_set_size" in info:
        recommended = in_gib(int(info["max_recommended_working_set_size"]))
        said.append(f"working set that MLX recommends, and wires while answering, {recommended}")
    said += [f"MLX's own limit {in_gib(mx.get_memory_limit())}", f"used {in_gib(used)}"]
    return judged(used < limit, ", ".join(said))
