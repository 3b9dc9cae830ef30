"""One split as it is stored: which column holds the images, which the labels, and what the classes are called."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litdeploy.config.recipe import DataSettings
from litdeploy.errors import DataError

_IMAGE_COLUMNS = ("image", "img", "images", "file_name", "filename", "file", "path", "image_path", "filepath", "pixels")
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target", "category", "class_name")
_TEXT_COLUMNS = ("text", "sentence", "content", "review", "review_text", "document", "comment")
_STRINGS = ("string", "large_string")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used: one of images or texts; one of labels, or one for each attribute."""

    content: str
    label: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Encoded images and their labels.

    Attributes:
        source, split: what messages call it.
        dataset: a `datasets.Dataset` of the image column alone, not decoded. In worker processes it is the memory map
            of the same file.
        base: the folder that relative paths are relative to.
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
        """The encoded images of these rows: `bytes`, or else `path`; both None where a row has no image."""
        [column] = self.dataset.column_names
        return [cell or {"bytes": None, "path": None} for cell in self.dataset[list(rows)][column]]

    def where(self, row: int, path: str | None) -> str:
        """What a message calls an image."""
        return f"{self.source}: row {row} (counted from 0) of split '{self.split}'" + (f", {path}" if path else "")


def find_columns(dataset: Any, source: str, settings: DataSettings) -> Columns:
    """Decides which columns hold images and labels: as named, else by type, else by their usual names.

    Raises:
        DataError: a named column is not there, or none, or several, could be meant.
    """
    content = _choose(dataset, source, "image", settings.image_column, "Image", _IMAGE_COLUMNS)
    if settings.attributes is not None:
        return Columns(content, settings.attributes[0], settings.attributes)
    return Columns(content, _choose(dataset, source, "label", settings.label_column, "ClassLabel", _LABEL_COLUMNS))


def holds_texts(dataset: Any, settings: DataSettings) -> bool:
    """Whether a dataset is one of texts: the user names their column, or nothing in it can be an image."""
    if not {settings.text_column, settings.text_length, settings.tokenizer} <= {None}:
        return True
    if settings.image_column is not None or settings.image_size is not None:
        return False
    images = [
        name
        for name, feature in dataset.features.items()
        if name in _IMAGE_COLUMNS or type(feature).__name__ == "Image"
    ]
    return not images and any(name in _TEXT_COLUMNS for name in dataset.column_names)


def find_text_columns(dataset: Any, source: str, settings: DataSettings) -> Columns:
    """Decides which columns hold texts and labels: as named, else by their usual names. Raises as `find_columns`."""
    if settings.image_column is not None or settings.image_size is not None:
        raise DataError(f"{source}: options for images and for texts are given. Leave --image-… or --text-… out.")
    if settings.attributes is not None:
        raise DataError(f"{source}: has texts, and --attributes are of images. Leave it out.")
    return Columns(
        content=_choose(dataset, source, "text", settings.text_column, "", _TEXT_COLUMNS),
        label=_choose(dataset, source, "label", settings.label_column, "ClassLabel", _LABEL_COLUMNS),
    )


def _choose(dataset: Any, source: str, role: str, named: str | None, feature: str, usual_names: tuple[str, ...]) -> str:
    columns = list(dataset.column_names)
    if named is not None:
        if named in columns:
            return named
        raise DataError(
            f"{source}: has no column '{named}'; its columns are {', '.join(columns)}. "
            f"Name the one that holds the {role}s: --{role}-column {columns[0]}."
        )
    typed = [name for name in columns if type(dataset.features[name]).__name__ == feature]
    found = typed if len(typed) == 1 else [name for name in usual_names if name in (typed or columns)]
    # Of several ClassLabels (`fine_label`, `coarse_label`) only an unambiguous name decides.
    if len(found) == 1 or (found and not typed):
        return found[0]
    why = f"{len(typed)} columns hold {role}s ({', '.join(typed)})" if typed else f"no column is known to hold {role}s"
    texts = f" (of texts --text-column {columns[0]})" if role == "image" and not typed else ""
    raise DataError(
        f"{source}: {why}; its columns are {', '.join(columns)}. "
        f"Name the one to use: --{role}-column {(typed or columns)[0]}{texts}."
    )


