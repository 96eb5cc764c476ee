"""The memory that a container may use: the limit of the control group that this process is in."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def container_bytes(root: Path = Path("/")) -> int | None:
    """The smallest memory limit, in bytes, of this process's control group and those above it; None where
    none is set, as outside of Linux. `root` is where proc and sys lie.

    Version 2 has it in memory.max, version 1 in memory.limit_in_bytes, as the kernel's documentation says
    (admin-guide/cgroup-v2 and cgroup-v1/memory).
    """
    limits = (_limit(path) for path in _limit_files(root))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_files(root: Path) -> Iterator[Path]:
    """Where limits of this process's groups may stand; a file that is not there sets none."""
    groups = root / "sys" / "fs" / "cgroup"
    for hierarchy, controllers, path in _memberships(root / "proc" / "self" / "cgroup"):
        if hierarchy == "0":
            places, name = [groups, groups / "unified"], "memory.max"
        elif "memory" in controllers.split(","):
            places, name = [groups / "memory"], "memory.limit_in_bytes"
        else:
            continue
        for place in places:
            yield place / name
            yield from (place / above / name for above in _with_those_above(path))


def _memberships(file: Path) -> Iterator[list[str]]:
    """The hierarchy, controllers and path of each group that this process is in."""
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        fields = line.split(":", 2)
        if len(fields) == 3:
            yield fields


def _with_those_above(path: str) -> Iterator[PurePosixPath]:
    """A group's path below its mount, then those above it.

    Inside a container the path is often the host's, of which nothing is mounted, or one that climbs out of
    what is mounted (`/..`): then the mount's own limit, which is always looked at, is the container's.
    """
    below = PurePosixPath(path.lstrip("/"))
    if ".." not in below.parts:
        yield from (group for group in (below, *below.parents) if group.parts)


def _limit(path: Path) -> int | None:
    """The limit in a file; None for "max", and for a file that is not there or says something else."""
    try:
        limit = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return limit if limit > 0 else None
