"""A prediction as a page: depth against latency in each runner, and what each depth would gain."""

from __future__ import annotations

from litdeploy.profiler.figures import runner_of, short
from litdeploy.profiler.report import tables
from litdeploy.profiler.report.page import Drawn, chart_module, fill
from litdeploy.profiler.report.tables import Cell, Table, columns
from litdeploy.profiler.schema import Failure, Measurement, Prediction


def render_prediction(prediction: Prediction) -> str:
    """The page as HTML, on its own as that of a report is."""
    return fill(
        "prediction.html.j2",
        prediction=prediction,
        latencies=latencies(prediction),
        failures=_failures(prediction),
        sizes=_sizes(prediction),
        drawn=chart_module() is not None,
        curves=_curves(prediction),
    )


def latencies(prediction: Prediction) -> Table:
    """Latency and speed-up of each depth in each runner; the rows of one runner and batch size belong together."""
    groups: dict[str, list[tuple[Cell, ...]]] = {}
    for student in prediction.students:
        for each in student.measurements:
            groups.setdefault(f"{runner_of(each)} {each.batch_size}", []).append(
                (
                    Cell(runner_of(each)),
                    Cell(str(each.batch_size)),
                    Cell(str(student.depth)),
                    *(tables.median(side) for side in (each.teacher, each.student)),
                    tables.speedup(each.comparison),
                    Cell(f"{student.flop_ratio:.2f}"),
                    Cell(each.comparison.verdict),
                )
            )
    heads = columns(
        "runner",
        "batch",
        "depth",
        Cell("teacher ms", kind="teacher"),
        Cell("student ms", kind="student"),
        "speed-up",
        "FLOPs ÷",
        "verdict",
    )
    return Table("Students that are not trained, each beside the teacher", heads, tuple(map(tuple, groups.values())))


def _failures(prediction: Prediction) -> list[tuple[Failure, str]]:
    """What could not be measured, each with the depths that it is told of."""
    depths: dict[Failure, list[str]] = {}
    for student in prediction.students:
        for failure in student.failures:
            depths.setdefault(failure, []).append(str(student.depth))
    return [(failure, ", ".join(told)) for failure, told in depths.items()]


def _sizes(prediction: Prediction) -> Table:
    networks = [
        (prediction.teacher, prediction.breakdown),
        *((student.name, student.breakdown) for student in reversed(prediction.students)),
    ]
    rows = tuple(
        (Cell(name), Cell(str(size.depth)), Cell(short(size.parameters)), Cell(short(size.flops)))
        for name, size in networks
    )
    heads = columns("", "depth", "parameters", f"FLOPs per {prediction.noun}")
    return Table("Teacher and students", heads, (rows,), narrow=True)


def _curves(prediction: Prediction) -> list[Drawn]:
    """A curve for each runner and batch size; none without matplotlib."""
    charts = chart_module()
    if charts is None:
        return []
    found: dict[tuple[str, int], list[tuple[int, Measurement]]] = {}
    for student in prediction.students:
        for each in student.measurements:
            found.setdefault((runner_of(each), each.batch_size), []).append((student.breakdown.depth, each))
    return [
        (
            f"{runner}, batch size {size}, ms",
            charts.prediction(f"curve-{index}", runner, size, points, prediction.breakdown.depth),
        )
        for index, ((runner, size), points) in enumerate(found.items())
    ]
