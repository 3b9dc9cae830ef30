from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from litdeploy.config.spec import InputSpec, NetworkSpec
from litdeploy.data import Data, check_against
from litdeploy.errors import DataError

Opened = Callable[..., Data]
Parquet = Callable[..., Path]
LABELS = [0, 1] * 10


def spec(shape: tuple[int, int, int] = (3, 8, 6), classes: tuple[str, ...] = ()) -> NetworkSpec:
    statistics = (0.5,) * shape[0]
    return NetworkSpec(name="resnet", input=InputSpec(shape=shape, mean=statistics, std=statistics), classes=classes)


def test_check_against(parquet: Parquet, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "test.parquet", LABELS)
    dataset = opened(tmp_path)
    for fitting in (spec(), spec(classes=("cat", "dog")), spec(classes=("Katze", "Hund"))):
        check_against(dataset, fitting, 2)
    with pytest.raises(DataError, match=r"has 2 classes \(cat, dog\), and resnet tells 10 apart.*--data"):
        check_against(dataset, spec(), 10)
    with pytest.raises(DataError, match=r"in another order: cat, dog, … and not dog, cat"):
        check_against(dataset, spec(classes=("dog", "cat")), 2)
    with pytest.raises(DataError, match=r"3 channels \(RGB\), and resnet takes 1 channel \(grey\)") as channels:
        check_against(dataset, spec((1, 8, 6)), 2)
    assert "--image-size" not in str(channels.value)
    with pytest.raises(DataError, match=r"8 × 6 pixels .* resnet takes 32 × 16\. Resize them: --image-size 32,16"):
        check_against(dataset, spec((3, 32, 16)), 2)
    check_against(opened(tmp_path, image_size=(32, 16)), spec((3, 32, 16)), 2)
