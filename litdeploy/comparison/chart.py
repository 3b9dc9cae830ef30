"""The figure that the literature draws: accuracy over depth, a line a method."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from litdeploy.comparison.result import MethodComparison, headline
from litdeploy.profiler.report.drawing import FIRST, MUTED, SECOND, SERIES, panel, standalone_svg, svg

# LIT comes first, in the student's colour. Told apart without colour by their markers.
_COLOURS = (SECOND, *SERIES)
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<")


class Drawing(NamedTuple):
    """One figure twice: as part of a page that lends it its colours, and as a file of its own."""

    inline: Markup
    alone: str


def accuracy_over_depth(result: MethodComparison) -> Drawing | None:
    """Mean test accuracy over depth, and each seed's as a small circle; None while there is no cell."""
    if not result.rows:
        return None
    methods = sorted({row.method for row in result.rows}, key=lambda name: (name != "lit", name))
    with panel(height=300, width=520) as (figure, axes):
        if result.teacher_accuracy is not None:
            axes.axhline(100 * result.teacher_accuracy.top1, color=FIRST, lw=1.4, ls=(0, (4, 3)), label="teacher")
        for index, method in enumerate(methods):
            rows = [row for row in result.rows if row.method == method]
            each = [outcome for outcome in result.outcomes if outcome.method == method]
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            depths, means = [row.depth for row in rows], [100 * row.mean for row in rows]
            axes.plot(depths, means, color=colour, marker=marker, ms=6, lw=1.8, label=method)
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
        figure.subplots_adjust(left=0.1, right=0.75, top=0.96, bottom=0.16)
    inline = svg(figure, "accuracy-over-depth", "Test accuracy over depth", headline(result.rows))
    return Drawing(inline, standalone_svg(figure))
