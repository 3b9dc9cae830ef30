from __future__ import annotations

import signal
import threading

import pytest

from litdeploy.trainer.interruption import Interruption


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
