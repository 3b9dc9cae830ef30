from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litdeploy.data import Data
from litdeploy.data.table import check_table
from litdeploy.errors import DataError

Opened = Callable[..., Data]


def write_csv(folder: Path, labels: list[Any], name: str = "train.csv", header: str = "file,label") -> Path:
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    (folder / name).write_text(f"{header}\n{rows}")
    return folder / name


@pytest.fixture
def table(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[..., Path]:
    """Writes train.parquet with these columns; `img` cells are made where only their type is given."""
    import datasets

    def write(columns: dict[str, Any], count: int = 20, name: str = "train.parquet") -> Path:
        cells = [{"bytes": encoded(number), "path": None} for number in range(count)]
        values = {
            column: cells if isinstance(kind, datasets.Image) else [number % 2 for number in range(count)]
            for column, kind in columns.items()
        }
        datasets.Dataset.from_dict(values, features=datasets.Features(columns)).to_parquet(tmp_path / name)
        return tmp_path

    datasets.disable_progress_bars()
    return write


def labels_of(data: Data) -> list[int]:
    return data.test.labels.tolist()


def test_named_classes_keep_their_order(parquet: Callable[..., Path], tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "test.parquet", [0, 2, 1], names=("zebra", "ant", "mole"))
    data = opened(tmp_path)
    assert data.classes == ("zebra", "ant", "mole")
    assert labels_of(data) == [0, 2, 1]


def test_another_order_of_the_same_names_in_the_test_split_is_put_right(
    parquet: Callable[..., Path], tmp_path: Path, opened: Opened
) -> None:
    parquet(tmp_path / "train.parquet", [0, 1] * 4, names=("zebra", "ant"))
    parquet(tmp_path / "test.parquet", [0, 1, 1], names=("ant", "zebra"))
    data = opened(tmp_path)
    assert data.classes == ("zebra", "ant")
    assert labels_of(data) == [1, 0, 0]


def test_strings_become_classes_sorted_by_name_those_of_the_training_images(
    tmp_path: Path, opened: Opened, encoded: Callable[..., bytes]
) -> None:
    (tmp_path / "0.png").write_bytes(encoded(0))
    (tmp_path / "1.png").write_bytes(encoded(0))
    write_csv(tmp_path, ["dog", "cat", "emu", "cat"])
    write_csv(tmp_path, ["emu", "cat"], "test.csv")
    data = opened(tmp_path)
    assert data.classes == ("cat", "dog", "emu")
    assert labels_of(data) == [2, 0]


def test_numbers_are_classes_in_their_order(tmp_path: Path, opened: Opened, encoded: Callable[..., bytes]) -> None:
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encoded(0))
    write_csv(tmp_path, list(range(11, -1, -1)), "test.csv")
    data = opened(tmp_path)
    assert data.classes == tuple(str(number) for number in range(12))
    assert labels_of(data) == list(range(11, -1, -1))


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 2], [-1, 0, 1]])
def test_numbers_that_do_not_count_from_zero_are_refused(tmp_path: Path, opened: Opened, labels: list[int]) -> None:
    write_csv(tmp_path, labels)
    with pytest.raises(DataError, match=f"from {labels[0]} to {labels[-1]}; labels count from 0 without a gap"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.5], "holds float64; class names or whole numbers"),
        ([0, "", 1], "an empty cell turns"),
        (["cat", "", "dog"], r"row 1 \(counted from 0\) of split 'train' has no label"),
        (["cat", "cat"], "at least two classes"),
        ([], "cannot be read|is empty"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, opened: Opened, labels: list[Any], message: str) -> None:
    write_csv(tmp_path, labels)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_a_label_that_no_training_image_has_is_named(tmp_path: Path, opened: Opened) -> None:
    write_csv(tmp_path, ["cat", "dog"])
    write_csv(tmp_path, ["dog", "eel"], "test.csv")
    with pytest.raises(DataError, match=r"row 1 .*split 'test' has the label 'eel'.*The 2 classes: cat, dog\."):
        _ = opened(tmp_path).test


def test_a_split_whose_labels_are_kept_secret_fails_only_when_it_is_used(
    parquet: Callable[..., Path], tmp_path: Path, opened: Opened
) -> None:
    parquet(tmp_path / "train.parquet", [0, 1] * 10)
    parquet(tmp_path / "test.parquet", [0, -1])
    data = opened(tmp_path)
    assert len(data.train) == 18
    with pytest.raises(DataError, match=r"row 1 .*'test' has no label"):
        _ = data.test


def test_a_test_split_without_the_label_column(tmp_path: Path, opened: Opened) -> None:
    write_csv(tmp_path, ["cat", "dog"])
    (tmp_path / "test.csv").write_text("file,id\n0.png,4\n")
    with pytest.raises(DataError, match="split 'test' has no column 'label'; its columns are file, id"):
        _ = opened(tmp_path).test


def test_columns_are_told_by_type_before_name(table: Callable[..., Path], opened: Opened) -> None:
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    path = table({"label": datasets.Value("int64"), "photo": datasets.Image(), "spotted": names})
    data = opened(path)
    assert data.classes == ("no", "yes")
    assert len(data.train) == 16


