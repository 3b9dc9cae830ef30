from __future__ import annotations

from litdeploy.profiler.report.prediction_page import latencies, render_prediction
from tests.profiler.conftest import HOSTILE, prediction


def test_each_runner_and_batch_size_has_a_curve_and_a_group_of_rows() -> None:
    found = prediction()
    page = render_prediction(found)
    assert page.count("<svg") == 4
    assert "Latency against depth in onnxruntime at batch size 8" in page
    groups = latencies(found).groups
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert [cell.text for cell in groups[0][1]][:6] == ["eager", "1", "20", "9.00", "3.00", "3.0×"]
    assert [cell.text for cell in groups[3][2]][:6] == ["onnxruntime", "8", "32", "72.0", "40.0", "1.80×"]


def test_a_failure_of_every_depth_is_told_once() -> None:
    page = render_prediction(prediction())
    assert page.count("there is no compiler here") == 1
    assert "compiled, depth 8, 20, 32:" in page


def test_what_comes_from_files_is_escaped() -> None:
    page = render_prediction(prediction().model_copy(update={"teacher": HOSTILE, "path": HOSTILE}))
    assert "<script" not in page
