"""Combinations of versions, systems and chips that are known to go wrong. Data; `matching` reads it."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from olmo3_mlx.doctor.facts import Facts

LEAST_MLX = "0.32.4"  # as pyproject.toml says


@dataclass(frozen=True)
class KnownFault:
    """A combination, and what is known of it. Whatever is left empty may be anything.

    name      what it is, in a few words
    source    where it is described
    advice    what to do
    certain   it goes wrong; otherwise it may, and the kernels' checks decide
    package   a distribution, `below` a version of it, `tag` a pattern of its wheel's tag
    without   a distribution that is not installed
    system    "Darwin" or "Linux", its version from `os_from` to before `os_below`
    chip      a pattern of the chip's name
    device    "cpu" or "gpu", MLX's default
    """

    name: str
    source: str
    advice: str
    certain: bool = True
    package: str = ""
    below: str = ""
    tag: str = ""
    without: str = ""
    system: str = ""
    os_from: str = ""
    os_below: str = ""
    chip: str = ""
    device: str = ""

    def fits(self, facts: Facts) -> bool:
        """Whether a machine is of that combination."""
        return all(self._conditions(facts))

    def _conditions(self, facts: Facts) -> Iterator[bool]:
        installed = facts.packages.get(self.package)
        if self.package:
            yield installed is not None
        if self.below:
            yield installed is not None and _number(installed) < _number(self.below)
        if self.tag:
            yield re.search(self.tag, facts.tags.get(self.package, "")) is not None
        if self.without:
            yield self.without not in facts.packages
        if self.system:
            yield facts.system == self.system
        if self.os_from:
            yield _number(facts.os_version) >= _number(self.os_from)
        if self.os_below:
            yield _number(facts.os_version) < _number(self.os_below)
        if self.chip:
            yield re.search(self.chip, facts.chip) is not None
        if self.device:
            yield facts.device == self.device


_NEURAL_GPU = r"\bApple M([5-9]|\d\d)\b"  # GPUs on which MLX takes its NAX kernels

KNOWN_FAULTS = (
    KnownFault(
        "MLX is older than this program needs",
        source="pyproject.toml",
        advice=f"pip install --upgrade 'mlx>={LEAST_MLX}'",
        package="mlx",
        below=LEAST_MLX,
    ),
    KnownFault(
        "MLX's wheel for macOS 26 is built for 26.2, and takes kernels that 26.0 and 26.1 do not have",
        source="https://github.com/ml-explore/mlx/issues/4525",
        advice="update macOS to 26.2 or newer, or install mlx-metal's wheel for macOS 15",
        package="mlx-metal",
        tag=r"macosx_26",
        system="Darwin",
        os_from="26.0",
        os_below="26.2",
        chip=_NEURAL_GPU,
    ),
    KnownFault(
        "an MLX built here may have been compiled by metalfe-32023.883, which is wrong beyond 8 rows",
        source="https://github.com/ml-explore/mlx/issues/3585",
        advice="install MLX's own wheel, or build it with MACOSX_DEPLOYMENT_TARGET=26.2",
        certain=False,
        without="mlx-metal",
        system="Darwin",
        os_from="26.0",
        chip=_NEURAL_GPU,
    ),
    KnownFault(
        "MLX for the CPU and for CUDA are both installed, and the former's file is in place",
        source="README.md, Limits",
        advice="pip install --force-reinstall --no-deps mlx-cuda-13 (there is nothing to do without a GPU)",
        certain=False,
        package="mlx-cuda-13",
        device="cpu",
    ),
)


def matching(facts: Facts, faults: Iterable[KnownFault] = KNOWN_FAULTS) -> list[KnownFault]:
    """The faults that a machine is known to have, or may have."""
    return [fault for fault in faults if fault.fits(facts)]


def _number(version: str) -> tuple[int, ...]:
    """A version's numbers, of which 26 and 26.0 are the same; what follows them (dev, rc) is not compared."""
    numbers = [int(n) for n in (re.match(r"\d+(\.\d+)*", version) or ["0"])[0].split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))
