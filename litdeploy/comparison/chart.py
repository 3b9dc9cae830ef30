"""The figure that the literature draws: accuracy over depth, a line a method."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from litdeploy.comparison.result import MethodComparison, headline
from litdeploy.profiler.svg import MUTED, SERIES, STUDENT, STYLE, TEACHER, UNIT, inline_svg, standalone_svg

# LIT comes first, in the student's colour. Told apart without colour by their markers.
_COLOURS = (STUDENT, *SERIES)
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<")
_SIZE = (7.2, 300)  # inch, units


class Drawing(NamedTuple):
    """One figure twice: as part of a page that lends it its colours, and as a file of its own."""

    inline: Markup
    alone: str


def accuracy_over_depth(result: MethodComparison) -> Drawing | None:
    """Mean test accuracy over depth, and each seed's as a small circle; None while there is no cell."""
    if not result.rows:
        return None
    methods = list(dict.fromkeys(row.method for row in result.rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(_SIZE[0], _SIZE[1] * UNIT), facecolor="none")
        axes = figure.add_subplot()
        if result.teacher_accuracy is not None:
            axes.axhline(100 * result.teacher_accuracy.top1, color=TEACHER, lw=1.4, ls=(0, (4, 3)), label="teacher")
        for index, method in enumerate(sorted(methods, key=lambda name: (name != "lit", name))):
            rows = sorted((row for row in result.rows if row.method == method), key=lambda row: row.depth)
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            depths, means = [row.depth for row in rows], [100 * row.mean for row in rows]
            axes.plot(depths, means, color=colour, marker=marker, ms=6, lw=1.8, label=method)
            each = [outcome for outcome in result.outcomes if outcome.method == method]
            axes.scatter(
                [outcome.depth for outcome in each],
                [100 * outcome.test.top1 for outcome in each],
                s=14,
                facecolors="none",
                edgecolors=colour,
                linewidths=0.9,
            )
        axes.set_xticks(result.depths)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("depth")
        axes.set_ylabel("test accuracy, %")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=MUTED)
        figure.subplots_adjust(left=0.1, right=0.77, top=0.96, bottom=0.16)
    inline = inline_svg(figure, "accuracy-over-depth", "Test accuracy over depth", headline(result.rows))
    return Drawing(inline, standalone_svg(figure))
