from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.data import Data
from litdeploy.errors import DataError, DependencyError

Opened = Callable[..., Data]
Parquet = Callable[..., Path]
TRAIN, TEST, VALIDATION = [0, 1] * 10, [1, 0, 0], [0, 1]


@pytest.fixture
def classes(encoded: Callable[..., bytes]) -> Callable[..., None]:
    """Writes `count` images into each of these class folders."""

    def write(root: Path, *names: str, count: int = 5) -> None:
        for name in names:
            (root / name).mkdir(parents=True)
            for number in range(count):
                (root / name / f"{number}.png").write_bytes(encoded(number + 100 * len(name)))

    return write


def counts(data: Data) -> dict[str, int]:
    return data.record().images


def test_digits(opened: Opened) -> None:
    from sklearn.datasets import load_digits

    data = opened("digits")
    assert data.classes == tuple("0123456789")
    assert data.shape == (1, 8, 8)
    assert counts(data) == {"train": 1368, "validation": 70, "test": 359}
    assert data.record().test_is_held_out
    every = torch.cat([next(split.batches(2000))[0] for split in (data.train, data.validation, data.test)])
    # 0–16 spread over 0–255, so that the mean tells whether each value was scaled.
    assert every.double().mean() == pytest.approx(load_digits().images.mean() * 255 / 16, abs=0.1)
    assert (every.min(), every.max()) == (0, 255)


