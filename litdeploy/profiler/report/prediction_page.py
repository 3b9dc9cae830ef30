"""A prediction as an HTML page: latency against depth in each runner, and the gain of each depth."""

from __future__ import annotations

from litdeploy.profiler.formatting import runner_of, short
from litdeploy.profiler.report import tables
from litdeploy.profiler.report.page import TitledChart, chart_module, fill
from litdeploy.profiler.report.tables import TextCell, TextTable, cells
from litdeploy.profiler.schema import Failure, Measurement, PredictedStudent, Prediction


def render_prediction(prediction: Prediction) -> str:
    """Render the page, self-contained like that of a report."""
    return fill(
        "prediction.html.j2",
        prediction=prediction,
        latencies=latencies(prediction),
        failures=_failures(prediction),
        sizes=_sizes(prediction),
        drawn=chart_module() is not None,
        charts=_charts(prediction),
    )


def latencies(prediction: Prediction) -> TextTable:
    """Latency and speed-up of each depth in each runner, grouped by runner and batch size."""
    groups = tuple(
        tuple(
            cells(
                runner,
                str(batch_size),
                str(student.depth),
                *(tables.median(side) for side in (each.teacher, each.student)),
                tables.speedup(each.comparison),
                f"{student.flop_ratio:.2f}",
                each.comparison.verdict,
            )
            for student, each in members
        )
        for (runner, batch_size), members in _by_runner(prediction).items()
    )
    times = TextCell("teacher ms", kind="teacher"), TextCell("student ms", kind="student")
    heads = cells("runner", "batch", "depth", *times, "speed-up", "FLOPs ÷", "verdict")
    return TextTable("Untrained students, each measured with the teacher", heads, groups)


def _by_runner(prediction: Prediction) -> dict[tuple[str, int], list[tuple[PredictedStudent, Measurement]]]:
    """(runner, batch size) → each student with its measurement."""
    found: dict[tuple[str, int], list[tuple[PredictedStudent, Measurement]]] = {}
    for student in prediction.students:
        for each in student.measurements:
            found.setdefault((runner_of(each), each.batch_size), []).append((student, each))
    return found


def _failures(prediction: Prediction) -> list[tuple[Failure, str]]:
    """Each failure with the depths that it occurred at."""
    depths: dict[Failure, list[str]] = {}
    for student in prediction.students:
        for failure in student.failures:
            depths.setdefault(failure, []).append(str(student.depth))
    return [(failure, ", ".join(found)) for failure, found in depths.items()]


def _sizes(prediction: Prediction) -> TextTable:
    networks = [
        (prediction.teacher, prediction.breakdown),
        *((student.name, student.breakdown) for student in reversed(prediction.students)),
    ]
    rows = tuple(cells(name, str(size.depth), short(size.parameters), short(size.flops)) for name, size in networks)
    heads = cells("", "depth", "parameters", f"FLOPs per {prediction.noun}")
    return TextTable("Teacher and students", heads, (rows,), narrow=True)


def _charts(prediction: Prediction) -> list[TitledChart]:
    """A curve for each runner and batch size; none without matplotlib."""
    charts = chart_module()
    if charts is None:
        return []
    teacher_depth = prediction.breakdown.depth
    found = []
    for index, ((runner, size), members) in enumerate(_by_runner(prediction).items()):
        points = [(student.breakdown.depth, each) for student, each in members]
        chart = charts.depth_latency(f"curve-{index}", runner, size, points, teacher_depth)
        found.append((f"{runner}, batch size {size}, ms", chart))
    return found
