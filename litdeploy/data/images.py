"""From encoded images to pixels: one uint8 array of one shape, or a message that names the image at fault."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from litdeploy.data.table import Table
from litdeploy.errors import DataError
from litdeploy.files import read_small

_ROWS_AT_ONCE = 256
_GREY_MODES = {"1", "L", "LA", "La"}
# Pillow would clip them to 8 bits, not scale them.
_DEEP_MODES = ("I", "F")
_ORIENTATION = 0x0112
# Not all that Pillow opens: for some it starts other programs.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM")
_MOST_PIXELS = 2**26
# A larger one would be that much of memory before it is known to be an image.
_MOST_BYTES = 2**29


@dataclass(frozen=True)
class Images:
    """The images of a table as pixels. Plain data, so that it can be sent to a worker process.

    Attributes:
        shape: (channels, height, width) of every image; one channel is grey, three are RGB.
        resize: whether images of another size are resized to it; else they are refused.
    """

    table: Table
    shape: tuple[int, int, int]
    resize: bool

    def decode(self, rows: Sequence[int]) -> Tensor:
        """Pixels of these rows: uint8, (images, channels, height, width), on the CPU.

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
        with ThreadPoolExecutor(os.cpu_count()) as pool:
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

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = zip(rows.tolist(), pool.map(fault, rows.tolist()), strict=True)
            return {row: why for row, why in faults if why is not None}

    def _fitted(self, image: Image.Image, row: int, cell: dict[str, Any]) -> Image.Image:
        channels, height, width = self.shape
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            if channels == 1 and image.mode not in _GREY_MODES:
                raise DataError(
                    f"{self.table.where(row, cell['path'])}: a colour image (mode {image.mode}), and the first "
                    "training image is grey. Save them all in grey, or all in colour."
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


def find_shape(table: Table, image_size: tuple[int, int] | None, skip_bad: int = 0) -> tuple[int, int, int]:
    """(channels, height, width) of a dataset, told by its first image.

    Args:
        image_size: (height, width) that images will be resized to; None for the image's own.
        skip_bad: so many may be undecodable; the first one that is not tells.

    Raises:
        DataError: the image is missing or cannot be decoded.
    """
    [cell] = table.cells([row := 0])
    while True:
        try:
            image = _open(table, row, cell)
            break
        except DataError:
            if row >= min(skip_bad, len(table) - 1):
                raise
            [cell] = table.cells([row := row + 1])
    height, width = image_size or (image.height, image.width)
    return (1 if image.mode in _GREY_MODES else 3), height, width


def _open(table: Table, row: int, cell: dict[str, Any]) -> Image.Image:
    encoded = cell["bytes"]
    if encoded is None:
        encoded = _read(table, row, cell["path"])
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_size(image)
            image.load()
            # A camera held upright writes its pixels lying, and says so here; `datasets` turns them likewise.
            turned = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    except Exception as error:  # Pillow's decoders fail in as many ways as files can be torn
        raise DataError(
            f"{table.where(row, cell['path'])}: cannot be decoded as an image ({error}). Mend or remove it, or "
            "leave such out: --skip-bad 1"
        ) from error
    if turned.mode.startswith(_DEEP_MODES):
        raise DataError(
            f"{table.where(row, cell['path'])}: more than 8 bits a channel (mode {turned.mode}). Save it with 8 bits."
        )
    return turned


def _check_size(image: Image.Image) -> None:
    """Before any of it is decoded: a few bytes of a file can be any number of pixels."""
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(
            f"{image.height:,} × {image.width:,} pixels, and {_MOST_PIXELS:,} are the most that are decoded; make it "
            "smaller"
        )


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _read(table: Table, row: int, path: str | None) -> bytes:
    if not path:
        raise DataError(f"{table.where(row, None)} has no image. Remove such rows.")
    file = Path(path) if table.base is None else table.base / path
    try:
        return read_small(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        beside = f"; paths are relative to {table.base}" if table.base and not Path(path).is_absolute() else ""
        raise DataError(f"{table.where(row, path)}: cannot be read ({_reason(error)}{beside}).") from error
