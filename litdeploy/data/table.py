"""Tables from strangers: what their files may hold, which column is which, and the labels.

Files are checked before they are opened: `datasets` unpacks whatever looks packed.
"""

from __future__ import annotations

import codecs
import difflib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from litdeploy.config.recipe import DataSettings
from litdeploy.errors import DataError, first_line
from litdeploy.files import open_regular

_MOST_TIMES_FILE, _ALWAYS_ALLOWED = 64, 2**30
_ROWS_AT_ONCE = 4096
# Bytes of a row: a label, and where its image is.
_LEAST_ROW = 8
_IMAGE_COLUMNS = ("image", "img", "images", "file_name", "filename", "file", "path", "image_path", "filepath", "pixels")
_LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "target", "category", "class_name")
_TEXT_COLUMNS = ("text", "sentence", "content", "review", "review_text", "document", "comment")
_STRINGS = ("string", "large_string")
# A longer text is not one but a mistake: in a CSV file a quote that nothing closes takes in all that follows.
LONGEST = 2**20
# Bytes of the longest character in UTF-8.
_WIDEST = 4
TEXT_KIND = ".txt"


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used: one of images or texts; one of labels, or one for each attribute.

    Attributes:
        label: None if the dataset has no labels, or they are not used.
    """

    content: str
    label: str | None
    attributes: tuple[str, ...] = ()


def check_table(file: Path, name: str) -> None:
    """Check a table file before it is opened.

    Args:
        name: of the source, as the user gave it.

    Raises:
        DataError: an archive under another ending, not Parquet, or Parquet that unpacks to far more than the file.
    """
    from datasets.utils.extract import Extractor

    packed = Extractor.infer_extractor_format(file)
    if packed:
        raise DataError(
            f"{name}: {file.name} is a {packed} archive by its content. Unpack it, and give what was in it."
        )
    if file.suffix.lower() == ".parquet":
        _check_parquet(file, name)
    elif b"\0" in _start(file):
        kind = file.suffix.lower().removeprefix(".").upper()
        what = "a text file" if file.suffix.lower() == TEXT_KIND else f"a {kind} file"
        raise DataError(f"{name}: {file.name} is no text (it holds NUL bytes), and {what} is. Write it in UTF-8.")


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096)


def _check_parquet(file: Path, name: str) -> None:
    import pyarrow.parquet as pq

    length = file.stat().st_size
    limit = _MOST_TIMES_FILE * length + _ALWAYS_ALLOWED
    try:
        with pq.ParquetFile(file) as opened:
            metadata = opened.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            columns = [[group.column(index) for index in range(group.num_columns)] for group in groups]
            counts = [metadata.num_rows, *(each for group in columns for column in group for each in _counts(column))]
            if min(counts) < 0 or sum(group.num_rows for group in groups) != metadata.num_rows:
                raise ValueError("its numbers of rows and bytes do not agree")
            unpacked = sum(column.total_uncompressed_size for group in columns for column in group)
            unpacked = max(unpacked, metadata.num_rows * _LEAST_ROW)
            if unpacked > limit:
                raise _too_large(file, name, unpacked, length)
            doubtful = {column.path_in_schema for group in columns for column in group if _repeats(column, limit)}
        if doubtful:
            _check_values(file, sorted(doubtful), limit, name)
    except DataError:
        raise
    except Exception as error:  # pyarrow's own have no common base
        raise DataError(
            f"{name}: {file.name} cannot be read as parquet ({first_line(error)}). Copy it again."
        ) from error


def _counts(column: Any) -> tuple[int, int, int]:
    return column.num_values, column.total_compressed_size, column.total_uncompressed_size


def _repeats(column: Any, limit: int) -> bool:
    """Whether a column could come to more than the limit, as values that are stored once may stand in every row."""
    repeats = column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
    return bool(repeats) and column.num_values * column.total_uncompressed_size > limit


def _check_values(file: Path, columns: list[str], limit: int, name: str) -> None:
    """Add up the lengths of these columns' values, each still stored once."""
    import pyarrow.parquet as pq

    seen = 0
    with pq.ParquetFile(file, read_dictionary=columns) as opened:
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns):
            seen += sum(_written_out(column) for column in batch.columns)
            if seen > limit:
                raise _too_large(file, name, seen, file.stat().st_size)


