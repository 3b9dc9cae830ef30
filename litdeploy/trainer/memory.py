"""Out of memory on the device: which batch would have fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from litdeploy.errors import TrainingError

# Of the memory that there is: the allocator cuts it into pieces, and libraries choose faster algorithms where they may.
_USABLE = 0.9


def out_of_memory(tried: int, attempt: Callable[[int], None] | None, device: torch.device) -> TrainingError:
    """The error for a batch that did not fit, with the estimate of one that does.

    To be called when nothing holds on to the failed step any more: its exception does, as long as it is handled.

    Args:
        tried: images.
        attempt: forward and backward of so many images; None where they cannot be tried by one rank alone.
        device: a CUDA device.
    """
    if attempt is None:
        return TrainingError(
            f"out of memory on {device} with a batch of {tried} images. Give a smaller one: --batch-size "
            f"{max(2, tried // 2)}"
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
        else "Not even a few images fit: is another process using the device (nvidia-smi)?"
    )
    return TrainingError(f"out of memory on {device} with a batch of {tried} images. {try_this}")


def largest_batch(peaks: Mapping[int, int], room: int, tried: int) -> int:
    """The largest batch, smaller than the one tried, that the measured ones promise to fit; 0: none.

    Memory is a fixed part and a part in proportion to the images.

    Args:
        peaks: images → bytes, of two batches that did fit.
        room: bytes.
    """
    if len(peaks) < 2:
        return 0
    (fewer, low), (more, high) = sorted(peaks.items())
    each = max((high - low) / (more - fewer), 1.0)
    images = int((_USABLE * room - (low - fewer * each)) / each)
    # Half at the most, where the estimate disagrees with what was seen.
    images = min(images, tried // 2 if images >= tried else images)
    return max(0, images - images % 8 if images >= 16 else images)