def class_names(dataset: Any, source: str, split: str, columns: Columns, any_numbers: bool = False) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels; of attributes those that were asked for.

    A `ClassLabel` brings them; strings are sorted; whole numbers are named by themselves.

    Args:
        any_numbers: whether those need not count from 0 without a gap: stars, which reviews have from 1 to 5.

    Raises:
        DataError: labels of another kind, or numbers that do not count from 0 without a gap.
    """
    if columns.attributes:
        _attributes(dataset, source, split, columns.attributes)
        return columns.attributes
    codes, names = _coded(dataset, source, split, columns)
    feature = dataset.features[columns.label]
    if not any_numbers and not hasattr(feature, "names") and feature.dtype not in _STRINGS:
        numbers = tuple(str(number) for number in range(len(names)))
        if names != numbers:
            raise DataError(
                f"{source}: column '{columns.label}' of split '{split}' holds {len(names)} different numbers from "
                f"{names[0]} to {names[-1]}; labels count from 0 without a gap. Renumber them, or write class names."
            )
    if len(names) < 2:
        raise DataError(
            f"{source}: all {len(codes)} labels in column '{columns.label}' of split '{split}' are '{names[0]}'; "
            "at least two classes are needed."
        )
    return names


def read_table(
    dataset: Any, source: str, split: str, columns: Columns, classes: tuple[str, ...], base: Path | None
) -> Table:
    """One split with its labels as indices into `classes`.

    Raises:
        DataError: a column is missing or of the wrong type, or a label is missing or none of the classes.
    """
    import datasets

    labels = read_labels(dataset, source, split, columns, classes)
    encoded = dataset.select_columns([columns.content])
    try:
        # Decoded by us, into memory that is there already.
        encoded = encoded.cast_column(columns.content, datasets.Image(decode=False))
        # The cast comes true when rows are read.
        encoded[:1]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{source}: column '{columns.content}' of split '{split}' holds {dataset.features[columns.content]}; "
            "encoded images (PNG, JPEG, …) or paths of image files are needed. Name another with --image-column."
        ) from error
    return Table(source, split, encoded, base, labels)


def read_labels(dataset: Any, source: str, split: str, columns: Columns, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """The labels of one split as indices into `classes`, or its attributes. Raises as `read_table`."""
    if columns.attributes:
        return _attributes(dataset, source, split, columns.attributes)
    codes, names = _coded(dataset, source, split, columns)
    index = {name: number for number, name in enumerate(classes)}
    to_class = np.array([index.get(name, -1) for name in names], dtype=np.int64)
    labels = to_class[codes]
    if labels.min() < 0:
        row = int(labels.argmin())
        raise DataError(
            f"{source}: row {row} (counted from 0) of split '{split}' has the label '{names[codes[row]]}', which no "
            f"training row has. The {len(classes)} classes: {', '.join(classes[:10])}{' …' * (len(classes) > 10)}."
        )
    return labels


def _attributes(dataset: Any, source: str, split: str, names: tuple[str, ...]) -> NDArray[np.int64]:
    """0 or 1 for each row and attribute; stored as truth values, as 0 and 1 or, as CelebA has them, as −1 and 1."""
    if len(dataset) == 0:
        raise DataError(f"{source}: split '{split}' is empty.")
    found = np.zeros((len(dataset), len(names)), np.int64)
    for place, name in enumerate(names):
        if name not in dataset.column_names:
            near = difflib.get_close_matches(name, dataset.column_names, 1, cutoff=0.0)
            raise DataError(
                f"--attributes {','.join(names)}: {source} has no attribute '{name}' in split '{split}'; its columns "
                f"are {', '.join(dataset.column_names)}. Name columns that it has: --attributes {near[0]}"
            )
        values = dataset.select_columns([name]).with_format("arrow")[:].column(0)
        if values.null_count:
            raise _unlabelled(source, split, values.is_null().to_pylist().index(True))
        dtype = getattr(dataset.features[name], "dtype", "")
        kinds = set(values.unique().to_pylist()) if dtype == "bool" or "int" in dtype else {dtype or "no numbers"}
        if not (kinds <= {False, True} or kinds <= {-1, 1}):
            raise DataError(
                f"--attributes {','.join(names)}: column '{name}' of {source} holds "
                f"{', '.join(map(str, sorted(kinds, key=str)[:4]))}; an attribute is there or not (true and false, 1 "
                "and 0, or 1 and -1). Leave it out."
            )
        found[:, place] = np.array(values.to_pylist(), dtype=np.int64) == 1
    return found


def _coded(dataset: Any, source: str, split: str, columns: Columns) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as indices into the names beside them, whatever their type."""
    for column in (columns.content, columns.label):
        if column not in dataset.column_names:
            raise DataError(
                f"{source}: split '{split}' has no column '{column}'; its columns are "
                f"{', '.join(dataset.column_names)}."
            )
    if len(dataset) == 0:
        raise DataError(f"{source}: split '{split}' is empty.")
    feature = dataset.features[columns.label]
    dtype = str(getattr(feature, "dtype", feature))
    if not (dtype in _STRINGS or dtype.startswith(("int", "uint"))):
        raise DataError(
            f"{source}: column '{columns.label}' of split '{split}' holds {dtype}; class names or whole numbers from 0 "
            "are needed (an empty cell turns a CSV file's whole numbers into float64). Mend it, or name another with "
            "--label-column."
        )
    values = dataset.select_columns([columns.label]).with_format("arrow")[:].column(0)
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise _unlabelled(source, split, row)
    if hasattr(feature, "names"):
        codes = values.to_numpy().astype(np.int64)
        if codes.min() < 0:  # how the hub marks a test split whose labels are kept secret
            raise _unlabelled(source, split, int(codes.argmin()))
        if codes.max() >= len(feature.names):
            raise DataError(
                f"{source}: row {codes.argmax()} (counted from 0) of split '{split}' has the label {codes.max()}, and "
                f"the file names {len(feature.names)} classes, from 0 to {len(feature.names) - 1}. Mend the label, or "
                "remove the row."
            )
        return codes, tuple(feature.names)
    unique, inverse = np.unique(np.array(values.to_pylist()), return_inverse=True)
    return inverse.astype(np.int64), tuple(str(value) for value in unique.tolist())


def _unlabelled(source: str, split: str, row: int) -> DataError:
    return DataError(
        f"{source}: row {row} (counted from 0) of split '{split}' has no label. Remove such rows; a split without "
        "labels can be neither trained nor evaluated on."
    )