def test_of_two_named_classes_the_usual_name_decides_or_the_user(table: Callable[..., Path], opened: Opened) -> None:
    import datasets

    fine, coarse = datasets.ClassLabel(names=["cat", "dog"]), datasets.ClassLabel(names=["pet", "beast"])
    path = table({"img": datasets.Image(), "coarse_label": coarse, "fine_label": fine})
    assert opened(path).classes == ("cat", "dog")
    assert opened(path, label_column="coarse_label").classes == ("pet", "beast")


def test_columns_that_nothing_tells_apart(table: Callable[..., Path], opened: Opened) -> None:
    import datasets

    names = datasets.ClassLabel(names=["no", "yes"])
    path = table({"left": datasets.Image(), "right": datasets.Image(), "spotted": names, "striped": names})
    with pytest.raises(DataError, match=r"2 columns hold images \(left, right\).*--image-column left"):
        opened(path)
    with pytest.raises(DataError, match=r"2 columns hold labels \(spotted, striped\).*--label-column spotted"):
        opened(path, image_column="left")
    assert opened(path, image_column="left", label_column="striped").shape == (3, 8, 6)


def test_a_named_column_that_is_not_there(tmp_path: Path, opened: Opened) -> None:
    write_csv(tmp_path, ["cat", "dog"])
    with pytest.raises(DataError, match=r"has no column 'bild'; its columns are file, label.*--image-column file"):
        opened(tmp_path, image_column="bild")


def test_unknown_column_names(tmp_path: Path, opened: Opened) -> None:
    write_csv(tmp_path, ["cat", "dog"], header="bild,art")
    with pytest.raises(DataError, match="no column is known to hold images; its columns are bild, art"):
        opened(tmp_path)
    assert opened(tmp_path, image_column="bild", label_column="art").classes == ("cat", "dog")


def test_an_image_column_of_numbers(table: Callable[..., Path], opened: Opened) -> None:
    import datasets

    path = table({"image": datasets.Value("float32"), "label": datasets.Value("int64")})
    with pytest.raises(DataError, match=r"column 'image' of split 'train' holds .*float32.*--image-column"):
        _ = opened(path).shape


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_encoded_images_without_the_hubs_metadata(
    tmp_path: Path, opened: Opened, encoded: Callable[..., bytes], kind: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells: list[Any] = [encoded(number) for number in range(4)]
    kinds = {"binary": pa.binary(), "large_binary": pa.large_binary()}
    if kind == "struct":
        cells = [{"bytes": cell, "path": None} for cell in cells]
        kinds["struct"] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    labels = pa.array(["a", "b", "a", "b"], pa.large_string())
    pq.write_table(pa.table({"image": pa.array(cells, kinds[kind]), "label": labels}), tmp_path / "test.parquet")
    data = opened(tmp_path)
    assert data.shape == (3, 8, 6)
    assert data.classes == ("a", "b")


def test_paths_in_a_parquet_file(tmp_path: Path, opened: Opened, encoded: Callable[..., bytes]) -> None:
    import pandas

    (tmp_path / "0.png").write_bytes(encoded(0))
    frame = pandas.DataFrame({"path": ["0.png", "0.png"], "label": ["a", "b"]})
    frame.to_parquet(tmp_path / "test.parquet")
    assert opened(tmp_path).shape == (3, 8, 6)


@pytest.mark.parametrize("kind", ["bool", "int64"])
def test_attributes_are_a_column_each(table: Callable[..., Path], opened: Opened, kind: str) -> None:
    import datasets

    columns = {"img": datasets.Image(), "Male": datasets.Value(kind), "Young": datasets.Value(kind)}
    data = opened(table(columns), attributes=("Young", "Male"))
    assert data.classes == ("Young", "Male")
    assert data.test.labels.shape[1] == 2
    assert (data.test.labels[:, 0] == data.test.labels[:, 1]).all()
    assert set(data.train.labels.unique().tolist()) == {0, 1}
    for picked in data.train.pick([data.train.labels.new_tensor([3, 1])]):
        assert picked.labels_N.shape == (2, 2)


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
    monkeypatch.setattr("litdeploy.data.table._ALWAYS_ALLOWED", 2**20)
    path = written(tmp_path, {"image": pa.array([bytes(10**7)])}, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match="unpacks to"):
        check_table(path, "data")


def test_rows_that_take_no_bytes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litdeploy.data.table._ALWAYS_ALLOWED", 2**20)
    with pytest.raises(DataError, match="unpacks to"):
        check_table(written(tmp_path, {"label": pa.array(np.zeros(10**6, np.int8))}), "data")


def test_an_honest_table_passes_also_where_its_values_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litdeploy.data.table._ALWAYS_ALLOWED", 0)
    random = np.random.default_rng(0)
    path = written(tmp_path, {"image": pa.array([random.bytes(1000) for _ in range(500)])})
    check_table(path, "data")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        check_table(path, "data")
