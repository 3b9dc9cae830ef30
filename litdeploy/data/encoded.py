"""A dataset of encoded images (PNG, JPEG, …) as `datasets` opens it, decoded when its pixels are asked for."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, device

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import Noun
from litdeploy.data.images import Images, find_shape
from litdeploy.data.sources import Source
from litdeploy.data.split import SPLITS, Split, Streamed
from litdeploy.data.table import Columns, Table, class_names, find_columns, read_table


class Encoded:
    """The `Store` of a `Source`: which columns serve, the classes and the images' shape are found out here.

    What decides all three is the training images, or where there are none the next split that there is.

    Raises:
        DataError: the split cannot be read, or its columns or labels do not serve.
    """

    noun: Noun = "image"
    value_bytes = 1
    tokens = None

    def __init__(self, source: Source, settings: DataSettings) -> None:
        self.name = source.name
        self.splits = tuple(source.splits)
        self.test_share = source.test_share
        self._source = source
        self._image_size = settings.image_size
        self._skip_bad = settings.skip_bad
        self._loaded: dict[str, Any] = {}
        self._tables: dict[str, Table] = {}
        self._first = next(split for split in SPLITS if split in source.splits)
        first = self._load(self._first)
        self.columns: Columns = find_columns(first, self.name, settings)
        self.classes = class_names(first, self.name, self._first, self.columns)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """See `Store.shape`; told by the first image."""
        return find_shape(self._table(self._first), self._image_size, self._skip_bad)

    def fingerprint(self) -> str:
        """See `Store.fingerprint`; of the files as they are, whatever the columns and the size."""
        return self._source.fingerprint()

    def labels(self, split: str) -> NDArray[np.int64]:
        """See `Store.labels`."""
        return self._table(split).labels

    def stored(self, split: str, rows: NDArray[np.int64], device: device) -> Tensor:
        """See `Store.stored`."""
        return self._images(split).decode_all(rows, device)

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """See `Store.undecodable`."""
        return self._images(split).undecodable(rows)

    def streamed(self, split: str, rows: NDArray[np.int64], device: device, workers: int) -> Split:
        """See `Store.streamed`."""
        return Streamed(self._images(split), rows, device, workers)

    def _images(self, split: str) -> Images:
        return Images(self._table(split), self.shape, resize=self._image_size is not None)

    def _load(self, split: str) -> Any:
        if split not in self._loaded:
            self._loaded[split] = self._source.splits[split]()
        return self._loaded[split]

    def _table(self, split: str) -> Table:
        if split not in self._tables:
            self._tables[split] = read_table(
                self._load(split), self.name, split, self.columns, self.classes, self._source.base
            )
        return self._tables[split]
