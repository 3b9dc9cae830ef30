from __future__ import annotations

import os
import threading

import pytest

from litdeploy.profiler.machine.cores import pinned

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux pins")


def test_holds_every_thread_and_lets_it_go_again() -> None:
    before = os.sched_getaffinity(0)
    seen: dict[str, set[int]] = {}
    pinned_now, end = threading.Event(), threading.Event()

    def old() -> None:
        pinned_now.wait()
        seen["old"] = os.sched_getaffinity(0)
        end.wait()
        seen["old, after"] = os.sched_getaffinity(0)

    threads = [threading.Thread(target=old)]
    threads[0].start()
    with pinned(1) as cores:
        assert cores is not None
        assert len(cores) == 1
        assert os.sched_getaffinity(0) == set(cores) <= before
        threads.append(threading.Thread(target=lambda: seen.update(new=os.sched_getaffinity(0))))
        threads[1].start()
        threads[1].join()
        pinned_now.set()
    end.set()
    threads[0].join()
    assert os.sched_getaffinity(0) == before
    assert seen["new"] == set(cores)
    assert seen["old, after"] == before


def test_lets_go_when_something_fails() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), pinned(1):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_more_threads_than_cores_take_all() -> None:
    with pinned(10_000) as cores:
        assert cores == tuple(sorted(os.sched_getaffinity(0)))
