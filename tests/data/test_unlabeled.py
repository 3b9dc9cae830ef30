"""Data without labels, from every kind of source."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from litdeploy.config.recipe import DataSettings
from litdeploy.config.spec import CharacterInput, InputSpec, NetworkSpec, TranslationInput
from litdeploy.data import Data, check_against, pack
from litdeploy.data.table import LONGEST
from litdeploy.errors import DataError, SettingsError

Opened = Callable[..., Data]
Encoded = Callable[..., bytes]
Parquet = Callable[..., Path]
LINES = [f"text number {number}" for number in range(40)]


@pytest.fixture
def images(encoded: Encoded) -> Callable[..., Path]:
    """Writes `count` different images into a folder."""

    def write(folder: Path, count: int = 20, first: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            (folder / f"{number:03}.png").write_bytes(encoded(number))
        return folder

    return write


def counts(data: Data) -> dict[str, int]:
    return data.record().images


def check_unlabeled(data: Data, images: dict[str, int]) -> None:
    assert not data.labeled
    assert not data.record().labeled
    assert data.classes == ()
    assert counts(data) == images
    for split in images:
        labels = getattr(data, split).labels
        assert labels.tolist() == [-1] * images[split]


def read_all(data: Data) -> None:
    for split in (data.train, data.validation, data.test):
        list(split.batches(99))


def texts_of(data: Data, split: str) -> list[str]:
    [(stored, _)] = getattr(data, split).batches(1000)
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in stored]


# Folders of images.


@pytest.mark.parametrize("inside", [".", "photos"])
def test_a_flat_folder(tmp_path: Path, opened: Opened, images: Callable[..., Path], inside: str) -> None:
    images(tmp_path / inside)
    (tmp_path / "README.txt").write_text("about these images")
    (tmp_path / inside / ".hidden.png").write_text("no image")
    data = opened(tmp_path)
    check_unlabeled(data, {"train": 17, "validation": 1, "test": 2})
    assert data.noun == "image"
    assert data.shape == (3, 8, 6)
    every = {
        image.numpy().tobytes()
        for split in ("train", "validation", "test")
        for image in next(getattr(data, split).batches(99))[0]
    }
    assert len(every) == 20


def test_the_seed_draws_what_is_held_out(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    images(tmp_path)

    def drawn(split: str, seed: int) -> list[bytes]:
        return [
            image.numpy().tobytes()
            for image in next(getattr(opened(tmp_path, seed, validation=0.3), split).batches(99))[0]
        ]

    assert drawn("validation", 1) == drawn("validation", 1) != drawn("validation", 2)
    assert drawn("test", 1) == drawn("test", 2)


def test_folders_of_splits(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    images(tmp_path / "train")
    images(tmp_path / "test", 3, first=50)
    check_unlabeled(opened(tmp_path), {"train": 19, "validation": 1, "test": 3})


def test_one_image(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    images(tmp_path, 1)
    with pytest.raises(DataError, match=r"none of its 1 training images can be held out, for there is only one"):
        _ = opened(tmp_path).train


def test_images_beside_class_folders_are_ambiguous(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    for name in ("cat", "dog"):
        images(tmp_path / name)
    images(tmp_path, 2)
    with pytest.raises(
        DataError, match=r"holds images \(000\.png, …\) and folders of images \(cat, dog\).*Move either"
    ):
        opened(tmp_path)


def test_images_beside_one_folder_are_ambiguous(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    images(tmp_path, 2)
    images(tmp_path / "more")
    with pytest.raises(DataError, match=r"holds images \(000\.png, …\) and a folder of images \(more\).*--data .*more"):
        opened(tmp_path)


def test_class_folders_one_level_deeper_are_named(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    for name in ("cat", "dog"):
        images(tmp_path / "pets" / name)
    with pytest.raises(
        DataError, match=r"holds one folder, pets, and folders of images in it \(cat, dog\).*--data .*pets"
    ):
        opened(tmp_path)
    assert opened(tmp_path / "pets").classes == ("cat", "dog")


def test_images_of_several_sizes(tmp_path: Path, opened: Opened, images: Callable[..., Path], encoded: Encoded) -> None:
    images(tmp_path)
    (tmp_path / "zzz.png").write_bytes(encoded(99, size=(12, 9)))
    data = opened(tmp_path, validation=0.4)
    with pytest.raises(
        DataError,
        match=r"zzz\.png: 12 × 9 pixels .* first training image has 8 × 6\. Resize them all: --image-size 8,6",
    ):
        read_all(data)
    resized = opened(tmp_path, image_size=(16, 16))
    assert counts(resized) == {"train": 18, "validation": 1, "test": 2}
    assert next(resized.train.batches(99))[0].shape == (18, 3, 16, 16)


def test_images_that_cannot_be_decoded_are_skipped(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    images(tmp_path)
    (tmp_path / "010.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"010\.png: cannot be decoded as an image .*--skip-bad 1"):
        read_all(opened(tmp_path))
    data = opened(tmp_path, skip_bad=1)
    assert len(data.left_out()) == 1
    assert sum(counts(data).values()) == 19


# Text files.


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file(tmp_path: Path, opened: Opened, end: str, mark: str) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes((mark + end.join(["", *LINES[:20], "", "  ", *LINES[20:]])).encode())
    data = opened(file, text_length=32)
    check_unlabeled(data, {"train": 34, "validation": 2, "test": 4})
    assert data.noun == "text"
    assert sorted(texts_of(data, "train") + texts_of(data, "validation") + texts_of(data, "test")) == sorted(LINES)


def test_text_files_of_splits(tmp_path: Path, opened: Opened) -> None:
    for split, lines in (("train", LINES), ("test", LINES[:3])):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    (tmp_path / "README.txt").write_text("no text of the dataset")
    data = opened(tmp_path, text_length=32)
    check_unlabeled(data, {"train": 38, "validation": 2, "test": 3})
    assert texts_of(data, "test") == LINES[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"texts\.txt has no text in it"),
        (b"\n \r\n\t\n", r"texts\.txt has no text in it"),
        (
            "text\n".encode("utf-16"),
            r"texts\.txt is no text \(it holds NUL bytes\), and a text file is\. Write it in UTF-8",
        ),
        (b"one\n" + b"x" * (4 * LONGEST + 1), r"line 2 of texts\.txt is longer than 1,048,576 characters"),
    ],
    ids=["empty", "blank", "UTF-16", "endless"],
)
def test_text_files_that_hold_no_texts(tmp_path: Path, opened: Opened, content: bytes, message: str) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "texts.txt")


def test_a_line_that_is_not_utf8_can_be_skipped(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "texts.txt").write_bytes(b"\n".join([*(line.encode() for line in LINES), "größer".encode("latin-1")]))
    data = opened(tmp_path / "texts.txt", text_length=32, skip_bad=1)
    [why] = data.left_out()
    assert "row 40 (counted from 0) of split 'train' holds a text that is not UTF-8" in why
    assert sum(counts(data).values()) == 40


def test_a_pipe_is_no_text_file(tmp_path: Path, opened: Opened) -> None:
    os.mkfifo(tmp_path / "x.txt")
    with pytest.raises(DataError, match=r"x\.txt: is a pipe, a device or a socket"):
        opened(tmp_path / "x.txt")
    with pytest.raises(DataError, match="no images or texts found in this folder"):
        opened(tmp_path)


def test_a_text_file_too_large_for_the_memory(tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    from litdeploy.data import sources

    (tmp_path / "texts.txt").write_text("\n".join(LINES))
    monkeypatch.setattr(sources, "free_memory", lambda device: 100)
    with pytest.raises(DataError, match=r"a text file is read into memory.*Save it as Parquet"):
        opened(tmp_path / "texts.txt")


# Tables.


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.json"])
@pytest.mark.parametrize("lines", [True, False])
def test_json(tmp_path: Path, opened: Opened, name: str, lines: bool) -> None:
    rows = [{"text": line} for line in LINES]
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    for source in (tmp_path / name, tmp_path):
        data = opened(source, text_length=32)
        check_unlabeled(data, {"train": 34, "validation": 2, "test": 4})


def test_json_lines_with_labels(tmp_path: Path, opened: Opened) -> None:
    rows = [{"text": line, "label": number % 2} for number, line in enumerate(LINES)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = opened(tmp_path, text_length=32)
    assert (data.labeled, data.classes) == (True, ("0", "1"))


def test_json_lines_without_the_field(tmp_path: Path, opened: Opened) -> None:
    rows = [{"text": line} for line in LINES]
    rows[3] = {}
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"row 3 .* has no text in column 'text'\. Remove the row"):
        read_all(opened(tmp_path / "texts.jsonl"))


@pytest.mark.parametrize("content", ["{", "[1, 2]", "17", '{"data": {"text": ["a"]}}', ""])
def test_json_that_is_no_table(tmp_path: Path, opened: Opened, content: str) -> None:
    (tmp_path / "texts.json").write_text(content)
    with pytest.raises(DataError, match=r"texts\.json"):
        read_all(opened(tmp_path / "texts.json"))


def test_a_table_with_texts_alone(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "texts.csv").write_text("text,length\n" + "".join(f"{line},0.5\n" for line in LINES))
    check_unlabeled(opened(tmp_path / "texts.csv"), {"train": 34, "validation": 2, "test": 4})


def test_a_column_that_may_be_labels_is_not_ignored(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "texts.csv").write_text("text,mood\n" + "".join(f"{line},good\n" for line in LINES))
    with pytest.raises(DataError, match=r"no column is known to hold labels.*--label-column text.*--labels none"):
        opened(tmp_path / "texts.csv")
    check_unlabeled(opened(tmp_path / "texts.csv", labels="none"), {"train": 34, "validation": 2, "test": 4})


def test_labels_that_are_unusable_are_not_ignored(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"{line},0.5\n" for line in LINES))
    with pytest.raises(DataError, match=r"column 'label' .* holds float64"):
        opened(tmp_path / "texts.csv")


def test_labels_that_are_not_to_be_used(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "train.parquet", [0, 1] * 20)
    labeled, unlabeled = opened(tmp_path), opened(tmp_path, labels="none")
    check_unlabeled(unlabeled, counts(labeled))
    assert labeled.record().labeled
    assert labeled.record().fingerprint == unlabeled.record().fingerprint


def test_class_folders_without_their_labels(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    for number, name in enumerate(("cat", "dog")):
        images(tmp_path / name, first=50 * number)
    check_unlabeled(opened(tmp_path, labels="none"), {"train": 34, "validation": 2, "test": 4})


@pytest.mark.parametrize("other", [{"label_column": "label"}, {"attributes": ("a",)}])
def test_labels_are_named_or_left_unused(other: dict[str, object]) -> None:
    from litdeploy.config.settings import parse

    with pytest.raises(SettingsError, match=r"labels 'none' and .* exclude one another"):
        parse(DataSettings, {"labels": "none", **other}, "command line")


# Packed files.


def test_packed_without_labels(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    images(tmp_path / "photos")
    packing = pack(tmp_path / "photos", tmp_path / "photos.safetensors", limit=15)
    assert (packing.header.labeled, packing.header.classes) == (False, ())
    data = opened(tmp_path / "photos.safetensors")
    check_unlabeled(data, {"train": 12, "validation": 1, "test": 2})
    with pytest.raises(DataError, match=r"was packed with no labels\. Pack its source again: .*--label-column x"):
        opened(tmp_path / "photos.safetensors", label_column="x")


def test_images_that_cannot_be_decoded_are_not_packed(
    tmp_path: Path, opened: Opened, images: Callable[..., Path]
) -> None:
    photos = images(tmp_path / "photos")
    for name in ("010.png", "011.png"):
        (photos / name).write_bytes(b"torn")
    with pytest.raises(
        DataError, match=r"2 images cannot be decoded \(--skip-bad 1\), or none of a split can:\n .*010"
    ):
        pack({"source": str(photos), "skip_bad": 1}, tmp_path / "photos.safetensors")
    header = pack({"source": str(photos), "skip_bad": 2}, tmp_path / "photos.safetensors").header
    assert (header.images, header.source_images, header.seed) == ({"train": 18}, {"train": 20}, None)
    assert sum(counts(opened(tmp_path / "photos.safetensors")).values()) == 18


def test_packed_labels_that_are_not_to_be_used(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "train.parquet", [0, 1] * 20)
    pack(tmp_path / "train.parquet", tmp_path / "pets.safetensors")
    assert opened(tmp_path / "pets.safetensors").labeled
    check_unlabeled(opened(tmp_path / "pets.safetensors", labels="none"), {"train": 34, "validation": 2, "test": 4})


# What takes them.


def test_they_fit_any_classifier_of_their_input(tmp_path: Path, opened: Opened, images: Callable[..., Path]) -> None:
    data = opened(images(tmp_path))
    of_images = InputSpec(shape=(3, 8, 6), mean=(0.5,) * 3, std=(0.5,) * 3)
    check_against(data, NetworkSpec(name="resnet", input=of_images), 1000)
    check_against(data, NetworkSpec(name="resnet", input=of_images, classes=("a", "b")), 2)
    with pytest.raises(DataError, match="has images, and vdcnn takes texts"):
        check_against(data, NetworkSpec(name="vdcnn", input=CharacterInput(alphabet="ab", length=8)), 2)
    domains = TranslationInput(images=of_images, domains=2)
    with pytest.raises(DataError, match=r"has no labels.*stargan makes images of the domains that the labels name"):
        check_against(data, NetworkSpec(name="stargan", input=domains), 2)
