"""One split as batches: resident in device memory, streamed from worker processes, or mapped from a file.

All give the same batches.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from litdeploy.config.spec import AnyInput
from litdeploy.data.augment import prepared
from litdeploy.errors import DataError
from litdeploy.networks.batch import Batch

if TYPE_CHECKING:
    from litdeploy.data.images import Images

SPLITS = ("train", "validation", "test")


class Split(Protocol):
    """Images and labels of one split.

    Attributes:
        labels: int64, one (of attributes: a row of 0 and 1) a image, on the device, in the order of the split.
    """

    labels: Tensor

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the split, in its order; the last batch may have fewer images.

        Returns:
            (images, labels): uint8 (batch, channels, height, width), or of texts (batch, characters) or int16 or int32
            (batch, tokens), and int64 (batch), on the device. Copies: the caller may write to them.

        Raises:
            DataError: an image that cannot be decoded, or a worker process that died.
        """
        ...

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """The images at these positions of the split, one batch for each tensor of them (int64, on the CPU).

        Raises:
            DataError: as `batches`.
        """
        ...


@dataclass(frozen=True)
class Picked:
    """A batch where it lies: no pixel is copied.

    Attributes:
        source_MCHW: uint8, on the device; not to be written to. Of texts (M, characters), or int16 or int32 (M,
            tokens).
        rows_N: int64, on the device: which of the source's images are the batch.
        labels_N: int64, on the device.
    """

    source_MCHW: Tensor
    rows_N: Tensor
    labels_N: Tensor

    def images(self) -> Tensor:
        """A copy of the batch: uint8 (N, C, H, W), or of texts as they are stored."""
        return self.source_MCHW.index_select(0, self.rows_N)


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """A pass over `count` images in an order drawn at once, in whole batches; what is left over is left out."""
    order = torch.randperm(count, generator=generator)[: count - count % batch_size]
    return torch.split(order, batch_size) if len(order) else ()


def normalised_batches(split: Split, spec: AnyInput, batch_size: int) -> Iterator[tuple[Batch, Tensor]]:
    """(what a network takes, as normalised float32 images (N, C, H, W), labels (N)) of a whole split, in order."""
    first = 0
    for stored, labels in split.batches(batch_size):
        yield prepared(stored, spec, labels, first), labels
        first += len(labels)


class Resident:
    """All images, or texts, in one tensor on the device.

    Args:
        images_MCHW: uint8; of texts as `Picked` has them.
        labels_M: int64, on the same device.
    """

    def __init__(self, images_MCHW: Tensor, labels_M: Tensor) -> None:
        self.labels = labels_M
        self._images_MCHW = images_MCHW

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`."""
        return copies(self, batch_size)

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        if order:
            # Moved whole: one copy a pass, not one a batch.
            everything = torch.cat(list(order)).to(self.labels.device)
            for rows in torch.split(everything, [len(some) for some in order]):
                yield Picked(self._images_MCHW, rows, self.labels.index_select(0, rows))


class Mapped:
    """Read from a tensor in a file that is mapped into memory, batch by batch.

    Args:
        images_MCHW: uint8, mapped.
        rows_N: int64, on the CPU: which of them are the split.
        labels_N: int64, theirs, on the device.
    """

    def __init__(self, images_MCHW: Tensor, rows_N: Tensor, labels_N: Tensor) -> None:
        self.labels = labels_N
        self._images_MCHW = images_MCHW
        self._rows_N = rows_N

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`."""
        return copies(self, batch_size)

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        device = self.labels.device
        for some in order:
            images_NCHW = self._images_MCHW.index_select(0, self._rows_N[some]).to(device)
            labels = self.labels.index_select(0, some.to(device))
            yield Picked(images_NCHW, torch.arange(len(some), device=device), labels)


class _Decoding(Dataset[Any]):
    """What runs in a worker process: positions in the split → pixels."""

    def __init__(self, images: Images, rows: NDArray[np.int64]) -> None:
        self._images = images
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, positions: list[int]) -> Tensor | DataError:
        try:
            return self._images.decode(self._rows[positions].tolist())
        except DataError as error:
            # Given back, not raised: torch would bury the message under the worker's traceback.
            return error


class _Positions:
    """The batch sampler; the batches of the next pass are put into it, so that workers outlive a pass."""

    def __init__(self) -> None:
        self.batches: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Streamed:
    """Decoded anew at each pass, by worker processes.

    Args:
        workers: how many; 0 decodes in this process.
    """

    def __init__(self, images: Images, rows: NDArray[np.int64], device: torch.device, workers: int) -> None:
        self.labels = torch.from_numpy(images.table.labels[rows]).to(device)
        self._decoding = _Decoding(images, rows)
        self._workers = workers
        self._idle: list[tuple[_Positions, DataLoader[Any]]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`."""
        return copies(self, batch_size)

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        # A loader serves one pass at a time; whoever starts a second pass beside the first gets another.
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
        # Not forked: a fork beside threads (torch's, CUDA's) can deadlock, and Python 3.12 warns of it.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        loader = DataLoader(
            self._decoding,
            batch_sampler=positions,
            num_workers=self._workers,
            collate_fn=_as_is,
            pin_memory=self.labels.device.type == "cuda",
            multiprocessing_context=method if self._workers else None,
            persistent_workers=self._workers > 0,
            # Its own: else each pass would take a number from torch's global generator.
            generator=torch.Generator(),
        )
        return positions, loader


def copies(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`Split.batches` by way of `Split.pick`."""
    for picked in split.pick(torch.split(torch.arange(len(split)), batch_size)):
        yield picked.images(), picked.labels_N


def _as_is(batch: Any) -> Any:
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
    cause = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return DataError(
        f"A worker process that decodes images died ({cause}). It may have run out of memory: "
        "use fewer (--workers 0 decodes in this process). In a script of yours, call litdeploy below "
        'if __name__ == "__main__": since workers import the script.'
    )
