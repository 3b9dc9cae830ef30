"""`litdeploy diff`: two reports compared; measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import litdeploy
from litdeploy.cli import options as o
from litdeploy.cli.console import output, print_json, print_table

_Report = Annotated[Path, typer.Argument(help="A report.json, or a profiled bundle.")]


def command(
    a: _Report,
    b: _Report,
    csv: o.Csv = None,
    html: o.Html = None,
    json: o.Json = False,
    min_speedup: o.MinSpeedup = None,
    max_accuracy_drop: o.MaxAccuracyDrop = None,
) -> None:
    """Compare two reports.

    The gates are for B.
    """
    from litdeploy.profiler import check_gates
    from litdeploy.profiler.report import diff_page as page
    from litdeploy.profiler.report.output import to_csv, write_output

    found = litdeploy.diff(a, b)
    if csv is not None:
        write_output(csv, to_csv([found.a, found.b]), "--csv")
    if html is not None:
        write_output(html, page.render_diff(found), "--html")
    if json:
        print_json(found)
    else:
        output.print(f"A: {a}\nB: {b}", highlight=False, markup=False)
        for table in (page.measurements(found), *page.scores(found), page.differing(found)):
            if any(table.groups):
                print_table(table)
        output.print(found.sentence, highlight=False, markup=False)
    check_gates(found.b, min_speedup=min_speedup, max_accuracy_drop=max_accuracy_drop)
