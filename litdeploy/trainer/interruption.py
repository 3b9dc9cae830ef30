"""What ends a run early: Ctrl-C, SIGTERM and SIGHUP, and lack of memory on the device or the host."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch

from litdeploy.data import worker_died
from litdeploy.errors import DataError, InterruptedRun, LitdeployError, TrainingError, interrupting_signals

# Usable share of the free memory: the allocator fragments it, and libraries choose faster algorithms if they can.
_USABLE = 0.9

# Messages of torch and its libraries when the host has no memory left; the type is RuntimeError.
_REFUSALS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc", "bad allocation")
# oneDNN's, exactly: a longer message is about an operation that oneDNN lacks.
_NO_ROOM_FOR_CODE = "could not create a primitive"


class Interruption:
    """The user's wish to stop. The first signal takes effect where no step is half done, the second at once.

    Attributes:
        asked: whether a signal came. Inside `held`, the holder polls it; elsewhere it raises KeyboardInterrupt.
        twice: whether a second one came: the run then neither waits nor writes.
        lacking: whose memory ran out in `stoppable`.
    """

    def __init__(self) -> None:
        self.asked = False
        self.twice = False
        self.lacking: Literal["device", "host"] | None = None
        self._held = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Receive signals while this is open; only in a process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = interrupting_signals()
        before: dict[signal.Signals, Any] = {number: signal.signal(number, self._hear) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Interrupt nothing in here."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def released(self) -> Iterator[None]:
        """Inside `held`: allow an interruption anywhere, for work that can be repeated."""
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


@contextmanager
def resumable(
    interruption: Interruption,
    so_far: Callable[[], str],
    advice: Callable[[], str],
    interrupted: Callable[[], None] | None = None,
    advise: bool = True,
) -> Iterator[None]:
    """Receive signals, and tell the user how to resume after an error.

    Args:
        so_far: how far the run is, for the message of an interruption.
        advice: how to resume it.
        interrupted: called after an interruption, before its error is raised.
        advise: add the advice to other errors, as only the first rank does.

    Raises:
        InterruptedRun: the user stopped the run.
    """
    try:
        try:
            with interruption.heard():
                yield
        except KeyboardInterrupt:
            if interrupted is not None:
                interrupted()
            raise InterruptedRun(f"{so_far()}. {advice()}") from None
    except InterruptedRun:
        raise
    except LitdeployError as error:
        if advise:
            error.add_note(advice())
        raise


@contextmanager
def stoppable(
    interruption: Interruption, stepping: Callable[[], bool], checkpoint: Callable[[], None], alone: bool
) -> Iterator[None]:
    """Write a checkpoint if an epoch is stopped while no step is half done.

    Lack of memory sets `lacking`: an error raised here would keep the failed step's memory in use.

    Args:
        stepping: whether a step is in progress.
        alone: whether no other rank shares the run.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not interruption.twice and not stepping():
            checkpoint()
        raise
    except DataError:
        if alone and not stepping():
            checkpoint()
            if interruption.asked:  # a terminal's Ctrl-C reaches the worker processes too
                raise KeyboardInterrupt from None
        raise
    except torch.OutOfMemoryError:
        interruption.lacking = "device"
    except (MemoryError, RuntimeError) as error:
        # torch reports a dead worker process from a signal handler, which may run in the middle of a step.
        if "DataLoader worker" in str(error):
            if interruption.asked:
                raise KeyboardInterrupt from None
            raise worker_died(error) from error
        if not refuses_memory(error):
            raise
        interruption.lacking = "host"


def refuses_memory(error: BaseException) -> bool:
    """Whether the host ran out of memory."""
    if isinstance(error, MemoryError) or str(error) == _NO_ROOM_FOR_CODE:
        return True
    return any(text in str(error) for text in _REFUSALS)


def out_of_host_memory(tried: int) -> TrainingError:
    """The error for a batch of this many images that did not fit into the host's memory."""
    return TrainingError(
        f"out of memory on this machine with a batch of {tried}. End other programs, or train with a "
        f"smaller batch in a new run: --batch-size {max(2, tried // 2)} --overwrite"
    )


def out_of_memory(tried: int, attempt: Callable[[int], None] | None, device: torch.device) -> TrainingError:
    """The error for a batch that did not fit, with an estimate of one that fits.

    Call it when nothing refers to the failed step any more; its exception does while it is handled.

    Args:
        tried: images.
        attempt: forward and backward of this many images; None if one rank cannot try alone.
        device: a CUDA device.
    """
    if attempt is None:
        return TrainingError(
            f"out of memory on {device} with a batch of {tried}. Give a smaller one: --batch-size {max(2, tried // 2)}"
        )
    peaks = {}
    for images in sorted({max(1, tried // 16), max(2, tried // 8)}):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            attempt(images)
        except torch.OutOfMemoryError:
            break
        peaks[images] = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_allocated(device)
    fits = largest_batch(peaks, room, tried)
    try_this = (
        f"About {fits} would fit: --batch-size {fits}"
        if fits
        else "Not even a few fit: is another process using the device (nvidia-smi)?"
    )
    return TrainingError(f"out of memory on {device} with a batch of {tried}. {try_this}")


def largest_batch(peaks: Mapping[int, int], room: int, tried: int) -> int:
    """The largest batch below the one tried that should fit, by two measured ones; 0: none.

    Memory is modeled as a fixed part and a part proportional to the images.

    Args:
        peaks: images → bytes, for two batches that fit.
        room: bytes.
    """
    if len(peaks) < 2:
        return 0
    (fewer, low), (more, high) = sorted(peaks.items())
    each = max((high - low) / (more - fewer), 1.0)
    images = int((_USABLE * room - (low - fewer * each)) / each)
    # At most half, if the estimate contradicts what was seen.
    images = min(images, tried // 2 if images >= tried else images)
    return max(0, images - images % 8 if images >= 16 else images)
