from __future__ import annotations

import json
from pathlib import Path

import pytest

from litdeploy.errors import BundleError
from litdeploy.profiler.report.report_files import read_training, write_report
from litdeploy.profiler.schema import Conditions, RawSamples, Report, Samples, Timed, read_report


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
