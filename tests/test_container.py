"""A container's memory limit, read from trees like those that Linux shows."""

from pathlib import Path

import pytest

from olmo3_mlx.memory.container import container_bytes

GROUPS = "sys/fs/cgroup"
V1_UNLIMITED = "9223372036854771712"
# Which groups the process is in, the files of limits, and the limit that counts.
TREES: dict[str, tuple[str, dict[str, str], int | None]] = {
    "version 2, in the group itself": ("0::/app.slice/a", {"app.slice/a/memory.max": "4096000"}, 4096000),
    "version 2, in the group above": (
        "0::/app.slice/a", {"app.slice/a/memory.max": "max", "app.slice/memory.max": "8192000"}, 8192000,
    ),
    "version 2, the smaller of both": (
        "0::/app.slice/a", {"app.slice/a/memory.max": "9000000", "app.slice/memory.max": "8192000"}, 8192000,
    ),
    "version 2, in a namespace": ("0::/", {"memory.max": "123456789"}, 123456789),
    "version 2, outside what is mounted": ("0::/../b", {"memory.max": "777777", "b/memory.max": "1"}, 777777),
    "version 2, a host's path in a container": ("0::/docker/0a1b", {"memory.max": "555555"}, 555555),
    "version 2, no limit": ("0::/a", {"a/memory.max": "max"}, None),
    "version 2, beside version 1": (
        "4:memory:/\n0::/a",
        {"unified/a/memory.max": "99999", "memory/memory.limit_in_bytes": "11111"},
        11111,
    ),
    "version 1": (
        "9:cpu,cpuacct:/x\n4:memory:/docker/0a1b",
        {"memory/docker/0a1b/memory.limit_in_bytes": "2147483648"},
        2147483648,
    ),
    "version 1, in the group above": (
        "4:memory:/pods/a",
        {"memory/pods/a/memory.limit_in_bytes": V1_UNLIMITED, "memory/pods/memory.limit_in_bytes": "65536"},
        65536,
    ),
    "version 1, a host's path in a container": (
        "4:memory:/docker/0a1b", {"memory/memory.limit_in_bytes": "1048576"}, 1048576,
    ),
    "version 1, another controller's group": ("3:cpu:/a", {"memory/a/memory.limit_in_bytes": "1"}, None),
    "a colon in a name": ("0::/a:b", {"a:b/memory.max": "31337"}, 31337),
    "what is no number": ("0::/a", {"a/memory.max": "lots"}, None),
    "no files": ("0::/a", {}, None),
    "what is no list of groups": ("\x00 nonsense", {"memory.max": "1"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("member", "files", "limit"), TREES.values(), ids=TREES)
def test_the_smallest_limit_along_the_path_counts(
    tmp_path: Path, member: str, files: dict[str, str], limit: int | None
) -> None:
    own = tmp_path / "proc" / "self" / "cgroup"
    own.parent.mkdir(parents=True)
    own.write_text(f"{member}\n")
    for name, text in files.items():
        path = tmp_path / GROUPS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert container_bytes(tmp_path) == limit


def test_a_system_without_control_groups_sets_no_limit(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) is None
