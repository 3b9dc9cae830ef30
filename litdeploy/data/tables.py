"""Parquet and CSV files of a stranger's, looked at before they are opened: `datasets` unpacks what looks packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litdeploy.errors import DataError

_MOST_TIMES_FILE, _ALWAYS_ALLOWED = 64, 2**30
_ROWS_AT_ONCE = 4096
# A label, and where its image is.
_LEAST_ROW = 8


def check_table(file: Path, name: str) -> None:
    """Holds a table against what its file can hold.

    Args:
        name: of the source, as the user gave it.

    Raises:
        DataError: an archive under another ending, no Parquet, or one that unpacks to far more than it is.
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
        raise DataError(f"{name}: {file.name} is no text, which a CSV file is.")


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096)


def _check_parquet(file: Path, name: str) -> None:
    import pyarrow.parquet as pq

    length = file.stat().st_size
    limit = _MOST_TIMES_FILE * length + _ALWAYS_ALLOWED
    try:
        with pq.ParquetFile(file) as opened:
            told = opened.metadata
            groups = [told.row_group(index) for index in range(told.num_row_groups)]
            columns = [[group.column(index) for index in range(group.num_columns)] for group in groups]
            wrong = [told.num_rows, *(each for group in columns for column in group for each in _counts(column))]
            if min(wrong) < 0 or sum(group.num_rows for group in groups) != told.num_rows:
                raise ValueError("its numbers of rows and bytes do not agree")
            unpacked = sum(column.total_uncompressed_size for group in columns for column in group)
            unpacked = max(unpacked, told.num_rows * _LEAST_ROW)
            if unpacked > limit:
                raise _too_large(file, name, unpacked, length)
            doubtful = {column.path_in_schema for group in columns for column in group if _repeats(column, limit)}
        if doubtful:
            _check_values(file, sorted(doubtful), limit, name)
    except DataError:
        raise
    except Exception as error:  # pyarrow's own have no common base
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{name}: {file.name} cannot be read as parquet ({first[:200]}). Copy it again.") from error


def _counts(column: Any) -> tuple[int, int, int]:
    return column.num_values, column.total_compressed_size, column.total_uncompressed_size


def _repeats(column: Any, limit: int) -> bool:
    """Whether a column could come to more than the limit, as values that are stored once may stand in every row."""
    repeats = column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
    return bool(repeats) and column.num_values * column.total_uncompressed_size > limit


def _check_values(file: Path, columns: list[str], limit: int, name: str) -> None:
    """Adds up how long the values of these columns are, each still stored once."""
    import pyarrow.parquet as pq

    seen = 0
    with pq.ParquetFile(file, read_dictionary=columns) as opened:
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns):
            seen += sum(_written_out(column) for column in batch.columns)
            if seen > limit:
                raise _too_large(file, name, seen, file.stat().st_size)


def _written_out(values: Any) -> int:
    """Bytes of an array with every value in its place."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(values.type):
        return sum(_written_out(each) for each in values.flatten())
    if not pa.types.is_dictionary(values.type):
        return int(values.nbytes)
    return int(pc.sum(pc.binary_length(values.dictionary).take(values.indices)).as_py() or 0)


def _too_large(file: Path, name: str, found: int, length: int) -> DataError:
    return DataError(
        f"{name}: {file.name} has {length:,} bytes and unpacks to {found:,} or more. It is damaged or made up. If it "
        "is right, split it into smaller files, or save it without compression."
    )
