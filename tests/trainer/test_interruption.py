from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
import torch

from litdeploy.errors import TrainingError
from litdeploy.trainer import compress
from litdeploy.trainer.interruption import Interruption, largest_batch, out_of_memory, refuses_memory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_waits_and_the_second_does_not(number: signal.Signals) -> None:
    interruption = Interruption()
    before = signal.getsignal(number)
    with interruption.heard(), interruption.held():
        signal.raise_signal(number)
        assert interruption.asked
        assert not interruption.twice
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert interruption.twice
    assert signal.getsignal(number) is before


def test_what_can_be_done_again_is_interrupted_at_once() -> None:
    interruption = Interruption()
    with interruption.heard():
        with interruption.held():
            with pytest.raises(KeyboardInterrupt), interruption.released():
                signal.raise_signal(signal.SIGINT)
            assert not interruption.twice
            with pytest.raises(KeyboardInterrupt), interruption.released():
                raise AssertionError("entered after the wish was uttered")
        assert not interruption.twice


def test_beside_the_main_thread_nothing_is_heard() -> None:
    before = signal.getsignal(signal.SIGINT)
    found = []

    def run() -> None:
        with Interruption().heard():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize(
    ("error", "refuses"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for the convolution forward propagation"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_the_hosts_refusals_are_known(error: Exception, refuses: bool) -> None:
    assert refuses_memory(error) is refuses


def test_the_batch_that_fits_follows_from_two_that_did() -> None:
    # 1,000 bytes, and 10 more an image.
    peaks = {8: 1080, 16: 1160}
    assert largest_batch(peaks, room=10_000, tried=4096) == 800
    assert largest_batch(peaks, room=1_300, tried=4096) == 16
    assert largest_batch(peaks, room=1_230, tried=4096) == 10
    assert largest_batch(peaks, room=1_000, tried=4096) == 0
    assert largest_batch(peaks, room=100_000, tried=1024) == 512
    assert largest_batch({8: 1080}, room=10_000, tried=1024) == 0


@pytest.mark.gpu
def test_out_of_memory_names_a_batch_that_then_fits(teacher_path: Path, tmp_path: Path) -> None:
    settings = {"data": "digits", "student_depth": 8, "epochs": 1, "device": "cuda", "feature_cache": "off"}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(96 * 2**20 / total)
    try:
        with pytest.raises(TrainingError, match=r"batch of 1024.*--batch-size \d+") as told:
            compress(teacher_path, out=tmp_path / "a", batch_size=1024, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= int(str(told.value).split()[-1]) < 1024


def test_without_a_trial_half_the_batch_is_proposed() -> None:
    told = out_of_memory(64, None, torch.device("cuda", 0))
    assert str(told) == "out of memory on cuda:0 with a batch of 64. Give a smaller one: --batch-size 32"
