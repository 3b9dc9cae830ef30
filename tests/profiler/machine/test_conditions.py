from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from litdeploy.profiler.machine import system
from litdeploy.profiler.machine.conditions import Watch
from litdeploy.profiler.machine.pinning import pinned
from litdeploy.profiler.schema import Conditions

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_other_work_on_the_same_core_is_seen() -> None:
    """A child spins on the core that this process is held to and sleeps on."""
    with pinned(1) as cores:
        assert cores is not None
        child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            with Watch(CPU) as watch:
                time.sleep(0.6)
        finally:
            child.kill()
            child.communicate()
    seen = watch.conditions
    assert seen.cores == cores
    assert seen.seconds >= 0.6
    assert seen.other_load is not None
    assert seen.machine_load is not None
    # The core is never idle; what this process has of it is little.
    assert seen.other_load > 0.5
    assert seen.machine_load >= 0.9 * seen.other_load


@linux
def test_own_work_is_no_other_load() -> None:
    with pinned(1), Watch(CPU) as watch:
        until = time.process_time() + 0.4
        while time.process_time() < until:
            watch.look()
    seen = watch.conditions
    assert seen.other_load is not None
    # All that the core did, less what this process did of it.
    assert seen.other_load <= 1.1 - 0.4 / seen.seconds
    assert seen.preemptions is not None
    assert seen.gpu is None


@pytest.mark.parametrize(
    ("waiting", "cpu", "contended"),
    [
        (0.0, 2.0, False),  # nothing but work
        (1.0, 0.9, True),  # half of it work, half of it waiting
        (0.9, 0.0, False),  # asleep for the rest
        (None, 1.0, False),
    ],
)
def test_contended_is_waiting_and_work_alone(waiting: float | None, cpu: float, contended: bool) -> None:
    assert Conditions(seconds=2.0, waiting_seconds=waiting, cpu_seconds=cpu).contended == contended


def test_too_short_to_tell() -> None:
    with Watch(CPU) as watch:
        pass
    assert watch.conditions.other_load is None
    assert watch.conditions.stolen is None


@linux
def test_what_the_system_tells() -> None:
    cores = os.sched_getaffinity(0)
    assert cores <= system.all_cores()
    assert set(system.busy_seconds(cores)) == cores
    assert system.stolen_seconds(cores) is not None
    assert all(mhz > 100 for mhz in system.clocks_mhz(cores))
