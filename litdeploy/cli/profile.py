"""`litdeploy profile`: how much faster the student is than its teacher, and what that cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from litdeploy.cli import options as o
from litdeploy.cli.console import note, output, print_table
from litdeploy.cli.side_by_side import show_schema, side_by_side
from litdeploy.errors import SettingsError

if TYPE_CHECKING:
    from litdeploy.profiler import Prediction, Report


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
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="In place of a bundle: hold two reports side by side, each a report.json or a profiled bundle.",
            metavar="A B",
        ),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            help="Fail with exit code 3 where the low end of the headline speed-up's 95 % interval is below this; with "
            "--compare, B's.",
            min=0,
        ),
    ] = None,
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            help="Fail with exit code 3 where the student's accuracy is more percentage points than this below its "
            "teacher's; with --compare, B's.",
            min=0,
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write what was measured as CSV too.", metavar="FILE")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a trace of a few eager calls of both sides too, for https://ui.perfetto.dev.",
            metavar="FILE.json[.gz]",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the page of --compare or --predict.", metavar="FILE.html")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of report.json, with what each field means.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Measure teacher and student in every runner of the target."""
    if schema:
        show_schema()
        return
    timing: dict[str, Any] = {"cold_cache": cold_cache or None, "pace": pace_of(pace), "processes": processes}
    gates = {"min_speedup": min_speedup, "max_accuracy_drop": max_accuracy_drop}
    if predict is None:
        _refuse_without_predict(
            {"--student-depth": student_depth, "--normalise": normalise, "--input-shape": input_shape}
        )
    if compare is not None:
        measuring = {"--predict": predict, "--teacher": teacher, "--target": target, "--network": network}
        _refuse(
            {
                **measuring,
                "--trace": trace,
                "--cold-cache": timing["cold_cache"],
                "--pace": pace,
                "--processes": processes,
                str(bundle): None if bundle == o.DEFAULT_BUNDLE else bundle,
            },
            "--compare reads two reports and measures nothing. Leave it out, or profile each with it first.",
        )
        side_by_side(*compare, csv=csv, html=html, json=json, gates=gates)
    elif predict is not None:
        _refuse(
            {"--min-speedup": min_speedup, "--max-accuracy-drop": max_accuracy_drop, "--csv": csv, "--trace": trace},
            "--predict has no trained student to hold against it. Leave it out, or profile a bundle.",
        )
        loading = {"network": network, "normalise": normalise, "input_shape": o.shape_of(input_shape)}
        _predict(predict, depths_of(student_depth), html, json, target=target, **loading, **timing)
    else:
        _refuse({"--html": html}, "it is for --compare and --predict; a profile's page is in its bundle. Leave it out.")
        _profile(bundle, csv, json, gates, teacher=teacher, target=target, network=network, trace=trace, **timing)


def _profile(bundle: Path, csv: Path | None, json: bool, gates: dict[str, float | None], **how: Any) -> None:
    from litdeploy.profiler import check_gates, profile
    from litdeploy.profiler.report.csv_export import to_csv
    from litdeploy.profiler.report.outputs import check_output, write_output

    if csv is not None:
        check_output(csv, "--csv")
    report = profile(bundle, progress=note, **how)
    if csv is not None:
        write_output(csv, to_csv([report]), "--csv")
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(report, bundle)
    check_gates(report, **gates)


def _predict(teacher: Path, depths: tuple[int, ...], html: Path | None, json: bool, **how: Any) -> None:
    from litdeploy.profiler import predict
    from litdeploy.profiler.report.outputs import check_output, write_output
    from litdeploy.profiler.report.prediction_page import render_prediction

    if html is not None:
        check_output(html, "--html")
    prediction = predict(teacher, depths, progress=note, **how)
    if html is not None:
        write_output(html, render_prediction(prediction), "--html")
    if json:
        typer.echo(prediction.model_dump_json(indent=2))
    else:
        show_prediction(prediction)


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


def _refuse(options: dict[str, object], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise SettingsError(f"{option}: {why}")


def _refuse_without_predict(options: dict[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise SettingsError(
                f"{option} is for students that are not trained yet. Add --predict FILE, the teacher's file, or leave "
                "it out: a bundle's student is as it is."
            )


def show(report: Report, bundle: Path) -> None:
    """Prints the verdict, the table, and where the page is."""
    from litdeploy.profiler.report import tables
    from litdeploy.storage.records import descent

    output.print(
        f"{report.student.name} against {report.teacher.name}, {report.environment.device_name}", highlight=False
    )
    print_table(tables.latency(report))
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
    if report.lineage:
        output.print(descent(report.lineage), highlight=False)
    output.print(report.verdict, highlight=False)
    note(f"{bundle / 'profile' / 'report.html'}")


def show_prediction(prediction: Prediction) -> None:
    """Prints what each depth would gain."""
    from litdeploy.profiler.report.prediction_page import latencies

    output.print(f"Students of {prediction.teacher}, {prediction.environment.device_name}", highlight=False)
    print_table(latencies(prediction))
