"""A dataset of texts as `datasets` opens it: one byte a character, turned into a network's ids on the device.

Shape suffixes: N texts of a batch, L characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litdeploy.data.augment import FOREIGN
from litdeploy.data.sources import Source
from litdeploy.data.split import SPLITS, Picked, Split, copies
from litdeploy.data.table import Columns, class_names, find_text_columns, read_labels
from litdeploy.errors import DataError
from litdeploy.recipe import DataSettings
from litdeploy.spec import Noun

DEFAULT_LENGTH = 1014
# More in one cell is no text but a mistake: in a CSV file a quote that nothing closes takes in all that follows.
LONGEST = 2**20
_ROWS_AT_ONCE = 1024
_TYPES = ("string", "large_string", "binary", "large_binary")


class Texts:
    """The `Store` of a `Source` of texts. They are cut to one length, and shorter ones padded behind.

    Raises:
        DataError: the split that decides cannot be read, or its columns or labels do not serve.
    """

    noun: Noun = "text"

    def __init__(self, source: Source, settings: DataSettings) -> None:
        self.name = source.name
        self.splits = tuple(source.splits)
        self.test_share = source.test_share
        self.shape = (settings.text_length or DEFAULT_LENGTH,)
        self._source = source
        self._loaded: dict[str, Any] = {}
        self._labels: dict[str, NDArray[np.int64]] = {}
        first = next(split for split in SPLITS if split in source.splits)
        self.columns: Columns = find_text_columns(self._load(first), self.name, settings)
        self.classes = class_names(self._load(first), self.name, first, self.columns, any_numbers=True)

    def fingerprint(self) -> str:
        """See `Store.fingerprint`; of the files as they are, whatever the columns and the length."""
        return self._source.fingerprint()

    def labels(self, split: str) -> NDArray[np.int64]:
        """See `Store.labels`."""
        if split not in self._labels:
            self._labels[split] = read_labels(self._load(split), self.name, split, self.columns, self.classes)
        return self._labels[split]

    def stored(self, split: str, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """See `Store.stored`: uint8 (rows, length)."""
        texts_NL = torch.empty((len(rows), *self.shape), dtype=torch.uint8, device=device)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            texts_NL[start : start + len(some)] = self.read(split, some)
        return texts_NL

    def undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        """See `Store.undecodable`."""
        bad: dict[int, str] = {}
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            try:
                self.read(split, some)
            except DataError:
                bad |= self._undecodable(split, some)
        return bad

    def _undecodable(self, split: str, rows: NDArray[np.int64]) -> dict[int, str]:
        bad = {}
        for row in rows.tolist():
            try:
                self._checked(split, row, self._cell(split, row))
            except DataError as error:
                bad[row] = str(error)
        return bad

    def streamed(self, split: str, rows: NDArray[np.int64], device: torch.device, workers: int) -> Split:
        """See `Store.streamed`; from the memory map of `datasets`, so quickly that workers would not help."""
        return StreamedTexts(self, split, rows, torch.from_numpy(self.labels(split)[rows]).to(device))

    def read(self, split: str, rows: NDArray[np.int64]) -> Tensor:
        """The texts of these rows, one byte a character: uint8 (rows, length), on the CPU, zeros behind the end.

        Raises:
            DataError: a text that is missing, empty, no UTF-8 or as long as none is; names split and row.
        """
        [length] = self.shape
        bytes_NL = np.zeros((len(rows), length), np.uint8)
        for slot, (row, cell) in enumerate(zip(rows.tolist(), self._cells(split, rows), strict=True)):
            text = self._checked(split, row, cell)[:length]
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            bytes_NL[slot, : len(points)] = np.where((points > 0) & (points < FOREIGN), points, FOREIGN)
        return torch.from_numpy(bytes_NL)

    def _cells(self, split: str, rows: NDArray[np.int64]) -> list[Any]:
        column = self._column(split)
        try:
            cells: list[Any] = column[rows.tolist()][self.columns.content]
        except UnicodeDecodeError:  # Arrow does not look at what it is given; Python does
            cells = [self._cell(split, row) for row in rows.tolist()]
        return cells

    def _cell(self, split: str, row: int) -> Any:
        try:
            return self._column(split)[row][self.columns.content]
        except UnicodeDecodeError as error:
            raise self._not_utf8(split, row, error) from None

    def _checked(self, split: str, row: int, cell: Any) -> str:
        where = f"{self.name}: row {row} (counted from 0) of split '{split}'"
        if isinstance(cell, bytes):
            try:
                cell = cell.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self._not_utf8(split, row, error) from None
        if cell is None or not cell.strip():
            raise DataError(f"{where} has no text in column '{self.columns.content}'. Remove such rows.")
        if len(cell) > LONGEST:
            raise DataError(
                f"{where} has a text of {len(cell):,} characters, and {LONGEST:,} are the most. Is a quote in the file "
                "never closed? Mend the row, or cut its text."
            )
        return str(cell)

    def _not_utf8(self, split: str, row: int, error: UnicodeDecodeError) -> DataError:
        return DataError(
            f"{self.name}: row {row} (counted from 0) of split '{split}' holds a text that is not UTF-8 "
            f"({error.reason} at byte {error.start}). Write the file again in UTF-8, or remove such rows."
        )

    def _column(self, split: str) -> Any:
        dataset = self._load(split)
        dtype = str(getattr(dataset.features.get(self.columns.content), "dtype", "nothing"))
        if dtype not in _TYPES:
            raise DataError(
                f"{self.name}: column '{self.columns.content}' of split '{split}' holds {dtype}, and texts are needed. "
                "Name another with --text-column."
            )
        return dataset.select_columns([self.columns.content])

    def _load(self, split: str) -> Any:
        if split not in self._loaded:
            self._loaded[split] = self._source.splits[split]()
        return self._loaded[split]


class StreamedTexts:
    """A split whose texts are read when a batch is asked for."""

    def __init__(self, texts: Texts, split: str, rows: NDArray[np.int64], labels_M: Tensor) -> None:
        self.labels = labels_M
        self._texts, self._split, self._rows = texts, split, rows

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Split.batches`."""
        return copies(self, batch_size)

    def pick(self, order: Sequence[Tensor]) -> Iterator[Picked]:
        """See `Split.pick`."""
        device = self.labels.device
        for some in order:
            texts_NL = self._texts.read(self._split, self._rows[some.numpy()]).to(device)
            labels = self.labels.index_select(0, some.to(device))
            yield Picked(texts_NL, torch.arange(len(some), device=device), labels)