def _written_out(values: Any) -> int:
    """Bytes of an array with every value written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(values.type):
        return sum(_written_out(each) for each in values.flatten())
    if not pa.types.is_dictionary(values.type):
        return int(values.nbytes)
    return int(pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0)


def _too_large(file: Path, name: str, found: int, length: int) -> DataError:
    return DataError(
        f"{name}: {file.name} has {length:,} bytes and unpacks to {found:,} or more. It is damaged or forged. If it "
        "is right, split it into smaller files, or save it without compression."
    )


def read_lines(file: Path, name: str, most: int) -> Any:
    """The lines of a text file that are not blank, as a table (`pyarrow.Table`) with the binary column `text`.

    Args:
        name: of the source, as the user gave it.
        most: bytes that the file may have: its texts are held in memory.

    Raises:
        DataError: it cannot be read, is larger, has no text or an absurdly long line.
    """
    import pyarrow as pa

    lines = []
    try:
        with open_regular(file) as stream:
            if file.stat().st_size > most:
                raise DataError(
                    f"{name}: {file.name} has {file.stat().st_size / 1e9:.1f} GB, and a text file is read into memory, "
                    f"of which {most / 1e9:.1f} GB are free for it. Save it as Parquet, which is not."
                )
            for number, line in enumerate(iter(partial(stream.readline, _WIDEST * LONGEST + 2), b""), start=1):
                if len(line) > _WIDEST * LONGEST:
                    raise DataError(
                        f"{name}: line {number} of {file.name} is longer than {LONGEST:,} characters, the most of a "
                        "text. A text file has a text a line: break it into lines."
                    )
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    lines.append(text.rstrip(b"\r\n"))
    except OSError as error:
        raise DataError(f"{name}: {file.name} cannot be read ({error.strerror}).") from None
    if not lines:
        raise DataError(f"{name}: {file.name} has no text in it. Give a file with a text a line.")
    return pa.table({"text": pa.array(lines, pa.large_binary())})


def row_name(source: str, split: str, row: int) -> str:
    """What messages call a row."""
    return f"{source}: row {row} (counted from 0) of split '{split}'"


def find_columns(dataset: Any, source: str, settings: DataSettings) -> Columns:
    """Decide which columns hold images and labels: as named, else by type, else by their usual names.

    Raises:
        DataError: a named column is missing, or no column or several could be meant.
    """
    content = _choose(dataset, source, "image", settings.image_column, "Image", _IMAGE_COLUMNS)
    if settings.attributes is not None:
        return Columns(content, settings.attributes[0], settings.attributes)
    return Columns(content, _label_column(dataset, source, settings, content))


def _label_column(dataset: Any, source: str, settings: DataSettings, content: str) -> str | None:
    """The column of labels; None if they are not to be used, or if no other column can be one."""
    others = {name for name in dataset.column_names if name != content and _may_be_labels(dataset.features[name])}
    others |= {name for name in dataset.column_names if name in _LABEL_COLUMNS}
    if settings.labels == "none" or (settings.label_column is None and not others):
        return None
    return _choose(dataset, source, "label", settings.label_column, "ClassLabel", _LABEL_COLUMNS)


def _may_be_labels(feature: Any) -> bool:
    """Whether a column of this type can hold labels: class names or whole numbers."""
    return str(getattr(feature, "dtype", "")) in (*_STRINGS, "bool") or _is_whole(feature)


def _is_whole(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


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
    """Decide which columns hold texts and labels: as named, else by their usual names. Raises as `find_columns`."""
    if settings.image_column is not None or settings.image_size is not None:
        raise DataError(f"{source}: options for images and for texts are given. Leave --image-… or --text-… out.")
    if settings.attributes is not None:
        raise DataError(f"{source}: has texts, and --attributes are of images. Leave it out.")
    content = _choose(dataset, source, "text", settings.text_column, "", _TEXT_COLUMNS)
    return Columns(content, _label_column(dataset, source, settings, content))


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
    without = ", or use the data without labels: --labels none" if role == "label" else ""
    raise DataError(
        f"{source}: {why}; its columns are {', '.join(columns)}. "
        f"Name the one to use: --{role}-column {(typed or columns)[0]}{texts}{without}."
    )


def class_names(dataset: Any, source: str, split: str, columns: Columns, any_numbers: bool = False) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels; of attributes the requested ones; none without labels.

    A `ClassLabel` has them; strings are sorted; whole numbers are their own names.

    Args:
        any_numbers: whether whole numbers may start anywhere and have gaps, such as stars from 1 to 5.

    Raises:
        DataError: labels of another kind, or numbers that do not count from 0 without a gap.
    """
    if columns.attributes:
        _attributes(dataset, source, split, columns.attributes)
        return columns.attributes
    if columns.label is None:
        _check_columns(dataset, source, split, columns)
        return ()
    codes, names = _coded(dataset, source, split, columns, columns.label)
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
            "at least two classes are needed. Or use the data without labels: --labels none"
        )
    return names


