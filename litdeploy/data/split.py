"""One split as batches: in device memory, decoded by worker processes, or read on demand. All give the same batches.

Shape suffixes: N images or texts of a batch, M of the whole source, C channels, H height, W width.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litdeploy.batch import Batch, moved, picked
from litdeploy.config.spec import AnyInput
from litdeploy.data.augment import prepared
from litdeploy.errors import DataError, first_line
from litdeploy.limits import free_host_memory

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Picked:
    """A batch as rows of a larger tensor: no pixel is copied.

    Attributes:
        source_MCHW: uint8, on the device; read-only. Texts are (M, characters), or int16 or int32 (M, tokens); samples
            that the user gave in Python are what the network takes, float32, int64 or several tensors.
        rows_N: int64, on the device: rows of the source that are the batch.
        labels_N: int64, on the device.
    """

    source_MCHW: Batch
    rows_N: Tensor
    labels_N: Tensor

    def images(self) -> Batch:
        """A copy of the batch: uint8 (N, C, H, W), or texts or other samples in their stored form."""
        return picked(self.source_MCHW, self.rows_N)


class Split(ABC):
    """Images or texts of one split, with their labels.

    Attributes:
        labels: int64, one an image (of attributes: a row of 0 and 1), on the device, in the order of the split.
    """

    def __init__(self, labels_N: Tensor) -> None:
        self.labels = labels_N

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """The images at these positions of the split, one batch for each tensor of them (int64, on the CPU).

        Raises:
            DataError: an image cannot be decoded, or a worker process died.
        """

    def batches(self, batch_size: int) -> Iterator[tuple[Batch, Tensor]]:
        """One pass over the split, in its order; the last batch may have fewer images.

        Returns:
            (images, labels): in their stored form (see `Picked`); and int64 (N), on the device. Copies: the caller may
            write to them.

        Raises:
            DataError: as `pick`.
        """
        for some in self.pick(torch.split(torch.arange(len(self)), batch_size)):
            yield some.images(), some.labels_N


class Resident(Split):
    """All images, or texts, in one tensor on the device.

    Args:
        images_MCHW: uint8; texts and other samples as in `Picked`.
        labels_M: int64, on the same device.
    """

    def __init__(self, images_MCHW: Batch, labels_M: Tensor) -> None:
        super().__init__(labels_M)
        self._images_MCHW = images_MCHW

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        if order:
            # Moved whole: one copy a pass, not one a batch.
            everything = torch.cat(list(order)).to(self.labels.device)
            for rows in torch.split(everything, [len(some) for some in order]):
                yield Picked(self._images_MCHW, rows, self.labels.index_select(0, rows))


class OnDemand(Split):
    """Read batch by batch in this process, from a file that is mapped into memory.

    Args:
        read: rows of the source → what is stored of them, on the CPU.
        rows: rows of the source that are the split.
        labels_N: int64, of these rows, on the device.
    """

    def __init__(self, read: Callable[[NDArray[np.int64]], Batch], rows: NDArray[np.int64], labels_N: Tensor) -> None:
        super().__init__(labels_N)
        self._read, self._rows = read, rows

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        device = self.labels.device
        for some in order:
            stored = moved(self._read(self._rows[some.numpy()]), device)
            labels = self.labels.index_select(0, some.to(device))
            yield Picked(stored, torch.arange(len(some), device=device), labels)


class _Decoding(Dataset[Any]):
    """What runs in a worker process: positions in the split → pixels."""

    def __init__(self, decode: Callable[[Sequence[int]], Tensor], rows: NDArray[np.int64]) -> None:
        self._decode = decode
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, positions: list[int]) -> Tensor | DataError:
        try:
            return self._decode(self._rows[positions].tolist())
        except DataError as error:
            # Returned, not raised: torch would bury the message under the worker's traceback.
            return error


class _Positions:
    """The batch sampler. The next pass assigns its batches to it, so that workers outlive a pass."""

    def __init__(self) -> None:
        self.batches: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Streamed(Split):
    """Decoded anew at each pass, by worker processes.

    Args:
        decode: rows of the source → pixels, on the CPU. Sent to the workers by pickle.
        rows: rows of the source that are the split.
        labels_N: int64, of these rows, on the device.
        workers: number of processes; 0 decodes in this one.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], Tensor], rows: NDArray[np.int64], labels_N: Tensor, workers: int
    ) -> None:
        super().__init__(labels_N)
        self._decoding = _Decoding(decode, rows)
        self._workers = workers
        self._idle: list[tuple[_Positions, DataLoader[Any]]] = []

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        # A loader runs one pass at a time; a second pass at the same time gets another.
        positions, loader = self._idle.pop() if self._idle else self._new_loader()
        positions.batches = [some.tolist() for some in order]
        device = self.labels.device
        try:
            for some, images_NCHW in zip(order, _guarded(loader), strict=True):
                rows = torch.arange(len(some), device=device)
                labels = self.labels.index_select(0, some.to(device))
                yield Picked(images_NCHW.to(device, non_blocking=True), rows, labels)
        except GeneratorExit:
            self._idle.append((positions, loader))
            raise
        self._idle.append((positions, loader))

    def _new_loader(self) -> tuple[_Positions, DataLoader[Any]]:
        positions = _Positions()
        # Not forked: a fork while threads run (torch's, CUDA's) can deadlock, and Python 3.12 warns of it.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        loader = DataLoader(
            self._decoding,
            batch_sampler=positions,
            num_workers=self._workers,
            collate_fn=_unchanged,
            pin_memory=self.labels.device.type == "cuda",
            multiprocessing_context=method if self._workers else None,
            persistent_workers=self._workers > 0,
            # Its own: else each pass would take a number from torch's global generator.
            generator=torch.Generator(),
        )
        return positions, loader


def _unchanged(batch: Any) -> Any:
    return batch


def _guarded(loader: DataLoader[Any]) -> Iterator[Tensor]:
    try:
        for images_NCHW in loader:
            if isinstance(images_NCHW, DataError):
                raise images_NCHW
            yield images_NCHW
    # The latter three: it died with a batch on its way to us.
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise worker_died(error) from error


def worker_died(error: BaseException) -> DataError:
    """The error of a pass whose worker process is gone."""
    return DataError(
        f"A worker process that decodes images died ({first_line(error)}). It may have run out of memory: "
        "use fewer (--workers 0 decodes in this process). In your own script, call litdeploy below "
        'if __name__ == "__main__": since workers import the script.'
    )


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Positions for a pass over `count` images in random order, in whole batches; the remainder is left out."""
    order = torch.randperm(count, generator=generator)[: count - count % batch_size]
    return torch.split(order, batch_size) if len(order) else ()


def normalised_batches(split: Split, spec: AnyInput, batch_size: int) -> Iterator[tuple[Batch, Tensor]]:
    """(what a network takes, e.g. float32 images (N, C, H, W), labels (N)) of a whole split, in order."""
    first = 0
    for stored, labels in split.batches(batch_size):
        yield prepared(stored, spec, labels, first), labels
        first += len(labels)


def free_memory(device: torch.device) -> int:
    """Bytes available on the device; on a CPU see `limits.free_host_memory`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()
