from __future__ import annotations

import math

import pytest

from litdeploy.profiler.report.charts import Value, bar_pairs, validation_curve
from litdeploy.tasks import TASKS


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300])
def test_what_no_axis_can_hold_is_shown_as_missing(value: float) -> None:
    rows = [
        ("eager", Value(value, "far off"), Value(2.0, "2 ms", 1.0, 3.0)),
        ("other", Value(1.0, "1 ms", 0.5, value), None),
    ]
    drawn = bar_pairs(rows, "latency", "Latency", "Medians.", missing="not measured")
    assert "eager: not measured, 2 ms; other: not measured, not measured." in drawn
    assert "far off" not in drawn


@pytest.mark.parametrize(
    ("task", "row", "description"),
    [
        ("classification", {"validation_top1": 0.5}, "From 50.0 to 50.0 %. The teacher has 90.0 %."),
        ("translation", {"validation_psnr": 21.26}, "From 21.3 to 21.3 dB."),
    ],
)
def test_a_curve_is_in_its_tasks_unit(task: str, row: dict[str, float], description: str) -> None:
    curve = TASKS[task].curves[0]
    drawn = validation_curve([{"epoch": 1, **row}], curve, 0.9 if task == "classification" else None)
    assert drawn is not None
    assert f">{description}</desc>" in drawn
    assert drawn.count("over the epochs") == 1
    assert validation_curve([{"epoch": 1, "loss": 0.5}], curve, None) is None