def read_labels(dataset: Any, source: str, split: str, columns: Columns, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """The labels of one split as indices into `classes`, or its attributes; −1 for each row without labels.

    Raises:
        DataError: a column is missing or of the wrong type, or a label is missing or not one of the classes.
    """
    if columns.attributes:
        return _attributes(dataset, source, split, columns.attributes)
    if columns.label is None:
        _check_columns(dataset, source, split, columns)
        return np.full(len(dataset), -1, np.int64)
    codes, names = _coded(dataset, source, split, columns, columns.label)
    index = {name: number for number, name in enumerate(classes)}
    to_class = np.array([index.get(name, -1) for name in names], dtype=np.int64)
    labels = to_class[codes]
    if labels.min() < 0:
        row = int(labels.argmin())
        raise DataError(
            f"{row_name(source, split, row)} has the label '{names[codes[row]]}', which no training row has. "
            f"The {len(classes)} classes: {', '.join(classes[:10])}{' …' * (len(classes) > 10)}."
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
            raise _unlabeled(source, split, values.is_null().to_pylist().index(True))
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


def _check_columns(dataset: Any, source: str, split: str, columns: Columns) -> None:
    """Check that a split has rows, and the columns that are used."""
    for column in (columns.content, columns.label):
        if column is not None and column not in dataset.column_names:
            raise DataError(
                f"{source}: split '{split}' has no column '{column}'; its columns are "
                f"{', '.join(dataset.column_names)}."
            )
    if len(dataset) == 0:
        raise DataError(f"{source}: split '{split}' is empty.")


def _coded(
    dataset: Any, source: str, split: str, columns: Columns, label: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """(indices, names): labels of any type as indices into their names."""
    _check_columns(dataset, source, split, columns)
    feature = dataset.features[label]
    dtype = str(getattr(feature, "dtype", feature))
    if not (dtype in _STRINGS or _is_whole(feature)):
        raise DataError(
            f"{source}: column '{label}' of split '{split}' holds {dtype}; class names or whole numbers from 0 "
            "are needed (an empty cell turns a CSV file's whole numbers into float64). Mend it, or name another with "
            "--label-column."
        )
    values = dataset.select_columns([label]).with_format("arrow")[:].column(0)
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise _unlabeled(source, split, row)
    if hasattr(feature, "names"):
        codes = values.to_numpy().astype(np.int64)
        if codes.min() < 0:  # how the hub marks a test split whose labels are kept secret
            raise _unlabeled(source, split, int(codes.argmin()))
        if codes.max() >= len(feature.names):
            raise DataError(
                f"{row_name(source, split, int(codes.argmax()))} has the label {codes.max()}, and "
                f"the file names {len(feature.names)} classes, from 0 to {len(feature.names) - 1}. Mend the label, or "
                "remove the row."
            )
        return codes, tuple(feature.names)
    unique, inverse = np.unique(np.array(values.to_pylist()), return_inverse=True)
    return inverse.astype(np.int64), tuple(str(value) for value in unique.tolist())


def _unlabeled(source: str, split: str, row: int) -> DataError:
    return DataError(
        f"{row_name(source, split, row)} has no label. Remove the row, or use the whole dataset without labels: "
        "--labels none"
    )
