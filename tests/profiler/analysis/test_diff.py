from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from litdeploy.errors import BundleError
from litdeploy.profiler.analysis.diff import ReportDiff, compare_reports, ratio_of
from litdeploy.profiler.measure.statistics import median_interval
from litdeploy.profiler.schema import Report
from tests.profiler.conftest import measurement


def stored(report: Report, path: Path) -> Path:
    path.write_text(report.model_dump_json())
    return path


@pytest.fixture
def found(report: Report, tmp_path: Path) -> ReportDiff:
    """A: as it is. B: another machine and commit, a faster student in onnxruntime, no `compiled`, and `inductor`."""
    other = report.model_copy(
        update={
            "measurements": (
                *report.measurements[:3],
                measurement("onnxruntime", 1, 5, 1.25),
                measurement("inductor", 1, 5, 2),
            ),
            "environment": report.environment.model_copy(
                update={"device_name": "a GPU", "versions": {"torch": "2.14"}, "date": "2026-02-03T04:05:06+00:00"}
            ),
        }
    )
    return compare_reports(stored(report, tmp_path / "a.json"), stored(other, tmp_path / "b.json"))


def test_every_measurement_of_either_is_a_row(found: ReportDiff) -> None:
    sides = {(row.runner, row.batch_size): (row.a is not None, row.b is not None) for row in found.rows}
    assert sides[("eager", 8)] == sides[("onnxruntime", 1)] == (True, True)
    assert sides[("compiled", 1)] == sides[("onnxruntime", 64)] == (True, False)
    assert sides[("inductor", 1)] == (False, True)
    assert all((row.latency is None) == (not all(sides[row.runner, row.batch_size])) for row in found.rows)


def test_what_became_faster_and_what_stayed(found: ReportDiff) -> None:
    by_key = {(row.runner, row.batch_size): row for row in found.rows}
    faster = by_key["onnxruntime", 1]
    assert faster.latency is not None
    assert faster.speedup is not None
    assert faster.latency.ratio == pytest.approx(5 / 2.6 / 1.25)
    assert faster.latency.verdict == "faster"
    assert faster.speedup.ratio == pytest.approx(4 / 2.6)
    same = by_key["eager", 1].latency
    assert same is not None
    assert (same.ratio, same.verdict) == (1, "same")
    assert found.sentence.startswith("In onnxruntime at batch 1, B’s student is 1.54× as fast: 1.92 → 1.25 ms a call")


def test_a_machine_that_was_slower_throughout_is_no_slower_student(report: Report, tmp_path: Path) -> None:
    busy = report.model_copy(update={"measurements": (measurement("onnxruntime", 1, 10, 10 / 2.6),)})
    paths = stored(report, tmp_path / "a.json"), stored(busy, tmp_path / "b.json")
    row = next(row for row in compare_reports(*paths).rows if row.b)
    assert row.latency is not None
    assert row.speedup is not None
    assert (row.latency.high or 1) < 0.6
    assert (row.latency.verdict, row.speedup.verdict) == ("unclear", "same")
    # On another machine it is what it is.
    elsewhere = report.environment.model_copy(update={"device_name": "another"})
    stored(busy.model_copy(update={"environment": elsewhere}), tmp_path / "b.json")
    row = next(row for row in compare_reports(*paths).rows if row.b)
    assert row.latency is not None
    assert row.latency.verdict == "slower"


def test_a_speedup_that_the_processor_time_contradicts_compares_to_nothing(report: Report, tmp_path: Path) -> None:
    odd = measurement("onnxruntime", 1, 10, 1)
    comparison = odd.comparison.model_copy(update={"verdict": "unclear", "reason": "calls waited"})
    other = report.model_copy(update={"measurements": (odd.model_copy(update={"comparison": comparison}),)})
    found = compare_reports(stored(report, tmp_path / "a.json"), stored(other, tmp_path / "b.json"))
    row = next(row for row in found.rows if row.b)
    assert row.latency is not None
    assert row.speedup is not None
    assert (row.latency.verdict, row.speedup.verdict) == ("unclear", "unclear")


def test_what_differs_is_named_and_the_date_is_not(found: ReportDiff) -> None:
    assert {(each.what, each.a, each.b) for each in found.differing} == {
        ("device_name", "a processor", "a GPU"),
        ("versions torch", "2.13", "2.14"),
    }


def test_reports_without_a_measurement_in_common(report: Report, tmp_path: Path) -> None:
    other = report.model_copy(update={"measurements": (measurement("inductor", 1, 5, 2),)})
    found = compare_reports(stored(report, tmp_path / "a.json"), stored(other, tmp_path / "b.json"))
    assert "no measurement in common" in found.sentence


def test_a_ratio_without_an_interval_is_unclear() -> None:
    ratio = ratio_of((4, None, None), (2, 1.9, 2.1))
    assert (ratio.ratio, ratio.low, ratio.verdict) == (2, None, "unclear")


def test_the_interval_of_a_ratio_holds_the_true_one_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1_000):
        medians = []
        for scale in (3.0, 2.0):
            samples = scale * np.exp(0.1 * random.standard_normal(100))
            low, high = median_interval(samples) or (math.nan, math.nan)
            medians.append((float(np.median(samples)), low, high))
        ratio = ratio_of(*medians)
        assert ratio.low is not None
        assert ratio.high is not None
        hits += ratio.low <= 1.5 <= ratio.high
    assert 930 <= hits <= 970


def test_a_bundle_and_its_profile_serve_as_well_as_the_file(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "deploy" / "profile"
    folder.mkdir(parents=True)
    file = stored(report, folder / "report.json")
    for path in (file, folder, tmp_path / "deploy"):
        assert compare_reports(file, path).b == report


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        ("", "no JSON"),
        ("[1]", "not a report"),
        ("{}", "schema version None"),
        ('{"schema_version": 1}', "schema version 1, and this litdeploy reads 2"),
        ('{"schema_version": 2}', "Field required"),
    ],
)
def test_what_is_no_report_is_refused(report: Report, tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=told):
        compare_reports(stored(report, tmp_path / "a.json"), path)


def test_a_folder_without_a_report(report: Report, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="litdeploy profile"):
        compare_reports(stored(report, tmp_path / "a.json"), tmp_path)


def test_it_is_json(found: ReportDiff) -> None:
    assert ReportDiff.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["schema_version"] == 1
