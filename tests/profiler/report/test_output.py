from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from litdeploy.errors import BundleError, SettingsError
from litdeploy.profiler.report.output import check_output, read_training, to_csv, write_output, write_report
from litdeploy.profiler.schema import Conditions, Gpu, RawSamples, Report, Samples, Timed, read_report


def test_files_are_written_whole_and_nothing_beside_them(report: Report, tmp_path: Path) -> None:
    timed = Timed(
        clock="wall",
        order="TSST",
        starts_ms=(0.0, 1.5, 2.0, 2.75),
        teacher=Samples(3.0, (1.5, 1.25)),
        student=Samples(2.0, (0.5, 0.75)),
        stopped="samples",
        overhead_ms=0.0004,
        conditions=Conditions(seconds=0.004),
    )
    write_report(report, [RawSamples(runner="eager", batch_size=1, timed=timed)], tmp_path / "profile")
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"report.json", "report.html", "samples.json"}
    assert read_report(tmp_path / "profile") == report
    [stored] = json.loads((tmp_path / "profile" / "samples.json").read_text())["measurements"]
    assert RawSamples.model_validate(stored).timed == timed
    assert stored["timed"]["teacher"]["milliseconds"] == [1.5, 1.25]


def test_a_report_of_another_version_is_none(report: Report, tmp_path: Path) -> None:
    assert read_report(tmp_path) is None
    (tmp_path / "report.json").write_text(report.model_dump_json().replace('"schema_version":2', '"schema_version":1'))
    assert read_report(tmp_path) is None


@pytest.mark.parametrize("content", [None, "", "\n\n", "no json\n", "[1]\n"])
def test_training_without_usable_rows(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    assert read_training(path) == ()


def test_training_keeps_unknown_keys_and_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "new": [2], "loss": NaN}\n{"epoch": 2, "lo')
    assert read_training(path) == ({"epoch": 1, "new": [2], "loss": None},)


def test_what_a_chart_or_a_page_cannot_hold_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1' + "0" * 400 + ', "loss": 1e300, "phase": "\\ud800"}\n' + "[" * 10**5 + "\n")
    assert read_training(path) == ({"epoch": None, "loss": None, "phase": "?"},)


def test_a_record_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(BundleError, match="larger than"):
        read_training(tmp_path / "metrics.jsonl")


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


def test_a_file_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.csv"
    write_output(path, "ä\n", "--csv")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert [file.name for file in path.parent.iterdir()] == ["x.csv"]


def test_what_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SettingsError, match=r"--csv .*folder cannot be created"):
        check_output(tmp_path / "taken" / "x.csv", "--csv")
    with pytest.raises(SettingsError, match=r"--html .*is a folder"):
        write_output(tmp_path, "", "--html")
