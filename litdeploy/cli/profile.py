"""`litdeploy profile`: how much faster the student is than its teacher, and what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_json, print_table
from litdeploy.cli.recipe_options import changes, recipe_options

if TYPE_CHECKING:
    from litdeploy.profiler import Report


@recipe_options({"network"})
def command(
    bundle: o.BundlePath = o.DEFAULT_BUNDLE,
    target: o.TargetName = None,
    teacher: o.MovedTeacherFile = None,
    cold_cache: o.ColdCache = False,
    pace: o.Pace = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Repeat all measurements in this many new processes, one after another.", min=1),
    ] = None,
    csv: o.Csv = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a trace of a few eager calls of both networks too, for https://ui.perfetto.dev.",
            metavar="FILE.json[.gz]",
        ),
    ] = None,
    json: o.Json = False,
    min_speedup: o.MinSpeedup = None,
    max_accuracy_drop: o.MaxAccuracyDrop = None,
    **given: Any,
) -> None:
    """Measure teacher and student in every runner of the target.

    See also predict (students before they are trained), diff (two reports) and schema (the fields of report.json).
    """
    from litdeploy.profiler import check_gates
    from litdeploy.profiler.report.output import check_output, to_csv, write_output

    timing: dict[str, Any] = {"cold_cache": cold_cache or None, "pace": o.pace(pace), "processes": processes}
    if csv is not None:
        check_output(csv, "--csv")
    report = litdeploy.profile(
        bundle, teacher=teacher, target=target, trace=trace, progress=note, **changes(given), **timing
    )
    if csv is not None:
        write_output(csv, to_csv([report]), "--csv")
    if json:
        print_json(report)
    else:
        show(report, bundle)
    check_gates(report, min_speedup=min_speedup, max_accuracy_drop=max_accuracy_drop)


def show(report: Report, bundle: Path) -> None:
    """Print the verdict, the table, and the page's path."""
    from litdeploy.profiler.report import tables
    from litdeploy.storage.records import descent

    output.print(
        f"{report.student.name} against {report.teacher.name}, {report.environment.device_name}", highlight=False
    )
    print_table(tables.latency(report))
    for failure in report.failures:
        batch = "" if failure.batch_size is None else f", batch {failure.batch_size}"
        note(f"{failure.runner}{batch}: not measured: {failure.message}")
    for text in report.warnings:
        note(f"warning: {text}")
    for finding in report.findings:
        output.print(f"- {finding.sentence}", highlight=False, markup=False)
    output.print(
        f"Teacher over student: depth {report.depth_ratio:.2f}, parameters {report.parameter_ratio:.2f}, "
        f"FLOPs {report.flop_ratio:.2f}.",
        highlight=False,
    )
    if report.lineage:
        output.print(descent(report.lineage), highlight=False)
    output.print(report.verdict, highlight=False)
    note(f"{bundle / 'profile' / 'report.html'}")
