"""Memory and processor time that this process may use: limits of the machine, a container (cgroup) and the shell."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/statm")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def free_host_memory() -> int:
    """Bytes of memory that this process can still allocate: the least of what the machine has free, what each of its
    control groups leaves, and what `ulimit -v` leaves."""
    return max(0, min(_free_on_machine(), *_left_in_cgroups(), _left_of_address_space()))


def usable_cores() -> int:
    """Number of cores whose time this process may use: those of its affinity, and no more than its control groups'
    quotas, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, *(math.ceil(quota) for quota in _quotas())))


def _free_on_machine() -> int:
    if _MEMINFO.is_file():
        # Not SC_AVPHYS_PAGES: it leaves out what the page cache would give up, which is most of it on a busy machine.
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_of_address_space() -> int:
    try:
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        used = int(_STATUS.read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError):  # Windows has no such limit, macOS no such file
        return _free_on_machine()
    return _free_on_machine() if most == resource.RLIM_INFINITY else most - used


def _left_in_cgroups() -> Iterator[int]:
    """What each control group with a memory limit leaves; the page cache, which it would give up, counts as free."""
    for folder in _folders("memory"):
        for most, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _number(folder / most), _number(folder / used)
            if limit is not None and usage is not None:
                yield limit - usage + _statistic(folder / "memory.stat", cache)
    yield _free_on_machine()


def _quotas() -> Iterator[float]:
    """Cores that each control group with a quota grants."""
    for folder in _folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)
        old_quota, old_period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if old_quota is not None and old_period and old_quota > 0:
            yield old_quota / old_period
    yield math.inf if os.cpu_count() is None else float(os.cpu_count() or 1)


def _folders(controller: str) -> list[Path]:
    """Folders of this process's control group and all above it, for a controller, in both versions' hierarchies.

    In a container the group's path may be the host's and not exist; its own group is then the root of the hierarchy.
    """
    found = [_CGROUPS, _CGROUPS / controller]
    for line in _text(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controllers if controllers else _CGROUPS
        below = Path(path.lstrip("/"))
        found += [root / part for part in (below, *below.parents)]
    return [folder for folder in dict.fromkeys(found) if folder.is_dir()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no file or no limit (`max`)."""
    text = _text(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _statistic(path: Path, key: str) -> int:
    values = dict(line.split(" ", 1) for line in _text(path).splitlines() if " " in line)
    return int(values.get(key, 0))
