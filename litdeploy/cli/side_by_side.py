"""`litdeploy profile --compare` and `--schema`: what reads reports, and measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from litdeploy.cli.console import output, print_json, print_table


def side_by_side(
    a: Path, b: Path, *, csv: Path | None, html: Path | None, json: bool, gates: dict[str, float | None]
) -> None:
    """Holds two reports side by side, and the second against the gates."""
    from litdeploy.profiler import check_gates, compare_reports
    from litdeploy.profiler.report import side_by_side_page as page
    from litdeploy.profiler.report.csv_export import to_csv
    from litdeploy.profiler.report.outputs import write_output

    found = compare_reports(a, b)
    if csv is not None:
        write_output(csv, to_csv([found.a, found.b]), "--csv")
    if html is not None:
        write_output(html, page.render_side_by_side(found), "--html")
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        output.print(f"A: {a}\nB: {b}", highlight=False, markup=False)
        for table in (page.measurements(found), page.accuracies(found), page.differing(found)):
            if any(table.groups):
                print_table(table)
        output.print(found.sentence, highlight=False, markup=False)
    check_gates(found.b, **gates)


def show_schema() -> None:
    """Prints the JSON Schema of report.json."""
    from litdeploy.profiler import Report

    schema: dict[str, Any] = Report.model_json_schema(mode="serialization")
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
