from __future__ import annotations

import pytest

from litdeploy.profiler.figures import (
    accuracy_interval,
    in_bytes,
    milliseconds,
    percent,
    relative_error,
    runner_of,
    short,
    times,
)
from litdeploy.storage.records import Accuracy

from .conftest import measurement


def test_numbers_for_people() -> None:
    assert [times(ratio) for ratio in (0.834, 1.049, 1.96, 2.64)] == ["0.83×", "1.05×", "1.96×", "2.6×"]
    assert [milliseconds(value) for value in (0.5123, 5.123, 51.23, 512.3, 5123.4)] == [
        "0.512",
        "5.12",
        "51.2",
        "512",
        "5,123",
    ]


def test_counts_for_people() -> None:
    assert [short(number).replace("\xa0", " ") for number in (10, 1_500, 855_770, 999_900, 1.27e6, 2.51e8)] == [
        "10",
        "1.5 k",
        "856 k",
        "1000 k",
        "1.27 M",
        "251 M",
    ]
    assert [in_bytes(number).replace("\xa0", " ") for number in (10, 3_450_000)] == ["10 B", "3.45 MB"]


def test_an_accuracy_has_as_many_decimals_as_its_images_allow() -> None:
    assert percent(Accuracy(top1=0.89664, loss=0.1, images=10_000)) == "89.66 %"
    assert percent(Accuracy(top1=0.89664, loss=0.1, images=360)) == "89.7 %"
    assert percent(None) == "not measured"


def test_the_interval_of_an_accuracy() -> None:
    # Newcombe, Stat. Med. 1998, table I, method 3: 81 of 263, and 0 of 20.
    low, high = accuracy_interval(Accuracy(top1=81 / 263, loss=0, images=263))
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = accuracy_interval(Accuracy(top1=0, loss=0, images=20))
    assert low == pytest.approx(0, abs=1e-12)
    assert round(high, 4) == 0.1611


def test_errors_and_runners_for_people() -> None:
    assert [relative_error(error) for error in (None, 0, 3.2e-6, 0.2204, 1.5)] == [
        "not finite",
        "0.0 %",
        "0.0003 %",
        "22.0 %",
        "150.0 %",
    ]
    assert runner_of(measurement("eager", 1, 2, 1)) == "eager"
    assert runner_of(measurement("eager", 1, 2, 1).model_copy(update={"precision": "bf16"})) == "eager bf16"
