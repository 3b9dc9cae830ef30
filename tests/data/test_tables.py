from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litdeploy.data.tables import check_table
from litdeploy.errors import DataError

_CSV = b"file,label\n0.png,a\n"


def _packed(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("../../train.csv", _CSV)
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("../../train.csv")
            info.size = len(_CSV)
            tar.addfile(info, io.BytesIO(_CSV))
    else:
        buffer.write(gzip.compress(_CSV))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "gzip"])
@pytest.mark.parametrize("name", ["train.csv", "train.parquet"])
def test_an_archive_under_another_ending_is_not_unpacked(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(_packed(kind))
    with pytest.raises(DataError, match=f"{kind} archive by its content"):
        check_table(tmp_path / name, "data")


def test_a_table_that_is_no_text_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="no text"):
        check_table(tmp_path / "a.csv", "data")


def written(folder: Path, columns: dict[str, pa.Array], **how: object) -> Path:
    pq.write_table(pa.table(columns), folder / "a.parquet", **how)
    return folder / "a.parquet"


def test_a_value_that_stands_in_every_row_is_counted_as_often(tmp_path: Path) -> None:
    values = pa.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), pa.array([bytes(10**5)]))
    image = pa.StructArray.from_arrays([values, values], ["bytes", "path"])
    path = written(tmp_path, {"image": image}, compression="zstd")
    assert path.stat().st_size < 5000
    with pytest.raises(DataError, match="unpacks to"):
        check_table(path, "data")


def test_pages_that_unpack_to_far_more_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litdeploy.data.tables._ALWAYS_ALLOWED", 2**20)
    path = written(tmp_path, {"image": pa.array([bytes(10**7)])}, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="unpacks to"):
        check_table(path, "data")


def test_rows_that_take_no_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litdeploy.data.tables._ALWAYS_ALLOWED", 2**20)
    with pytest.raises(DataError, match="unpacks to"):
        check_table(written(tmp_path, {"label": pa.array(np.zeros(10**6, np.int8))}), "data")


def test_an_honest_table_passes_also_where_its_values_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litdeploy.data.tables._ALWAYS_ALLOWED", 0)
    random = np.random.default_rng(0)
    path = written(tmp_path, {"image": pa.array([random.bytes(1000) for _ in range(500)])})
    check_table(path, "data")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        check_table(path, "data")
