"""Out of memory: on the device, which batch would have fitted; on the host, that it was that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from litdeploy.batch import mapped
from litdeploy.errors import TrainingError
from litdeploy.trainer.run import Run, Share
from litdeploy.trainer.step import Step
from litdeploy.trainer.teacher import Teacher

# Of the memory that there is: the allocator cuts it into pieces, and libraries choose faster algorithms where they may.
_USABLE = 0.9

# What torch and the libraries under it say when the host gives no memory; the type is RuntimeError.
_REFUSALS = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "std::bad_alloc", "bad allocation")
# oneDNN's, to the letter: with more behind it, it is of an operation that oneDNN does not have.
_NO_ROOM_FOR_CODE = "could not create a primitive"


def refuses_memory(error: BaseException) -> bool:
    """Whether it is the host that gave no memory."""
    if isinstance(error, MemoryError) or str(error) == _NO_ROOM_FOR_CODE:
        return True
    return any(text in str(error) for text in _REFUSALS)


def out_of_host_memory(tried: int) -> TrainingError:
    """The error for a batch of so many images for which the host had no memory."""
    return TrainingError(
        f"out of memory on this machine with a batch of {tried}. End what else takes memory, or train with a "
        f"smaller batch in a new run: --batch-size {max(2, tried // 2)} --overwrite"
    )


def trial(run: Run, share: Share, step: Step, teacher: Teacher | None) -> Callable[[int], None]:
    """Forward and backward of this rank's part of so many images."""

    def attempt(images: int) -> None:
        images = max(1, images // share.ranks.size)
        inputs = mapped(lambda tensor: tensor.new_zeros(images, *tensor.shape[1:]), run.example)
        labels = run.data.train.labels.new_zeros(images, *run.data.train.labels.shape[1:])
        features = None if teacher is None else teacher.eager(inputs)
        step.losses(inputs, labels, features)["loss"].backward()  # type: ignore[no-untyped-call]

    return attempt


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
