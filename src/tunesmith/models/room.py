"""How much memory this process may still take: what the machine has free, within the limits of every control group that holds it."""

from __future__ import annotations

from pathlib import Path

import torch

_UNLIMITED = 1 << 62  # bytes: no limit; version 1 of control groups writes a number of about this size
_VERSIONS = (  # of control groups: below which folder, the limit's file, what is held, and of it what can be dropped
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes that may still be taken, what this process holds not counted; of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = _UNLIMITED
    return min(free, control_group_room())


def control_group_room(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the process's control groups leave it, of versions 1 and 2: the least of its own and all that hold that one.

    Files that were read and can be dropped do not count as held. In a container the listed group may be the mount's own root.
    """
    try:
        listed = [line.split(":", 2) for line in listing.read_text().splitlines()]
    except OSError:
        return _UNLIMITED
    room = _UNLIMITED
    for _, controllers, name in (parts for parts in listed if len(parts) == 3):
        version = 0 if not controllers else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        folder, *files = _VERSIONS[version]
        base = root / folder
        group = base / name.strip("/")
        for one in (group, *group.parents):
            room = min(room, _room(one, *files))
            if one == base:
                break
    return room


def _room(group: Path, limit: str, held: str, droppable: str) -> int:
    """What one group leaves; all there is where it has no limit or cannot be read."""
    try:
        most = int((group / limit).read_text())
        if most >= _UNLIMITED:
            return _UNLIMITED
        taken = int((group / held).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no number
        return _UNLIMITED
    return max(0, most - taken + int(stat.get(droppable, 0)))
