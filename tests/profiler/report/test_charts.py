from __future__ import annotations

import math

import pytest

from litdeploy.profiler.report.charts import Value, bar_pairs


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300])
def test_what_no_axis_can_hold_is_told_as_missing(value: float) -> None:
    rows = [
        ("eager", Value(value, "far off"), Value(2.0, "2 ms", 1.0, 3.0)),
        ("other", Value(1.0, "1 ms", 0.5, value), None),
    ]
    drawn = bar_pairs(rows, "latency", "Latency", "Medians.", missing="not measured")
    assert "eager: not measured, 2 ms; other: not measured, not measured." in drawn
    assert "far off" not in drawn
