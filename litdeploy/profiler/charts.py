"""The page's charts as SVG that takes its colours and letters from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from litdeploy.profiler.verdict import milliseconds

if TYPE_CHECKING:
    from litdeploy.profiler.report import Measurement

# Colours that stand for the page's own: an SVG is drawn once and must follow the page from light to dark.
_TEXT, _MUTED, _RULE, _TEACHER, _STUDENT = (f"#0a0b0{number}" for number in range(1, 6))
_VARIABLES = {_TEXT: "text", _MUTED: "muted", _RULE: "rule", _TEACHER: "teacher", _STUDENT: "student"}

# A panel is drawn as wide as a phone's page, where it fills the line; elsewhere several stand side by side. Its units
# are 1/72 inch, which the page shows as one CSS pixel.
_WIDTH = 5.0
_UNIT = 1 / 72
_FONT_SIZE = 14.0
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "litdeploy",
    "font.size": _FONT_SIZE,
    "text.color": _TEXT,
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _RULE,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0.0,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
}
_ROW_UNITS = 74  # height of one runner: its name and two bars
_BAR = 0.26  # of a row


def latency(batch_size: int, measurements: Sequence[Measurement]) -> Markup:
    """Bars of both sides' medians in each runner at one batch size, with a line over the middle half of the samples."""
    rows = len(measurements)
    with _panel(height=rows * _ROW_UNITS + 12) as (figure, axes):
        axes.axis("off")
        for row, measurement in enumerate(measurements):
            axes.text(0, row - 0.36, measurement.runner, va="center", color=_MUTED)
            for offset, side, colour in ((-0.08, measurement.teacher, _TEACHER), (0.22, measurement.student, _STUDENT)):
                axes.barh(row + offset, side.median_ms, _BAR, color=colour)
                axes.plot((side.q1_ms, side.q3_ms), (row + offset,) * 2, color=_TEXT, lw=1.4, solid_capstyle="butt")
                axes.annotate(
                    f"{milliseconds(side.median_ms)} ms",
                    (side.q3_ms, row + offset),
                    (6, 0),
                    textcoords="offset points",
                    va="center_baseline",
                )
        longest = max(side.q3_ms for each in measurements for side in (each.teacher, each.student))
        axes.set_xlim(0, longest * 1.36)  # room for the label of the longest bar
        axes.set_ylim(rows - 0.45, -0.6)
        figure.subplots_adjust(left=0.003, right=1, top=1, bottom=0)
    told = "; ".join(
        f"{escape(each.runner)}: teacher {milliseconds(each.teacher.median_ms)}, "
        f"student {milliseconds(each.student.median_ms)}"
        for each in measurements
    )
    return _svg(figure, f"latency-{batch_size}", f"Latency at batch size {batch_size}", f"Medians in ms. {told}.")


def training_loss(rows: Sequence[dict[str, Any]]) -> Markup | None:
    """The training loss over the epochs; None where the rows have none."""
    lines = _lines(rows, "loss")
    if not lines:
        return None
    with _panel(height=220) as (figure, axes):
        _draw_lines(axes, lines)
        axes.set_ylim(bottom=0)
        _finish_time_axis(figure, axes)
    first, last = lines[0][2][0], lines[-1][2][-1]
    return _svg(figure, "training-loss", "Training loss over the epochs", f"From {first:.3g} to {last:.3g}.")


def validation_accuracy(rows: Sequence[dict[str, Any]], teacher: float | None) -> Markup | None:
    """Validation accuracy over the epochs, in percent, and the teacher's as a line (0–1); None where there is none."""
    lines = [(phase, xs, [100 * y for y in ys]) for phase, xs, ys in _lines(rows, "validation_top1")]
    if not lines:
        return None
    with _panel(height=220) as (figure, axes):
        if teacher is not None:
            axes.axhline(100 * teacher, color=_TEACHER, lw=1.4, ls=(0, (4, 3)))
        _draw_lines(axes, lines)
        _finish_time_axis(figure, axes)
    told = f"From {lines[0][2][0]:.1f} to {lines[-1][2][-1]:.1f} %."
    if teacher is not None:
        told += f" The teacher has {100 * teacher:.1f} %."
    return _svg(figure, "validation-accuracy", "Validation accuracy over the epochs", told)


def validation_likeness(rows: Sequence[dict[str, Any]]) -> Markup | None:
    """PSNR of validation images to the teacher's over the epochs, in dB; None where the rows have none."""
    lines = _lines(rows, "validation_psnr")
    if not lines:
        return None
    with _panel(height=220) as (figure, axes):
        _draw_lines(axes, lines)
        _finish_time_axis(figure, axes)
    told = f"From {lines[0][2][0]:.1f} to {lines[-1][2][-1]:.1f} dB."
    return _svg(figure, "validation-likeness", "PSNR of validation images to the teacher's over the epochs", told)


def _lines(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[str, list[float], list[float]]]:
    """One line (phase, epochs, values) a phase: each phase has a loss of its own, so no line joins them."""
    lines = []
    for phase, members in groupby(rows, lambda row: row.get("phase", "")):
        known = [
            (row["epoch"], row[key]) for row in members if _is_number(row.get("epoch")) and _is_number(row.get(key))
        ]
        if known:
            lines.append((str(phase), [float(x) for x, _ in known], [float(y) for _, y in known]))
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw_lines(axes: Axes, lines: Sequence[tuple[str, list[float], list[float]]]) -> None:
    for index, (_, epochs, values) in enumerate(lines):
        axes.plot(epochs, values, color=_STUDENT, lw=1.8, marker="o", ms=4 if len(epochs) < 40 else 0)
        if index:
            axes.axvline(epochs[0] - 0.5, color=_MUTED, lw=1.0, ls=(0, (1, 2)))


def _finish_time_axis(figure: Figure, axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("epoch")
    figure.subplots_adjust(left=0.13, right=0.985, top=0.95, bottom=0.23)


@contextmanager
def _panel(height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height * _UNIT), facecolor="none")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an inline element that names itself to a screen reader."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Several drawings share the page, so each needs ids of its own; and HTML knows `href` without its namespace.
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawing).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    width, height = figure.get_size_inches() * 72
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{title}</title><desc id="{name}-description">{description}</desc>'
    )
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: opening, drawing).strip())
