from __future__ import annotations

from litdeploy.profiler.report.tables import TextTable, calls, conditions, gpu, start
from litdeploy.profiler.schema import Conditions, Gpu, Report


def heads(table: TextTable) -> list[str]:
    return [head.text for head in table.columns]


def test_what_is_not_known_of_any_has_no_column(report: Report) -> None:
    assert heads(start(report)) == ["runner", "batch", "", "load s", "first call ms"]
    assert heads(calls(report)) == ["runner", "batch", "", "samples", "quartiles", "p90"]
    assert heads(conditions(report)) == [
        "runner",
        "batch",
        "ended by",
        "timer µs",
        "seconds",
        "other load, cores",
        "preempted",
    ]


def test_without_a_gpu_there_is_no_table_of_it(report: Report) -> None:
    assert gpu(report) is None


def test_what_is_known_of_one_has_a_column_for_all(report: Report) -> None:
    first, *others = report.measurements
    hot = Gpu(
        clock_mhz=1_700,
        clock_low_mhz=1_600,
        max_clock_mhz=1_980,
        memory_clock_mhz=2_600,
        temperature_c=61,
        power_watts=512,
        throttle_reasons=(),
    )
    side = first.student.model_copy(
        update={"energy_joules": 0.01234, "peak_memory_bytes": 3_450_000, "launch_ms": 0.25, "p99_9_ms": 20.0}
    )
    first = first.model_copy(update={"student": side, "conditions": Conditions(seconds=1, gpu=hot)})
    found = report.model_copy(update={"measurements": (first, *others)})

    rows = [[cell.text for cell in row] for row in start(found).rows]
    assert heads(start(found))[-2:] == ["peak memory", "energy J a call"]
    assert rows[0][2:] == ["teacher", "0.10", "26.9", "–", "–"]
    assert [text.replace("\xa0", " ") for text in rows[1][-2:]] == ["3.45 MB", "0.0123"]
    assert heads(calls(found))[-2:] == ["p99.9", "launch"]
    table = gpu(found)
    assert table is not None
    assert heads(table)[-5:] == ["clock MHz", "lowest", "°C", "W", "throttled by"]
    assert [cell.text for cell in next(iter(table.rows))][-5:] == [
        "1,700 of 1,980",
        "1,600",
        "61",
        "512",
        "nothing",
    ]
