from __future__ import annotations

from litdeploy.profiler.formatting import in_bytes, milliseconds, relative_error, runner_of, short, times
from tests.profiler.conftest import measurement


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
