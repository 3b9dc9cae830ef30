from __future__ import annotations

from litdeploy.profiler.schema import Report, headline

from .conftest import measurement


def test_a_report_survives_json(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_headline_is_what_ships_at_the_smallest_batch(report: Report) -> None:
    assert (report.headline.runner, report.headline.batch_size) == ("onnxruntime", 1)
    modules = [measurement("eager", 1, 2, 1), measurement("compiled", 1, 2, 0.5), measurement("compiled", 8, 2, 0.1)]
    assert headline(modules) == modules[1]
