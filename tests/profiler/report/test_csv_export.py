from __future__ import annotations

import csv

from litdeploy.profiler.report.csv_export import to_csv
from litdeploy.profiler.schema import Conditions, Gpu, Report


def test_a_row_for_each_side_of_each_measurement(report: Report) -> None:
    rows = list(csv.DictReader(to_csv([report]).splitlines()))
    assert len(rows) == 2 * len(report.measurements)
    for row, (measurement, side) in zip(
        rows, ((each, side) for each in report.measurements for side in ("teacher", "student")), strict=True
    ):
        timing = getattr(measurement, side)
        assert (row["runner"], row["batch_size"], row["side"]) == (
            measurement.runner,
            str(measurement.batch_size),
            side,
        )
        assert float(row["median_ms"]) == timing.median_ms
        assert float(row["median_low_ms"]) == timing.median_low_ms
        assert float(row["speedup_low"]) == measurement.comparison.speedup_low
        assert row["energy_joules"] == row["processes"] == ""
        assert row["student_sha256"] == report.student_sha256


def test_several_reports_lists_and_a_gpu_are_one_table(report: Report) -> None:
    gpu = Gpu(
        clock_mhz=1_700,
        clock_low_mhz=1_600,
        max_clock_mhz=1_980,
        memory_clock_mhz=2_600,
        temperature_c=61,
        power_watts=512,
        throttle_reasons=("power", "heat, slowed"),
    )
    first = report.measurements[0]
    on_gpu = report.model_copy(
        update={
            "bundle": "b,\n2",
            "measurements": (
                first.model_copy(
                    update={
                        "conditions": Conditions(seconds=1, clock_mhz=3_000, gpu=gpu),
                        "comparison": first.comparison.model_copy(update={"processes": (2.5, 2.75)}),
                    }
                ),
            ),
        }
    )
    text = to_csv([report, on_gpu])
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    assert {row["bundle"] for row in rows} == {"deploy", "b,\n2"}
    assert rows[-1]["processes"] == "2.5 2.75"
    assert rows[-1]["gpu_throttle_reasons"] == "power heat, slowed"
    assert (rows[-1]["gpu_clock_mhz"], rows[-1]["clock_mhz"]) == ("1700.0", "3000.0")
    assert rows[0]["gpu_clock_mhz"] == ""
    assert None not in rows[0]
