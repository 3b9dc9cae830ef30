"""Printing of all commands: results to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement
from rich.table import Table as Printed
from rich.text import Text

from litdeploy.terminal import CONTROL, PlainConsole, escaped
from litdeploy.terminal import errors as errors
from litdeploy.terminal import note as note
from litdeploy.terminal import output as output

if TYPE_CHECKING:
    from litdeploy.profiler.report.tables import TextTable
    from litdeploy.storage.records import Score

_WIDEST = 1_000


def print_json(content: Any) -> None:
    """Print one JSON document, of a record or of plain data, to standard output, and nothing else."""
    if hasattr(content, "model_dump_json"):
        text: str = content.model_dump_json(indent=2)
    else:
        text = json.dumps(content, indent=2, ensure_ascii=False)
    # All are inside strings: JSON's own escapes of them.
    output.file.write(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def print_table(table: TextTable) -> None:
    """Print a table of the profiler to standard output: within a terminal's width, elsewhere at its full width."""
    printed = _printed(table, "{} ({})")
    wide = Measurement.get(output, output.options.update(max_width=_WIDEST), printed).maximum
    if not output.is_terminal:
        PlainConsole(width=max(wide, output.width)).print(printed)
    elif wide > output.width:
        output.print(_printed(table, "{}\n{}"))
    else:
        output.print(printed)


def _printed(table: TextTable, with_small: str) -> Printed:
    printed = Printed(title=table.caption, title_justify="left", title_style="bold", box=None)
    for index, head in enumerate(table.columns):
        printed.add_column(Text(escaped(head.text)), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        cells = (with_small.format(cell.text, cell.small) if cell.small else cell.text for cell in row)
        printed.add_row(*(Text(escaped(cell)) for cell in cells))
    return printed


def scored(score: Score | None) -> str:
    """`89.67 %`, `PSNR 31.2 dB, SSIM 0.9512`, or a dash if it was not measured."""
    return score.summary() if score else "–"
