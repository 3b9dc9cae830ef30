"""`litdeploy predict`: how much faster students of several depths would be, before any is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, print_table
from litdeploy.cli.recipe_options import changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.profiler import Prediction


@recipe_options({"network", "normalise", "input_shape", "task"})
def command(
    teacher: o.TeacherFile,
    student_depth: Annotated[
        str | None,
        typer.Option(help="The depths, as in 8,14,20; litdeploy inspect lists the possible ones.", metavar="N,…"),
    ] = None,
    target: o.TargetName = None,
    cold_cache: o.ColdCache = False,
    pace: o.Pace = None,
    html: o.Html = None,
    json: o.Json = False,
    **given: Any,
) -> None:
    """Measure students of several depths before any is trained."""
    from litdeploy.profiler.report.output import check_output, write_output
    from litdeploy.profiler.report.prediction_page import render_prediction

    depths = () if student_depth is None else o.whole_numbers(student_depth, "--student-depth", "8,14,20")
    timing: dict[str, Any] = {"cold_cache": cold_cache or None, "pace": o.pace(pace)}
    if html is not None:
        check_output(html, "--html")
    prediction = litdeploy.predict(teacher, depths, target=target, progress=note, **changes(given), **timing)
    if html is not None:
        write_output(html, render_prediction(prediction), "--html")
    if json:
        print_json(prediction)
    else:
        show(prediction)


def show(prediction: Prediction) -> None:
    """Print the gain of each depth."""
    from litdeploy.profiler.report.prediction_page import latencies

    output.print(f"Students of {prediction.teacher}, {prediction.environment.device_name}", highlight=False)
    print_table(latencies(prediction))
