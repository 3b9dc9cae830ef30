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
_RESET_PEAK = "5"  # proc(5): sets the process's peak of resident memory to the present value


class MemoryMeter:
    """Adds up the memory that one runner takes while it is opened and run for the first time.

    Memory that the process already had and reuses is not counted, and memory that a library keeps for all runners
    counts for the first of them. On CUDA it is the decrease of the device's free memory, which includes the reserve of
    the backends and the allocations of other processes.

    Attributes:
        peak_bytes: the highest amount at any time; None if the system does not report it (Linux and CUDA do).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept = 0
        self.peak_bytes: int | None = None

    @contextmanager
    def charge(self) -> Iterator[None]:
        """Charge the memory taken in the `with` block to this runner."""
        before = self._used() if self._reset() else None
        yield
        if before is None:
            return
        peak, now = self._peak(), self._used()
        self.peak_bytes = max(self.peak_bytes or 0, self._kept + max(0, peak - before))
        self._kept += max(0, now - before)

    def _reset(self) -> bool:
        """Release free memory, so that taking it again counts. Return whether memory can be measured."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            return True
        with suppress(OSError, AttributeError):  # only glibc has it
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
        # A device reports no peak, but its allocators give nothing back on their own.
        return self._used() if self._device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    return 0 if found is None else 1024 * int(found[1])
