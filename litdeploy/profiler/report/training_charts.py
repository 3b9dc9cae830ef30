"""The training curves of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from litdeploy.profiler.report.drawing import FIRST, MUTED, SECOND, panel, svg


def training_loss(rows: Sequence[dict[str, Any]]) -> Markup | None:
    """The training loss over the epochs; None where the rows have none."""
    lines = _lines(rows, "loss")
    if not lines:
        return None
    with panel(height=220) as (figure, axes):
        _draw_lines(axes, lines)
        if min(min(values) for _, _, values in lines) >= 0:  # an adversarial loss may be below
            axes.set_ylim(bottom=0)
        _finish_time_axis(figure, axes)
    first, last = lines[0][2][0], lines[-1][2][-1]
    return svg(figure, "training-loss", "Training loss over the epochs", f"From {first:.3g} to {last:.3g}.")


def validation_accuracy(rows: Sequence[dict[str, Any]], teacher: float | None) -> Markup | None:
    """Validation accuracy over the epochs, in percent, and the teacher's as a line (0–1); None where there is none."""
    lines = [(phase, xs, [100 * y for y in ys]) for phase, xs, ys in _lines(rows, "validation_top1")]
    if not lines:
        return None
    with panel(height=220) as (figure, axes):
        if teacher is not None:
            axes.axhline(100 * teacher, color=FIRST, lw=1.4, ls=(0, (4, 3)))
        _draw_lines(axes, lines)
        _finish_time_axis(figure, axes)
    told = f"From {lines[0][2][0]:.1f} to {lines[-1][2][-1]:.1f} %."
    if teacher is not None:
        told += f" The teacher has {100 * teacher:.1f} %."
    return svg(figure, "validation-accuracy", "Validation accuracy over the epochs", told)


def validation_likeness(rows: Sequence[dict[str, Any]]) -> Markup | None:
    """PSNR of validation images to the teacher's over the epochs, in dB; None where the rows have none."""
    lines = _lines(rows, "validation_psnr")
    if not lines:
        return None
    with panel(height=220) as (figure, axes):
        _draw_lines(axes, lines)
        _finish_time_axis(figure, axes)
    told = f"From {lines[0][2][0]:.1f} to {lines[-1][2][-1]:.1f} dB."
    return svg(figure, "validation-likeness", "PSNR of validation images to the teacher's over the epochs", told)


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
        axes.plot(epochs, values, color=SECOND, lw=1.8, marker="o", ms=4 if len(epochs) < 40 else 0)
        if index:
            axes.axvline(epochs[0] - 0.5, color=MUTED, lw=1.0, ls=(0, (1, 2)))


def _finish_time_axis(figure: Figure, axes: Axes) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("epoch")
    figure.subplots_adjust(left=0.13, right=0.985, top=0.95, bottom=0.23)
