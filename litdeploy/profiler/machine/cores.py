"""Processor cores on Linux: counters of what runs on them, and pinning to the least busy ones.

On other systems the counters are empty or None, and nothing is pinned.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STAT = Path("/proc/stat")
_TASKS = Path("/proc/self/task")
_CPUINFO = Path("/proc/cpuinfo")
_FREQUENCY = "/sys/devices/system/cpu/cpu{}/cpufreq/scaling_cur_freq"
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
# Columns of /proc/stat: user nice system idle iowait irq softirq steal; a guest's time is part of user.
_BUSY = (0, 1, 2, 5, 6)
_STEAL = 7
_OBSERVE_SECONDS = 0.1


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...] | None]:
    """Restrict all threads of this process, and those that they start, to as many cores as it computes with threads.

    Otherwise the system moves them between cores. Yields the chosen cores: the least busy ones, on distinct physical
    cores if there are enough; None if the system cannot pin. On exit each thread gets its previous cores again.

    Args:
        threads: how many threads compute.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    allowed = os.sched_getaffinity(0)
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    cores = _choose(allowed, threads)
    _set_affinity({thread: set(cores) for thread in before})
    try:
        yield cores
    finally:
        _set_affinity({thread: before.get(thread, allowed) for thread in _threads()})


def _choose(allowed: set[int], count: int) -> tuple[int, ...]:
    if count >= len(allowed):
        return tuple(sorted(allowed))
    before = busy_seconds(allowed)
    time.sleep(_OBSERVE_SECONDS)
    after = busy_seconds(allowed)
    by_load = sorted(allowed, key=lambda core: (after.get(core, 0.0) - before.get(core, 0.0), core))
    siblings = {core: _siblings(core) for core in allowed}
    # The first hardware thread of each physical core, then the rest: two on one core share its units.
    firsts = [core for place, core in enumerate(by_load) if siblings[core].isdisjoint(by_load[:place])]
    ordered = firsts + [core for core in by_load if core not in firsts]
    return tuple(sorted(ordered[:count]))


def _siblings(core: int) -> set[int]:
    """The other hardware threads of a core's physical core."""
    try:
        text = Path(_TOPOLOGY.format(core)).read_text(encoding="ascii")
    except OSError:
        return set()
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found - {core}


def _threads() -> list[int]:
    return [int(task.name) for task in _TASKS.iterdir()]


def _set_affinity(places: dict[int, set[int]]) -> None:
    for thread, cores in places.items():
        with suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(thread, cores)


def busy_seconds(cores: Iterable[int]) -> dict[int, float]:
    """Core → seconds since boot that it worked for any process."""
    return {core: sum(times[place] for place in _BUSY) for core, times in _times(set(cores)).items()}


def stolen_seconds(cores: Iterable[int]) -> float | None:
    """Seconds of these cores since boot that the hypervisor gave to other machines."""
    times = _times(set(cores))
    return sum(each[_STEAL] for each in times.values()) if times else None


def all_cores() -> set[int]:
    """All cores of the machine, also those that this process may not use."""
    return set(_times(None))


def _times(cores: set[int] | None) -> dict[int, list[float]]:
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
        tick = 1 / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return {}
    found = {}
    for line in lines:
        match = re.match(r"cpu(\d+) (.*)", line)
        if match and (cores is None or int(match[1]) in cores):
            found[int(match[1])] = [int(value) * tick for value in match[2].split()[: _STEAL + 1]]
    return found


def preemptions() -> int | None:
    """How often this process lost its core while it worked (involuntary context switches)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def waiting_seconds() -> float | None:
    """Seconds that this process's threads were ready to run and had no core."""
    total = 0
    for task in _TASKS.glob("*/schedstat"):
        try:
            total += int(task.read_text(encoding="ascii").split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count it
            continue
    return total / 1e9 if total else None


def quota_seconds() -> float | None:
    """Seconds that this process's control group was stopped after it used up its CPU quota; None without a quota."""
    group = _own_group()
    for path, key, unit in (
        (Path(f"/sys/fs/cgroup{group}/cpu.stat"), "throttled_usec", 1e-6),
        (Path("/sys/fs/cgroup/cpu.stat"), "throttled_usec", 1e-6),
        (Path("/sys/fs/cgroup/cpu/cpu.stat"), "throttled_time", 1e-9),
    ):
        try:
            found = re.search(rf"^{key} (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1]) * unit
    return None


def _own_group() -> str:
    try:
        found = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return ""
    return "" if found is None or found[1] == "/" else found[1]


def clocks_mhz(cores: Iterable[int]) -> list[float]:
    """Present frequency of each of these cores."""
    wanted = set(cores)
    found = []
    for core in wanted:
        try:
            found.append(int(Path(_FREQUENCY.format(core)).read_text(encoding="ascii")) / 1e3)
        except (OSError, ValueError):
            break
    if len(found) == len(wanted):
        return found
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return []
    pairs = re.findall(r"^processor\s*:\s*(\d+)$.*?^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE | re.DOTALL)
    return [float(mhz) for core, mhz in pairs if int(core) in wanted]
