"""How much memory a runner adds: to this process on a CPU, to the device on CUDA."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the process's peak of resident memory to what is resident now


class MemoryMeter:
    """Adds up what one runner takes while it is opened and run for the first time.

    Memory that the process had before and lends to it is not seen, nor is that a library keeps for all runners charged
    to another than the first. On CUDA it is what the device has less of, and so holds what backends keep in reserve;
    what other processes take there meanwhile is in it too.

    Attributes:
        peak_bytes: the most that it had at one time; None where the system does not tell (Linux and CUDA do).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0
        self.peak_bytes: int | None = None

    @contextmanager
    def adding(self) -> Iterator[None]:
        """While it is open, what is taken counts to this runner."""
        before = self._used() if self._reset() else None
        yield
        if before is None:
            return
        peak, now = self._peak(), self._used()
        self.peak_bytes = max(self.peak_bytes or 0, self._held + max(0, peak - before))
        self._held += max(0, now - before)

    def _reset(self) -> bool:
        """Gives back what is free, so that it is seen when it is taken again. Whether memory can be measured."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            return True
        with suppress(OSError, AttributeError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            return False
        return True

    def _used(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            free, total = torch.cuda.mem_get_info(self._device)
            return int(total - free)
        return _status("VmRSS")

    def _peak(self) -> int:
        # A device tells of no peak, but its allocators give nothing back by themselves.
        return self._used() if self._device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return 0 if found is None else 1024 * int(found[1])
