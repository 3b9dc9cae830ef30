"""Printing of all commands: results to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Printed
from rich.text import Text

if TYPE_CHECKING:
    from litdeploy.profiler.report.tables import TextTable
    from litdeploy.storage.records import Score
    from litdeploy.trainer import Progress

# Characters that a terminal interprets as commands, or that reverse the direction of reading.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class _Plain(Console):
    """Prints text without interpreting it: names and messages may come from an untrusted file."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(_escaped(text), **options)


def _escaped(text: str) -> str:
    """Text from an untrusted file as a terminal may show it: its control characters written out."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


output = _Plain(soft_wrap=True)
errors = _Plain(stderr=True, soft_wrap=True)

_WIDEST = 1_000


def print_json(content: Any) -> None:
    """Print one JSON document, of a record or of plain data, to standard output, and nothing else."""
    if hasattr(content, "model_dump_json"):
        text: str = content.model_dump_json(indent=2)
    else:
        text = json.dumps(content, indent=2, ensure_ascii=False)
    # All are inside strings: JSON's own escapes of them.
    output.file.write(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def note(text: str) -> None:
    """Print a line to standard error."""
    errors.print(text, markup=False, highlight=False)


def print_table(table: TextTable) -> None:
    """Print a table of the profiler to standard output: within a terminal's width, elsewhere at its full width."""
    printed = _printed(table, "{} ({})")
    wide = Measurement.get(output, output.options.update(max_width=_WIDEST), printed).maximum
    if not output.is_terminal:
        _Plain(width=max(wide, output.width)).print(printed)
    elif wide > output.width:
        output.print(_printed(table, "{}\n{}"))
    else:
        output.print(printed)


def _printed(table: TextTable, with_small: str) -> Printed:
    printed = Printed(title=table.caption, title_justify="left", title_style="bold", box=None)
    for index, head in enumerate(table.columns):
        printed.add_column(Text(_escaped(head.text)), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        cells = (with_small.format(cell.text, cell.small) if cell.small else cell.text for cell in row)
        printed.add_row(*(Text(_escaped(cell)) for cell in cells))
    return printed


def scored(score: Score | None) -> str:
    """`89.67 %`, `PSNR 31.2 dB, SSIM 0.9512`, or a dash if it was not measured."""
    return score.summary() if score else "–"


def epoch_line(row: dict[str, Any], noun: str) -> str:
    """One line on an epoch.

    Args:
        row: its line of metrics.jsonl.
        noun: what the network takes.
    """
    from litdeploy.tasks import CURVES

    curve = next(curve for curve in CURVES.values() if f"validation_{curve.metric}" in row)
    validation = f"{curve.factor * row[f'validation_{curve.metric}']:.2f} {curve.unit}"
    return (
        f"{row['phase']:>8} {row['epoch']:>3}/{row['epochs']}   loss {row['loss']:.4f}   "
        f"validation {validation}   {row['seconds']:.1f} s   {row['images_per_second']:.0f} {noun}s/s"
    )


def training_progress() -> Progress:
    """Progress of a training: a bar with rate and remaining time on a terminal, one line per epoch elsewhere."""
    # The trainer imports torch, which `litdeploy --help` must not.
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from litdeploy.trainer import Progress
    from litdeploy.trainer.progress import Row

    class ConsoleProgress(Progress):
        def __init__(self) -> None:
            self.bar: Bar | None = None

        def note(self, text: str) -> None:
            note(text)

        def begin(self, phase: str, epoch: int, epochs: int, images: int) -> None:
            if not errors.is_terminal:
                return
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[noun]}s"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=errors,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(f"{phase} {epoch}/{epochs}", total=images, rate="", noun=self.noun)

        def advance(self, images: int) -> None:
            if self.bar is not None:
                speed = self.bar.tasks[0].speed
                self.bar.update(self.task, advance=images, rate=f"{speed:.0f} {self.noun}s/s" if speed else "")

        def end(self, row: Row) -> None:
            self.close()
            note(epoch_line(row, self.noun))

        def close(self) -> None:
            if self.bar is not None:
                self.bar.stop()
                self.bar = None

    return ConsoleProgress()
