"""The process held to as many cores as it computes with threads, so that the system does not move it about."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from litdeploy.profiler.machine.system import busy_seconds

_TASKS = Path("/proc/self/task")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_LOOK_SECONDS = 0.1


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...] | None]:
    """While it is open, all threads of this process, and those that they start, run on as many cores and no others.

    Gives the cores: the least busy ones, of different physical cores where there are enough. None, and nothing is
    pinned, where the system cannot do it (only Linux can). Afterwards each thread may run where it could before.

    Args:
        threads: that are computed with.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    allowed = os.sched_getaffinity(0)
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    cores = _choose(allowed, threads)
    _hold({thread: set(cores) for thread in before})
    try:
        yield cores
    finally:
        _hold({thread: before.get(thread, allowed) for thread in _threads()})


def _choose(allowed: set[int], count: int) -> tuple[int, ...]:
    if count >= len(allowed):
        return tuple(sorted(allowed))
    before = busy_seconds(allowed)
    time.sleep(_LOOK_SECONDS)
    after = busy_seconds(allowed)
    by_load = sorted(allowed, key=lambda core: (after.get(core, 0.0) - before.get(core, 0.0), core))
    siblings = {core: _siblings(core) for core in allowed}
    # The first of each physical core, then the rest: two threads on one share its units.
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


def _hold(places: dict[int, set[int]]) -> None:
    for thread, cores in places.items():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(thread, cores)
