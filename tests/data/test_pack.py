from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litdeploy.config.recipe import DataSettings
from litdeploy.data import Data, Packing, Split, pack, shuffled
from litdeploy.data.data import open_store
from litdeploy.errors import DataError
from litdeploy.storage.checkpoint import read_checkpoint
from litdeploy.trainer import train

Opened = Callable[..., Data]
Parquet = Callable[..., Path]
CPU = torch.device("cpu")
# Unequal classes: 60 and 40.
LABELS = [0, 0, 1, 0, 1] * 20


def whole(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    [(images, labels)] = split.batches(10_000)
    return images, labels


def assert_same(one: Split, other: Split) -> None:
    order = shuffled(len(one), 2, torch.Generator().manual_seed(1))
    passes = [[(some.images(), some.labels_N) for some in split.pick(order)] + [whole(split)] for split in (one, other)]
    for (images, labels), (other_images, other_labels) in zip(*passes, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Path]:
    """Packs a source into a file, whose path it gives."""

    def call(source: Any, name: str = "packed.safetensors", **how: Any) -> Path:
        return Path(pack(source, tmp_path / "packed" / name, **how).path)

    return call


@pytest.fixture
def pets(parquet: Parquet, tmp_path: Path) -> Path:
    """A hundred training images and ten test images."""
    parquet(tmp_path / "pets" / "train.parquet", LABELS)
    parquet(tmp_path / "pets" / "test.parquet", [1, 0] * 5, first=1000)
    return tmp_path / "pets"


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(
    "own", [{"train"}, {"train", "test"}, {"train", "validation"}, {"train", "validation", "test"}, {"test"}]
)
def test_a_packed_file_gives_what_its_source_gives(
    parquet: Parquet, tmp_path: Path, opened: Opened, packed: Callable[..., Path], own: set[str], resident: bool
) -> None:
    for number, split in enumerate(sorted(own)):
        parquet(tmp_path / "pets" / f"{split}.parquet", LABELS if split == "train" else [0, 1, 0], first=1000 * number)
    file = packed(tmp_path / "pets")
    how: dict[str, Any] = {"seed": 3, "validation": 0.1}
    source, copy = opened(tmp_path / "pets", **how), opened(file, resident=resident, **how)
    assert (copy.classes, copy.shape) == (source.classes, source.shape)
    told, copied = source.record(), copy.record()
    assert (copied.images, copied.test_is_held_out) == (told.images, told.test_is_held_out)
    assert copied.source == str(file)
    for split in told.images:
        assert_same(getattr(source, split), getattr(copy, split))


def test_digits_and_their_own_share_of_test_images(opened: Opened, packed: Callable[..., Path]) -> None:
    source, copy = opened("digits"), opened(packed("digits"))
    for split in ("train", "validation", "test"):
        assert_same(getattr(source, split), getattr(copy, split))


def test_a_training_on_the_file_is_the_training_on_its_source(tmp_path: Path, packed: Callable[..., Path]) -> None:
    weights = []
    for data in ("digits", packed("digits")):
        out = tmp_path / f"on-{Path(data).stem}.safetensors"
        trained = train("resnet8,width=4", data=str(data), epochs=1, seed=5, out=out, device="cpu", precision="fp32")
        weights.append((read_checkpoint(trained.path).weights, trained.validation, trained.test))
    (one, *accuracies), (other, *other_accuracies) = weights
    assert accuracies == other_accuracies
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_same_source_gives_the_same_bytes(pets: Path, packed: Callable[..., Path]) -> None:
    one, other = (packed(pets, f"{name}.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_what_is_told_of_a_file(pets: Path, tmp_path: Path, opened: Opened) -> None:
    told = pack(pets, tmp_path / "new folder" / "pets.safetensors", train_images=10)
    assert isinstance(told, Packing)
    header = told.header
    assert header.classes == ("cat", "dog")
    assert header.shape == (3, 8, 6)
    assert header.images == {"train": 10, "test": 10}
    assert header.source_images == {"train": 100, "test": 10}
    assert header.fingerprint == opened(pets).record().fingerprint
    assert (header.image_column, header.label_column, header.seed) == ("img", "label", 0)
    assert told.bytes == Path(told.path).stat().st_size
    assert opened(told.path).record().fingerprint == told.sha256
    # A file that is packed again, whole.
    again = pack(told.path, tmp_path / "again.safetensors").header
    assert (again.fingerprint, again.source_images, again.seed) == (told.sha256, header.images, None)


def rows_of(file: Path, source: Path) -> list[int]:
    """Which of the source's training images, all different, a file holds, in its order."""
    stores = [open_store(DataSettings(source=str(path))) for path in (source, file)]
    every, kept = (store.stored("train", np.arange(len(store.labels("train"))), CPU) for store in stores)
    places = {image.numpy().tobytes(): row for row, image in enumerate(every)}
    return [places[image.numpy().tobytes()] for image in kept]


def test_a_part_is_balanced_in_order_and_part_of_a_larger_one(pets: Path, packed: Callable[..., Path]) -> None:
    few, many, other = (
        rows_of(packed(pets, f"{count}-{seed}.safetensors", train_images=count, seed=seed), pets)
        for count, seed in ((20, 1), (90, 1), (20, 2))
    )
    assert few == sorted(few)
    assert sum(LABELS[row] for row in few) == 10
    # There are only 40 of one class: the other fills up.
    assert (len(many), sum(LABELS[row] for row in many)) == (90, 40)
    assert set(few) < set(many)
    assert few != other


def test_limit_is_for_every_split(pets: Path, opened: Opened, packed: Callable[..., Path]) -> None:
    both = opened(packed(pets, limit=4, train_images=30), validation=0.2)
    assert both.record().images == {"train": 24, "validation": 6, "test": 4}
    assert both.test.labels.bincount().tolist() == [2, 2]


def test_columns_and_size_are_packed(pets: Path, opened: Opened, packed: Callable[..., Path]) -> None:
    file = packed({"source": str(pets), "image_size": [4, 5], "label_column": "label"})
    assert opened(file).shape == (3, 4, 5)
    assert opened(file, image_size=(4, 5), image_column="img", label_column="label").shape == (3, 4, 5)
    with pytest.raises(DataError, match=rf"images of 4 × 5 pixels .*data pack {pets} --image-size 8,6 --out"):
        opened(file, image_size=(8, 6))
    with pytest.raises(DataError, match=r"labels of column 'label'\. .* --label-column coarse --out"):
        opened(file, label_column="coarse")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"train_images": 1}, "1 images of split 'train' are fewer than its 2 classes.*--train-images"),
        ({"limit": 1}, "1 images of split '(train|test)' are fewer"),
    ],
)
def test_fewer_images_than_classes(pets: Path, packed: Callable[..., Path], how: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        packed(pets, **how)


def test_no_training_images_to_choose_from(parquet: Parquet, tmp_path: Path, packed: Callable[..., Path]) -> None:
    file = parquet(tmp_path / "pets_test.parquet", LABELS)
    with pytest.raises(DataError, match=r"has no training images\. Leave --train-images out"):
        packed(file, train_images=10)


def test_a_file_that_is_there_is_kept(pets: Path, packed: Callable[..., Path]) -> None:
    file = packed(pets)
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"is there already; it is kept.*--overwrite"):
        packed(pets, train_images=10)
    assert file.read_bytes() == before
    # Even from the file itself.
    assert packed(file, train_images=10, overwrite=True).stat().st_size < len(before)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("pets.parquet", "is written as .safetensors; end the name"),
        ("folder.safetensors", "is a folder; name a file"),
        ("file/pets.safetensors", "cannot be written"),
    ],
)
def test_places_that_cannot_be_written_to(pets: Path, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=message):
        pack(pets, tmp_path / out)


def test_nothing_is_left_of_a_source_with_a_torn_image(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(number)[: 60 if number == 4 else None])
    rows = "".join(f"{number}.png,{number % 2}\n" for number in range(6))
    (tmp_path / "train.csv").write_text("file,label\n" + rows)
    with pytest.raises(DataError, match=r"row 4 .* cannot be decoded"):
        pack(tmp_path / "train.csv", tmp_path / "out" / "bad.safetensors")
    assert not (tmp_path / "out").exists()


def test_more_than_there_is_memory_for(
    pets: Path, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litdeploy.data import pack as function

    monkeypatch.setitem(function.__globals__, "free_memory", lambda device: 110 * 3 * 8 * 6 - 1)
    with pytest.raises(DataError, match=r"decoded images take .*--limit, --train-images"):
        packed(pets)
