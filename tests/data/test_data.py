from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.data import Data, Split, check_against, data
from litdeploy.data.split import Resident, Streamed
from litdeploy.errors import DataError

Opened = Callable[..., Data]
Parquet = Callable[..., Path]
CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg"
# Unequal classes: 60 and 40.
LABELS = [0, 0, 1, 0, 1] * 20


def images_of(split: Split) -> set[bytes]:
    [(images, _)] = split.batches(1000)
    return {image.numpy().tobytes() for image in images}


def share_of_ones(split: Split) -> float:
    return split.labels.double().mean().item()


@pytest.mark.parametrize(
    ("own", "expected", "held_out"),
    [
        ({"train"}, {"train": 85, "validation": 5, "test": 10}, True),
        ({"train", "test"}, {"train": 95, "validation": 5, "test": 6}, False),
        ({"train", "validation"}, {"train": 95, "validation": 5, "test": 6}, False),
        ({"train", "validation", "test"}, {"train": 100, "validation": 6, "test": 6}, False),
        ({"test"}, {"test": 6}, False),
        ({"validation"}, {"test": 6}, False),
        ({"validation", "test"}, {"validation": 6, "test": 6}, False),
    ],
)
def test_which_split_serves_as_which(
    parquet: Parquet, tmp_path: Path, opened: Opened, own: set[str], expected: dict[str, int], held_out: bool
) -> None:
    for number, split in enumerate(sorted(own)):
        labels = LABELS if split == "train" else [0, 1, 0, 1, 0, 0]
        parquet(tmp_path / f"{split}.parquet", labels, first=1000 * number)
    dataset = opened(tmp_path)
    record = dataset.record()
    assert record.images == expected
    assert record.test_is_held_out is held_out
    assert {split: len(getattr(dataset, split)) for split in expected} == expected
    seen = [images_of(getattr(dataset, split)) for split in expected]
    # No image is in two splits, and none is lost.
    assert len(set().union(*seen)) == sum(expected.values()) == sum(100 if split == "train" else 6 for split in own)


def test_what_is_held_out_is_stratified(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "train.parquet", LABELS)
    dataset = opened(tmp_path, validation=0.2)
    assert share_of_ones(dataset.test) == 0.4
    assert len(dataset.validation) == 18
    assert share_of_ones(dataset.validation) == pytest.approx(0.4, abs=0.05)


def test_the_seed_draws_the_validation_images_and_never_the_test_images(
    parquet: Parquet, tmp_path: Path, opened: Opened
) -> None:
    parquet(tmp_path / "train.parquet", LABELS)
    one, again, other = (opened(tmp_path, seed=seed) for seed in (1, 1, 2**40))
    assert images_of(one.test) == images_of(other.test)
    assert images_of(one.validation) == images_of(again.validation)
    assert images_of(one.validation) != images_of(other.validation)


def test_a_class_of_one_image_stays_in_training(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "train.parquet", [0] * 9 + [1])
    assert 1 in opened(tmp_path).train.labels.tolist()


def test_too_few_images_to_hold_any_out(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "train.parquet", [0, 1])
    with pytest.raises(DataError, match="none of its 2 training images can be held out"):
        _ = opened(tmp_path).train


@pytest.mark.parametrize("split", ["train", "validation"])
def test_without_training_images(parquet: Parquet, tmp_path: Path, opened: Opened, split: str) -> None:
    parquet(tmp_path / "test.parquet", LABELS)
    dataset = opened(tmp_path)
    with pytest.raises(DataError, match="has no training images, only the split test; it can be evaluated on"):
        getattr(dataset, split)


def test_nothing_is_decoded_before_it_is_asked_for(
    parquet: Parquet, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litdeploy.data import images

    opened_rows: list[tuple[str, int]] = []
    original = images._open

    def note(table: Any, row: int, cell: Any) -> Any:
        opened_rows.append((table.split, row))
        return original(table, row, cell)

    monkeypatch.setattr(images, "_open", note)
    parquet(tmp_path / "train.parquet", LABELS)
    parquet(tmp_path / "test.parquet", LABELS[:7])
    dataset = opened(tmp_path, resident=True)
    dataset.record()
    assert opened_rows == []
    for _ in range(2):
        list(dataset.test.batches(2))
    assert sorted(opened_rows) == sorted([("train", 0), *(("test", row) for row in range(7))])


@pytest.mark.parametrize(
    ("resident", "free", "kind"),
    [
        (True, 0, Resident),
        (False, 10**12, Streamed),
        # 7 images of 3 × 8 × 6 bytes are 1008.
        (None, 2 * 1008, Resident),
        (None, 2 * 1008 - 2, Streamed),
    ],
)
def test_resident_as_told_or_when_it_fits_in_half_of_the_free_memory(
    parquet: Parquet,
    tmp_path: Path,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
    resident: bool | None,
    free: int,
    kind: type,
) -> None:
    monkeypatch.setattr(data, "free_memory", lambda device: free)
    parquet(tmp_path / "test.parquet", LABELS[:7])
    assert type(opened(tmp_path, resident=resident).test) is kind


@pytest.mark.skipif(not CIFAR.is_dir(), reason=f"{CIFAR} is not here")
def test_cifar10(opened: Opened) -> None:
    dataset = opened(CIFAR)
    assert dataset.shape == (3, 32, 32)
    assert dataset.classes[:3] == ("airplane", "automobile", "bird")
    assert dataset.record().images == {"train": 47_500, "validation": 2_500, "test": 10_000}
    assert dataset.test.labels.bincount().tolist() == [1000] * 10
    images = torch.cat([images for images, _ in dataset.test.batches(1000)])
    # The mean colour of CIFAR-10, in the order R, G, B.
    torch.testing.assert_close(
        images.double().mean((0, 2, 3)) / 255, torch.tensor([0.4942, 0.4851, 0.4504]).double(), rtol=0, atol=0.005
    )


Opened = Callable[..., Data]
Parquet = Callable[..., Path]
TWENTY_LABELS = [0, 1] * 10


def spec(shape: tuple[int, int, int] = (3, 8, 6), classes: tuple[str, ...] = ()) -> NetworkSpec:
    statistics = (0.5,) * shape[0]
    return NetworkSpec(name="resnet", input=InputSpec(shape=shape, mean=statistics, std=statistics), classes=classes)


def test_check_against(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "test.parquet", TWENTY_LABELS)
    dataset = opened(tmp_path)
    for fitting in (spec(), spec(classes=("cat", "dog")), spec(classes=("Katze", "Hund"))):
        check_against(dataset, fitting, 2)
    with pytest.raises(DataError, match=r"has 2 classes \(cat, dog\), and resnet has 10.*--data"):
        check_against(dataset, spec(), 10)
    with pytest.raises(DataError, match=r"in another order: cat, dog, … and not dog, cat"):
        check_against(dataset, spec(classes=("dog", "cat")), 2)
    with pytest.raises(DataError, match=r"3 channels \(RGB\), and resnet takes 1 channel \(gray\)") as channels:
        check_against(dataset, spec((1, 8, 6)), 2)
    assert "--image-size" not in str(channels.value)
    with pytest.raises(DataError, match=r"8 × 6 pixels .* resnet takes 32 × 16\. Resize them: --image-size 32,16"):
        check_against(dataset, spec((3, 32, 16)), 2)
    check_against(opened(tmp_path, image_size=(32, 16)), spec((3, 32, 16)), 2)
