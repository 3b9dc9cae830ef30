"""`litdeploy profile`: how much faster the student is than its teacher, and what that cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output

if TYPE_CHECKING:
    from litdeploy.profiler import Report


def command(
    bundle: o.BundlePath = o.DEFAULT_BUNDLE,
    teacher: Annotated[
        Path | None, typer.Option(help="The teacher's file, where it is no longer where it was.")
    ] = None,
    target: o.TargetName = None,
    network: o.Network = None,
    json: o.Json = False,
) -> None:
    """Measure teacher and student in every runner of the target."""
    from litdeploy.profiler import profile

    report = profile(bundle, teacher=teacher, target=target, network=network, progress=note)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(report, bundle)


def show(report: Report, bundle: Path) -> None:
    """Prints the verdict, the table, and where the page is."""
    table = Table(
        title=f"{report.student.name} against {report.teacher.name}, {report.environment.device_name}", box=None
    )
    table.add_column("runner")
    for name in ("batch", "teacher ms", "p90", "student ms", "p90", "images/s", "speed-up"):
        table.add_column(name, justify="right")
    for found in report.measurements:
        table.add_row(
            found.runner,
            str(found.batch_size),
            f"{found.teacher.median_ms:.2f}",
            _ms(found.teacher.p90_ms),
            f"{found.student.median_ms:.2f}",
            _ms(found.student.p90_ms),
            f"{found.student.images_per_second:.0f}",
            f"{found.comparison.speedup:.2f}×",
        )
    output.print(table)
    output.print(
        f"Teacher over student: depth {report.depth_ratio:.2f}, parameters {report.parameter_ratio:.2f}, "
        f"FLOPs {report.flop_ratio:.2f}.",
        highlight=False,
    )
    output.print(report.verdict, highlight=False)
    note(f"{bundle / 'profile' / 'report.html'}")


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