def test_a_single_file_is_the_split_that_its_name_says(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    assert counts(opened(parquet(tmp_path / "pets.parquet", TRAIN))) == {"train": 16, "validation": 2, "test": 2}
    assert counts(opened(parquet(tmp_path / "pets_test.parquet", TRAIN))) == {"test": 20}


@pytest.mark.parametrize("inside", [".", "data", "plain_text"])
def test_the_hubs_layout(parquet: Parquet, tmp_path: Path, opened: Opened, inside: str) -> None:
    parquet(tmp_path / inside / "train-00000-of-00002.parquet", TRAIN)
    parquet(tmp_path / inside / "train-00001-of-00002.parquet", TRAIN, first=50)
    parquet(tmp_path / inside / "test-00000-of-00001.parquet", TEST)
    parquet(tmp_path / inside / "validation-00000-of-00001.parquet", VALIDATION)
    data = opened(tmp_path)
    assert counts(data) == {"train": 40, "validation": 2, "test": 3}
    assert data.test.labels.tolist() == TEST
    assert data.source == str(tmp_path)


def test_a_folder_with_odd_characters(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "run[1] *" / "test.parquet", TEST)
    assert opened(tmp_path / "run[1] *").test.labels.tolist() == TEST


def test_csv_files_of_splits(tmp_path: Path, opened: Opened, classes: Callable[..., None]) -> None:
    classes(tmp_path / "images", "a")
    for split, labels in (("train", TRAIN), ("val", VALIDATION), ("test", TEST)):
        rows = "".join(f"images/a/{number % 5}.png,{label}\n" for number, label in enumerate(labels))
        (tmp_path / f"{split}.csv").write_text("file_name,label\n" + rows)
    data = opened(tmp_path)
    assert counts(data) == {"train": 20, "validation": 2, "test": 3}
    assert len(next(data.train.batches(100))[0]) == 20


def test_class_folders_without_splits(tmp_path: Path, opened: Opened, classes: Callable[..., None]) -> None:
    classes(tmp_path, "dog", "ant", "zebra", count=10)
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = opened(tmp_path)
    assert data.classes == ("ant", "dog", "zebra")
    assert counts(data) == {"train": 24, "validation": 3, "test": 3}


def test_class_folders_in_splits(
    tmp_path: Path, opened: Opened, classes: Callable[..., None], encoded: Callable[..., bytes]
) -> None:
    classes(tmp_path / "train", "dog", "ant")
    classes(tmp_path / "val", "dog", count=2)
    classes(tmp_path / "test", "dog", "ant", count=3)
    data = opened(tmp_path)
    assert data.classes == ("ant", "dog")
    assert counts(data) == {"train": 10, "validation": 2, "test": 6}
    images, labels = next(data.validation.batches(10))
    assert labels.tolist() == [1, 1]
    assert images.shape == (2, 3, 8, 6)


def test_a_table_beside_class_folders_is_ambiguous(
    tmp_path: Path, opened: Opened, classes: Callable[..., None]
) -> None:
    classes(tmp_path, "dog", "ant")
    (tmp_path / "labels.csv").write_text("file,label\ndog/0.png,x\nant/0.png,y\n")
    with pytest.raises(DataError, match=r"holds labels\.csv and folders of images \(ant, dog\).*--data .*labels\.csv"):
        opened(tmp_path)
    assert opened(tmp_path / "labels.csv").classes == ("x", "y")


def test_a_table_of_metadata_over_folders_of_splits(
    tmp_path: Path, opened: Opened, classes: Callable[..., None]
) -> None:
    classes(tmp_path, "train", "test")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/0.png,x\ntrain/1.png,y\n")
    assert opened(tmp_path).classes == ("x", "y")


def test_several_folders_of_tables(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "small" / "test.parquet", TEST)
    parquet(tmp_path / "large" / "test.parquet", TEST)
    with pytest.raises(DataError, match=r"several folders of tables \(large, small\).*--data .*large"):
        opened(tmp_path)


def test_paths_that_hold_nothing(tmp_path: Path, opened: Opened) -> None:
    with pytest.raises(DataError, match=r"no images or texts found in this folder.*a folder of class folders"):
        opened(tmp_path)
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"a \.md file\. What is taken: a \.parquet, \.csv or \.jsonl file"):
        opened(tmp_path / "notes.md")
    with pytest.raises(DataError, match=r"No dataset is named\. Give one with --data"):
        opened(None)


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing", "~/nothing", "nothing.parquet", "a/b/c", "here/nothing", "a b"]
)
def test_what_looks_like_a_path_is_not_sought_at_the_hub(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(DataError, match=r"no such file or folder \(looked at /"):
        opened(name)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Stands in for the network: `load_dataset` gives, or raises, this for an id."""
    import datasets

    def load_dataset(name: str) -> Any:
        assert name == "somebody/pets"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def hub_splits(parquet: Parquet, folder: Path, **splits: list[int]) -> Any:
    """What `load_dataset` gives for an id, made from files in the hub's layout."""
    import datasets

    files = {split: str(parquet(folder / f"{split}.parquet", labels)) for split, labels in splits.items()}
    return datasets.load_dataset("parquet", data_files=files)


def test_a_dataset_of_the_hub(
    parquet: Parquet, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = hub_splits(parquet, tmp_path, train=TRAIN, test_hard=VALIDATION, test=TEST, extra=TRAIN)
    hub(monkeypatch, loaded)
    data = opened("somebody/pets")
    assert counts(data) == {"train": 18, "validation": 2, "test": 3}
    assert next(data.test.batches(10))[0].shape == (3, 3, 8, 6)
    first = data.record().fingerprint
    assert opened("somebody/pets").record().fingerprint == first
    del loaded["test"]
    assert opened("somebody/pets").record().fingerprint != first


def test_a_dataset_of_the_hub_with_strange_splits(
    parquet: Parquet, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = hub_splits(parquet, tmp_path, full=TRAIN)
    hub(monkeypatch, loaded)
    assert counts(opened("somebody/pets"))["train"] == 16
    hub(monkeypatch, {"left": loaded["full"], "right": loaded["full"]})
    with pytest.raises(DataError, match="its splits are left, right; train, validation and test are looked for"):
        opened("somebody/pets")


def test_faults_of_the_hub(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub(monkeypatch, ConnectionError("Couldn't reach 'somebody/pets' on the Hub (LocalEntryNotFoundError)"))
    with pytest.raises(DataError, match=r"no file or folder of this name is here, and .* cannot be reached \(Couldn't"):
        opened("somebody/pets")
    hub(monkeypatch, datasets.exceptions.DatasetNotFoundError("Dataset 'somebody/pets' doesn't exist on the Hub"))
    with pytest.raises(DataError, match="no file or folder of this name is here, and the Hugging Face hub has no such"):
        opened("somebody/pets")
    hub(monkeypatch, ValueError("Config name is missing.\nPlease pick one"))
    with pytest.raises(DataError, match=r"cannot be opened by its id alone \(Config name is missing\)\. Save it as"):
        opened("somebody/pets")


def test_a_torn_table_is_named(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    file = parquet(tmp_path / "train.parquet", TRAIN)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as parquet \("):
        opened(tmp_path)


def test_the_fingerprint_is_of_names_and_contents(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    def fingerprint(folder: Path) -> str:
        return opened(folder).record().fingerprint

    one, other = tmp_path / "one", tmp_path / "other"
    parquet(one / "train.parquet", TRAIN)
    file = parquet(one / "test.parquet", TEST)
    shutil.copytree(one, other)
    first = fingerprint(one)
    assert len(first) == 64
    assert fingerprint(other) == first
    parquet(file, TEST, first=7)
    assert fingerprint(one) != first
    (other / "test.parquet").rename(other / "test-2.parquet")
    assert fingerprint(other) != first


def test_the_fingerprint_of_class_folders(
    tmp_path: Path, opened: Opened, classes: Callable[..., None], encoded: Callable[..., bytes]
) -> None:
    classes(tmp_path, "dog", "ant")
    first = opened(tmp_path).record().fingerprint
    (tmp_path / "dog" / "3.png").write_bytes(encoded(77))
    assert opened(tmp_path).record().fingerprint != first


def test_a_folder_that_may_not_be_written(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    before = parquet(tmp_path / "set" / "test.parquet", TEST)
    counts(opened(tmp_path / "set"))
    assert list((tmp_path / "set").iterdir()) == [before]


@pytest.mark.parametrize("source", ["digits", "uoft-cs/cifar10"])
def test_without_the_library_it_says_what_to_install(
    opened: Opened, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"pip install datasets; or give a file that `litdeploy data pack`"):
        opened(source)
