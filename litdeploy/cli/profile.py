"""`litdeploy profile`: how much faster the student is than its teacher, and what that cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output
from litdeploy.errors import SettingsError

if TYPE_CHECKING:
    from litdeploy.profiler import Prediction, Report
    from litdeploy.profiler.statistics import Comparison


def command(
    bundle: o.BundlePath = o.DEFAULT_BUNDLE,
    teacher: Annotated[
        Path | None, typer.Option(help="The teacher's file, where it is no longer where it was.")
    ] = None,
    target: o.TargetName = None,
    network: o.Network = None,
    cold_cache: Annotated[bool, typer.Option("--cold-cache", help="Empty the caches before each timed call.")] = False,
    pace: Annotated[
        str | None, typer.Option(help="Call at even times and not one after the other.", metavar="N/s")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Repeat the whole in that many fresh processes, one after the other.", min=1)
    ] = None,
    predict: Annotated[
        Path | None,
        typer.Option(help="In place of a bundle: time students of this teacher that are not trained.", metavar="FILE"),
    ] = None,
    student_depth: Annotated[str | None, typer.Option(help="With --predict: their depths.", metavar="N,N,…")] = None,
    normalise: o.Normalise = None,
    input_shape: o.InputShape = None,
    json: o.Json = False,
) -> None:
    """Measure teacher and student in every runner of the target."""
    from litdeploy.profiler import predict as predict_students
    from litdeploy.profiler import profile

    timing: dict[str, Any] = {"cold_cache": cold_cache or None, "pace": pace_of(pace), "processes": processes}
    if predict is not None:
        prediction = predict_students(
            predict,
            depths_of(student_depth),
            target=target,
            network=network,
            normalise=normalise,
            input_shape=o.shape_of(input_shape),
            progress=note,
            **timing,
        )
        if json:
            typer.echo(prediction.model_dump_json(indent=2))
        else:
            show_prediction(prediction)
        return
    _refuse_without_predict({"--student-depth": student_depth, "--normalise": normalise, "--input-shape": input_shape})
    report = profile(bundle, teacher=teacher, target=target, network=network, progress=note, **timing)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(report, bundle)


def pace_of(text: str | None) -> float | None:
    """Reads `--pace 100/s`; the unit may be left out.

    Raises:
        SettingsError: it is no number above zero.
    """
    if text is None:
        return None
    try:
        pace = float(text.removesuffix("/s"))
    except ValueError:
        pace = math.nan
    if not 0 < pace < math.inf:
        raise SettingsError(f"--pace {text}: calls a second are needed, as in --pace 100/s.")
    return pace


def depths_of(text: str | None) -> tuple[int, ...]:
    """Reads `--student-depth 8,14,20`.

    Raises:
        SettingsError: there is none, or they are no whole numbers.
    """
    example = "Say which depths, as in --student-depth 8,14,20; `litdeploy inspect FILE` lists those possible."
    if text is None:
        raise SettingsError(f"--predict: no depth was given. {example}")
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(
            f"--student-depth {text}: whole numbers with commas between are needed. {example}"
        ) from None


def _refuse_without_predict(options: dict[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise SettingsError(
                f"{option} is for students that are not trained yet. Add --predict FILE, the teacher's file, or leave "
                "it out: a bundle's student is as it is."
            )


def show(report: Report, bundle: Path) -> None:
    """Prints the verdict, the table, and where the page is."""
    table = Table(
        title=f"{report.student.name} against {report.teacher.name}, {report.environment.device_name}", box=None
    )
    table.add_column("runner")
    for name in ("batch", "teacher ms", "student ms", "images/s", "speed-up", "95 %", "verdict"):
        table.add_column(name, justify="right")
    for found in report.measurements:
        table.add_row(
            found.runner,
            str(found.batch_size),
            f"{found.teacher.median_ms:.2f}",
            f"{found.student.median_ms:.2f}",
            f"{found.student.images_per_second:.0f}",
            f"{found.comparison.speedup:.2f}×",
            _interval(found.comparison),
            found.comparison.verdict,
        )
    output.print(table)
    for failure in report.failures:
        batch = "" if failure.batch_size is None else f", batch {failure.batch_size}"
        note(f"{failure.runner}{batch}: not measured: {failure.message}")
    for finding in report.findings:
        output.print(f"- {finding.sentence}", highlight=False, markup=False)
    output.print(
        f"Teacher over student: depth {report.depth_ratio:.2f}, parameters {report.parameter_ratio:.2f}, "
        f"FLOPs {report.flop_ratio:.2f}.",
        highlight=False,
    )
    output.print(report.verdict, highlight=False)
    note(f"{bundle / 'profile' / 'report.html'}")


def show_prediction(prediction: Prediction) -> None:
    """Prints what each depth would gain."""
    table = Table(
        title=f"Students of {prediction.teacher}, not trained, {prediction.environment.device_name}", box=None
    )
    table.add_column("student")
    for name in ("depth", "FLOPs ÷"):
        table.add_column(name, justify="right")
    table.add_column("runner")
    for name in ("batch", "teacher ms", "student ms", "speed-up", "95 %", "verdict"):
        table.add_column(name, justify="right")
    for student in prediction.students:
        for row, found in enumerate(student.measurements):
            head = (student.name, str(student.depth), f"{student.flop_ratio:.2f}") if not row else ("", "", "")
            table.add_row(
                *head,
                found.runner,
                str(found.batch_size),
                f"{found.teacher.median_ms:.2f}",
                f"{found.student.median_ms:.2f}",
                f"{found.comparison.speedup:.2f}×",
                _interval(found.comparison),
                found.comparison.verdict,
            )
    output.print(table)


def _interval(comparison: Comparison) -> str:
    """`2.61–2.75`."""
    low, high = comparison.speedup_low, comparison.speedup_high
    return "–" if low is None or high is None else f"{low:.2f}–{high:.2f}"
