"""A dataset of texts as `datasets` opens it: stored one byte a character, or as the ids of a tokeniser; see `prepared`.

Shape suffixes: N texts of a batch, L characters or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import Noun
from litdeploy.data.augment import FOREIGN
from litdeploy.data.sources import Source
from litdeploy.data.split import SPLITS, Picked, Split, copies
from litdeploy.data.table import Columns, class_names, find_text_columns, read_labels
from litdeploy.data.tokens import Tokens
from litdeploy.errors import DataError

DEFAULT_LENGTH = 1014
# More in one cell is no text but a mistake: in a CSV file a quote that nothing closes takes in all that follows.
LONGEST = 2**20
_ROWS_AT_ONCE = 1024
_TYPES = ("string", "large_string", "binary", "large_binary")


class Encoder(Protocol):
    """Texts → what is stored of them.

    Attributes:
        length: of each; longer texts are cut, and shorter ones padded behind.
        dtype: of what is stored.
    """

    length: int

    @property
    def dtype(self) -> type[np.integer[Any]]: ...

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """(texts, length)."""
        ...


class Characters:
    """One byte a character, 0 behind the end."""

    def __init__(self, length: int | None) -> None:
        self.length = length or DEFAULT_LENGTH
        self.dtype = np.uint8

    def __call__(self, texts: Sequence[str]) -> NDArray[Any]:
        """See `Encoder`."""
        bytes_NL = np.zeros((len(texts), self.length), self.dtype)
        for row, text in zip(bytes_NL, texts, strict=True):
            points = np.frombuffer(text[: self.length].encode("utf-32-le", "surrogatepass"), np.uint32)
            row[: len(points)] = np.where((points > 0) & (points < FOREIGN), points, FOREIGN)
        return bytes_NL


class Texts:
    """The `Store` of a `Source` of texts. They are cut to one length, and shorter ones padded behind.

    Args:
        encoder: what is stored of a text.

    Raises:
        DataError: the split that decides cannot be read, or its columns or labels do not serve.
    """

    noun: Noun = "text"

    def __init__(self, source: Source, settings: DataSettings, encoder: Encoder) -> None:
        self.name = source.name
        self.splits = tuple(source.splits)
        self.test_share = source.test_share
        self.shape = (encoder.length,)
        self.value_bytes = np.dtype(encoder.dtype).itemsize
        self.tokens = encoder if isinstance(encoder, Tokens) else None
        self._encode = encoder
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
        """See `Store.stored`: (rows, length)."""
        kind = torch.from_numpy(np.empty(0, self._encode.dtype)).dtype
        texts_NL = torch.empty((len(rows), *self.shape), dtype=kind, device=device)
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
                self._texts(split, some)
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
        """What is stored of the texts of these rows: (rows, length), on the CPU.

        Raises:
            DataError: a text that is missing, empty, no UTF-8 or as long as none is; names split and row.
        """
        return torch.from_numpy(self._encode(self._texts(split, rows)))

    def _texts(self, split: str, rows: NDArray[np.int64]) -> list[str]:
        cells = zip(rows.tolist(), self._cells(split, rows), strict=True)
        return [self._checked(split, row, cell) for row, cell in cells]

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
