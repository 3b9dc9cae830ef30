from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from litdeploy import limits

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB free and no limits, whose control groups are below this folder."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def written(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_without_limits_the_machine_decides(machine: Path) -> None:
    assert limits.free_host_memory() == 8 * GIB


def test_a_control_group_of_version_2(machine: Path) -> None:
    (machine / "membership").write_text("0::/user/job\n")
    group = machine / "cgroup/user/job"
    statistics = f"anon 5\ninactive_file {GIB}"
    written(group, memory__max=str(4 * GIB), memory__current=str(3 * GIB), memory__stat=statistics)
    assert limits.free_host_memory() == 2 * GIB
    # The group above may leave less.
    written(machine / "cgroup/user", memory__max=str(5 * GIB), memory__current=str(4 * GIB))
    assert limits.free_host_memory() == GIB
    written(group, memory__max="max")
    written(machine / "cgroup/user", memory__max="max")
    assert limits.free_host_memory() == 8 * GIB


def test_a_control_group_of_version_1(machine: Path) -> None:
    (machine / "membership").write_text("9:memory:/docker/123\n3:cpu,cpuacct:/docker/123\n")
    # In the container, its own group is the root of the hierarchy.
    group = machine / "cgroup/memory"
    written(group, memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes=str(GIB))
    assert limits.free_host_memory() == 2 * GIB
    written(group, memory__limit_in_bytes=str(GIB // 2))
    assert limits.free_host_memory() == 0


def test_the_quota_of_a_container_limits_the_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 16)
    assert limits.usable_cores() == 8
    written(machine / "cgroup", cpu__max="250000 100000")
    assert limits.usable_cores() == 3
    written(machine / "cgroup", cpu__max="max 100000")
    written(machine / "cgroup/cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert limits.usable_cores() == 1
    written(machine / "cgroup/cpu", cpu__cfs_quota_us="-1")
    assert limits.usable_cores() == 8


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
def test_a_limit_of_the_shell() -> None:
    code = "from litdeploy.limits import free_host_memory; print(free_host_memory())"
    command = f"ulimit -v {GIB // 1024}; exec {sys.executable} -c '{code}'"
    free = int(subprocess.run(["sh", "-c", command], capture_output=True, check=True, text=True).stdout)
    assert 0 < free < GIB
