"""Datasets of encoded images (PNG, JPEG, …): decoded to uint8 of one shape, or a message that names the image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import Noun
from litdeploy.data.sources import TableSource, TableStore
from litdeploy.data.split import Split, Streamed
from litdeploy.data.table import find_columns, row_name
from litdeploy.errors import DataError
from litdeploy.files import read_small
from litdeploy.limits import usable_cores

_ROWS_AT_ONCE = 256
_GRAY_MODES = {"1", "L", "LA", "La"}
# Pillow would clip them to 8 bits, not scale them.
_DEEP_MODES = ("I", "F")
_ORIENTATION = 0x0112
# Not all that Pillow opens: for some it starts other programs.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
_MOST_PIXELS = 2**26
# A larger one would be that much of memory before it is known to be an image.
_MOST_BYTES = 2**29


@dataclass(frozen=True)
class ImageTable:
    """One split: encoded images and their labels.

    Attributes:
        source, split: names in messages.
        dataset: a `datasets.Dataset` of the image column alone, not decoded. A worker process maps the same file into
            memory.
        base: folder that relative paths are relative to; None if there is none.
        labels: int64, one index into the classes a row; of attributes 0 or 1 for each (rows, attributes).
    """

    source: str
    split: str
    dataset: Any
    base: Path | None
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def cells(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The encoded images of these rows: `bytes`, or else `path`; both None if a row has no image."""
        [column] = self.dataset.column_names
        return [cell or {"bytes": None, "path": None} for cell in self.dataset[list(rows)][column]]

    def where(self, row: int, path: str | None) -> str:
        """The image's name in a message."""
        return row_name(self.source, self.split, row) + (f", {path}" if path else "")


@dataclass(frozen=True)
class Images:
    """The images of a table as pixels. Plain data, so that it can be sent to a worker process.

    Attributes:
        shape: (channels, height, width) of every image; one channel is gray, three are RGB.
        resize: whether images of another size are resized to it; else they are refused.
    """

    table: ImageTable
    shape: tuple[int, int, int]
    resize: bool

    def decode(self, rows: Sequence[int]) -> Tensor:
        """Pixels of these rows: uint8 (N, channels, height, width), on the CPU.

        Raises:
            DataError: an image is missing, cannot be decoded, or is of another size or kind; names split, row and file.
        """
        channels, height, width = self.shape
        pixels_NHWC = np.empty((len(rows), height, width, channels), np.uint8)
        for slot, (row, cell) in enumerate(zip(rows, self.table.cells(rows), strict=True)):
            image = self._fitted(_open(self.table, row, cell), row, cell)
            pixels_NHWC[slot] = np.asarray(image).reshape(height, width, channels)
        return torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).contiguous()

    def decode_all(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """As `decode`, by all processors at once, into one tensor on the device."""
        images_NCHW = torch.empty((len(rows), *self.shape), dtype=torch.uint8, device=device)

        def fill(start: int) -> None:
            some = rows[start : start + _ROWS_AT_ONCE].tolist()
            images_NCHW[start : start + len(some)] = self.decode(some)

        # Threads suffice: Pillow decodes outside Python's lock.
        with ThreadPoolExecutor(usable_cores()) as pool:
            running = [pool.submit(fill, start) for start in range(0, len(rows), _ROWS_AT_ONCE)]
            try:
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return images_NCHW

    def undecodable(self, rows: NDArray[np.int64]) -> dict[int, str]:
        """Those of the rows that cannot be decoded, and why; all are tried, by all processors at once."""

        def fault(row: int) -> str | None:
            try:
                self.decode([row])
            except DataError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(usable_cores()) as pool:
            faults = zip(rows.tolist(), pool.map(fault, rows.tolist()), strict=True)
            return {row: why for row, why in faults if why is not None}

    def _fitted(self, image: Image.Image, row: int, cell: dict[str, Any]) -> Image.Image:
        channels, height, width = self.shape
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            if channels == 1 and image.mode not in _GRAY_MODES:
                raise DataError(
                    f"{self.table.where(row, cell['path'])}: a color image (mode {image.mode}), and the first "
                    "training image is gray. Save them all in gray, or all in color."
                )
            image = image.convert(mode)
        if image.size != (width, height):
            if not self.resize:
                raise DataError(
                    f"{self.table.where(row, cell['path'])}: {image.height} × {image.width} pixels (height × width), "
                    f"and the first training image has {height} × {width}. Resize them all: "
                    f"--image-size {height},{width}."
                )
            # Pillow's bilinear filter widens with the reduction: it is antialiased.
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return image


def find_shape(table: ImageTable, image_size: tuple[int, int] | None, skip_bad: int = 0) -> tuple[int, int, int]:
    """(channels, height, width) of a dataset, taken from its first image.

    Args:
        image_size: (height, width) that images will be resized to; None: the image's own.
        skip_bad: so many may be undecodable; the first one that can be decoded is taken.

    Raises:
        DataError: the image is missing or cannot be decoded.
    """
    for row in range(len(table)):
        [cell] = table.cells([row])
        try:
            image = _open(table, row, cell)
            break
        except DataError:
            if row >= min(skip_bad, len(table) - 1):
                raise
    height, width = image_size or (image.height, image.width)
    return (1 if image.mode in _GRAY_MODES else 3), height, width


def _open(table: ImageTable, row: int, cell: dict[str, Any]) -> Image.Image:
    encoded = cell["bytes"]
    if encoded is None:
        encoded = _read(table, row, cell["path"])
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_size(image)
            image.load()
            # A camera turned upright stores its pixels sideways, and says so here; `datasets` turns them too.
            turned = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    except Exception as error:  # Pillow's decoders raise any kind of error for a damaged file
        why = "no image of a known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{table.where(row, cell['path'])}: cannot be decoded as an image ({why}). Mend or remove it, or "
            "leave it out: --skip-bad 1"
        ) from error
    if turned.mode.startswith(_DEEP_MODES):
        raise DataError(
            f"{table.where(row, cell['path'])}: more than 8 bits a channel (mode {turned.mode}). Save it with 8 bits."
        )
    return turned


