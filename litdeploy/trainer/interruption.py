"""Ctrl-C and SIGTERM while a run is under way: the first is obeyed where nothing is half done, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """The user's wish to stop.

    Attributes:
        asked: whether it was uttered. Inside `held`, whoever holds looks at it; elsewhere it is a KeyboardInterrupt.
        twice: whether once more: nothing is waited for, and nothing written any more.
    """

    def __init__(self) -> None:
        self.asked = False
        self.twice = False
        self._held = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals come here as long as this is open. Only a process's main thread can ask for that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is interrupted in here."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside `held`: what may be interrupted anywhere, as it can be done again."""
        before, self._held = self._held, False
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._held = before

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.twice = self.asked
        self.asked = True
        if self.twice or not self._held:
            raise KeyboardInterrupt
