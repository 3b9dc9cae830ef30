from __future__ import annotations

from pathlib import Path

import pytest

from litdeploy.profiler.analysis.diff import ReportDiff, compare_reports
from litdeploy.profiler.report.diff_page import differing, measurements, render_diff, scores
from litdeploy.profiler.schema import Failure, Report
from litdeploy.storage.records import Likeness
from tests.profiler.conftest import HOSTILE, hostile, measurement


def compared(a: Report, b: Report, folder: Path) -> ReportDiff:
    for name, report in (("a", a), ("b", b)):
        (folder / f"{name}.json").write_text(report.model_dump_json())
    return compare_reports(folder / "a.json", folder / "b.json")


@pytest.fixture
def found(report: Report, tmp_path: Path) -> ReportDiff:
    other = report.model_copy(
        update={
            "measurements": (measurement("onnxruntime", 1, 5, 1.25),),
            "failures": (Failure(runner="compiled", batch_size=None, message="there is no compiler here"),),
            "recipe": report.recipe.model_copy(update={"seed": 7}),
        }
    )
    return compared(report, other, tmp_path)


def test_the_tables_tell_both_and_what_one_lacks(found: ReportDiff) -> None:
    rows = {(row[0].text, row[1].text): row for row in measurements(found).rows}
    _, _, a, b, latency, before, after, gained = rows["onnxruntime", "1"]
    assert (a.text, b.text, latency.text, gained.text) == ("1.92", "1.25", "1.54×", "1.54×")
    assert latency.small.endswith(", faster")
    assert gained.small.endswith(", more")
    assert (before.text, after.text) == ("2.6×", "4.0×")
    assert [cell.text for cell in rows["eager", "8"]][3:5] == ["–", "–"]
    assert [[cell.text for cell in row] for row in differing(found).rows] == [["recipe seed", "0", "7"]]
    [accuracies] = scores(found)
    assert [row[0].text for row in accuracies.rows] == [
        "teacher (ResNet-56), test",
        "teacher (ResNet-56), validation",
        "student (ResNet-20), test",
        "student (ResNet-20), validation",
    ]


def test_reports_of_two_tasks_have_a_table_of_scores_each(report: Report, tmp_path: Path) -> None:
    likeness = {"test": Likeness(psnr=31.24, ssim=0.9512, images=100)}
    generator = report.model_copy(
        update={
            "teacher": report.teacher.model_copy(update={"accuracy": {}}),
            "student": report.student.model_copy(update={"accuracy": {}, "likeness": likeness}),
        }
    )
    accuracies, likenesses = scores(compared(report, generator, tmp_path))
    assert next([cell.text for cell in row] for row in accuracies.rows) == [
        "teacher (ResNet-56), test",
        "89.44 %",
        "not measured",
    ]
    assert [[cell.text for cell in row] for row in likenesses.rows] == [
        ["student (ResNet-20), test", "–", "PSNR 31.2 dB, SSIM 0.9512"]
    ]


def test_the_page_says_what_was_not_measured(found: ReportDiff) -> None:
    page = render_diff(found)
    assert "Not measured in B:" in page
    assert "there is no compiler here" in page
    assert page.count("<svg") == 3
    assert "not measured" in page
    assert found.sentence in page


def test_a_report_beside_itself(report: Report, tmp_path: Path) -> None:
    page = render_diff(compared(report, report, tmp_path))
    assert "Nothing: the same networks" in page


def test_what_comes_from_files_is_escaped(report: Report, tmp_path: Path) -> None:
    page = render_diff(compared(hostile(report), report, tmp_path))
    assert "<script" not in page
    assert HOSTILE not in page