def _check_size(image: Image.Image) -> None:
    """Refuse a huge image before it is decoded: a few bytes of a file can be any number of pixels."""
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(
            f"{image.height:,} × {image.width:,} pixels, and {_MOST_PIXELS:,} are the most that are decoded; make it "
            "smaller"
        )


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _read(table: ImageTable, row: int, path: str | None) -> bytes:
    if not path:
        raise DataError(f"{table.where(row, None)} has no image. Remove the row.")
    file = Path(path) if table.base is None else table.base / path
    try:
        return read_small(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        relative = f"; paths are relative to {table.base}" if table.base and not Path(path).is_absolute() else ""
        raise DataError(f"{table.where(row, path)}: cannot be read ({_reason(error)}{relative}).") from error


class ImageStore(TableStore):
    """The `Store` of a dataset of images. Raises as `TableStore`."""

    noun: Noun = "image"
    value_bytes = 1
    tokens = None

    def __init__(self, source: TableSource, settings: DataSettings) -> None:
        super().__init__(source, find_columns(source.load(source.first), source.name, settings))
        self._image_size = settings.image_size
        self._skip_bad = settings.skip_bad
        self._tables: dict[str, ImageTable] = {}

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """See `Store.shape`; of the first image."""
        return find_shape(self._table(self.source.first), self._image_size, self._skip_bad)

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """See `Store.stored`."""
        return self._images(split).decode_all(rows, device)

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """See `Store.undecodable`."""
        return self._images(split).undecodable(rows)

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """See `Store.streamed`."""
        images = self._images(split)
        return Streamed(images.decode, rows, torch.from_numpy(images.table.labels[rows]).to(device), workers)

    def _images(self, split: str) -> Images:
        return Images(self._table(split), self.shape, resize=self._image_size is not None)

    def _table(self, split: str) -> ImageTable:
        """One split with its labels.

        Raises:
            DataError: its columns or labels are not like those of the first split.
        """
        if split not in self._tables:
            labels = self.labels(split)
            encoded = _encoded(self.source.load(split), self.name, split, self.columns.content)
            self._tables[split] = ImageTable(self.name, split, encoded, self.source.base, labels)
        return self._tables[split]


def _encoded(dataset: Any, source: str, split: str, column: str) -> Any:
    """The column of images alone, not decoded: we decode them, straight into the memory of a batch."""
    import datasets

    encoded = dataset.select_columns([column])
    try:
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
        encoded[:1]  # the cast happens when rows are read
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{source}: column '{column}' of split '{split}' holds {dataset.features[column]}; encoded images (PNG, "
            "JPEG, …) or paths of image files are needed. Name another with --image-column."
        ) from error
    return encoded
