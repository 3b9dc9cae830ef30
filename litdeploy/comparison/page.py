"""The comparison as one page that needs nothing beside itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from markupsafe import Markup

from litdeploy.comparison.result import headline
from litdeploy.profiler.report.page import fill
from litdeploy.profiler.report.tables import NOTHING, Cell, Table, columns

if TYPE_CHECKING:
    from litdeploy.comparison.result import MethodComparison, Row


def render(result: MethodComparison, figure: Markup | None) -> str:
    """The page as HTML. Whatever came from files (names, paths) is escaped.

    Args:
        figure: None where no student is trained yet.
    """
    return fill(
        "comparison.html.j2",
        "litdeploy.comparison",
        result=result,
        headline=headline(result.rows),
        figure=figure,
        accuracies=accuracies(result),
        trainings=_trainings(result),
        recipe=yaml.safe_dump(result.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        devices=sorted({outcome.device for outcome in result.outcomes}),
    )


def accuracies(result: MethodComparison) -> Table:
    """Methods by depth, the best first."""
    groups = tuple(tuple(_cells(row) for row in result.rows if row.depth == depth) for depth in result.depths)
    heads = columns("depth", "method", "mean", "95 % interval", "seeds", "training, s")
    return Table("Test accuracy by depth, best method first", heads, groups, narrow=True)


def _cells(row: Row) -> tuple[Cell, ...]:
    interval = NOTHING
    if row.low is not None and row.high is not None:
        interval = f"{100 * row.low:.2f}–{100 * row.high:.2f}"
    return (
        Cell(str(row.depth)),
        Cell(row.method),
        Cell(_percent(row.mean), kind="strong"),
        Cell(interval),
        Cell(str(len(row.seeds))),
        Cell(f"{row.seconds:.0f}"),
    )


def _trainings(result: MethodComparison) -> Table:
    rows = tuple(
        (
            Cell(each.method),
            Cell(str(each.depth)),
            Cell(str(each.seed)),
            Cell(_percent(each.test.top1)),
            Cell(_percent(each.validation.top1)),
            Cell(str(each.epochs)),
            Cell(f"{each.seconds:.0f}"),
        )
        for each in result.outcomes
    )
    heads = columns("method", "depth", "seed", "test", "validation", "epochs", "seconds")
    return Table("Each training", heads, (rows,), narrow=True)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"
