"""What this machine is, and what is installed on it. Nothing is imported to find out."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from olmo3_mlx import __version__
from olmo3_mlx.doctor.tolerances import on_gpu

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-13", "mlx-cuda-12", "mlx-lm")


@dataclass(frozen=True)
class Facts:
    """A machine. `packages` are versions by name, `tags` those of their wheels, such as
    "cp311-cp311-macosx_26_0_arm64". `mlx` is the version that runs, as MLX itself says it.
    """

    version: str
    mlx: str
    python: str
    system: str
    os_version: str
    chip: str
    device: str
    packages: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls) -> "Facts":
        """Those of this machine."""
        found = {name: distribution for name in PACKAGES if (distribution := _distribution(name))}
        return cls(
            version=__version__,
            mlx=mx.__version__,  # type: ignore[attr-defined]  # a C++ module says no more of itself
            python=platform.python_version(),
            system=platform.system(),
            os_version=_os_version(),
            chip=_chip(),
            device="gpu" if on_gpu() else "cpu",
            packages={name: distribution.version for name, distribution in found.items()},
            tags={name: _tag(distribution) for name, distribution in found.items()},
        )

    @property
    def unlike(self) -> list[str]:
        """Parts of MLX that are of another version than the MLX that runs."""
        names = [name for name in self.packages if name.startswith("mlx") and name != "mlx-lm"]
        return [
            f"{name} {self.packages[name]}"
            for name in names
            if self.packages[name] != self.mlx and not self.mlx.startswith(f"{self.packages[name]}.dev")
        ]

    def __str__(self) -> str:
        """One line."""
        packages = [f"{name} {version}" for name, version in self.packages.items() if name != "mlx"]
        system = f"macOS {self.os_version}" if self.system == "Darwin" else f"{self.system} {self.os_version}"
        parts = [f"olmo3-mlx {self.version}", f"mlx {self.mlx}", *packages, f"Python {self.python}", system]
        return ", ".join((*parts, f"{self.chip} ({self.device})"))


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _tag(distribution: metadata.Distribution) -> str:
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    return " ".join(line.removeprefix("Tag:").strip() for line in lines if line.startswith("Tag:"))


def _os_version() -> str:
    if sys.platform != "darwin":
        return platform.release()
    version = platform.mac_ver()[0]
    # To a Python that was built for older systems macOS 26 calls itself 16.
    return f"26{version[2:]}" if version.split(".")[0] == "16" else version


def _chip() -> str:
    """The GPU's name where MLX runs on one, else the processor's."""
    name = mx.device_info().get("device_name")
    if on_gpu() and name:
        return str(name)
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return done.stdout.strip()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return str(name or platform.machine())
