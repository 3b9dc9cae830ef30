"""Tasks: what a network's output means. One file a task, one row of `TASKS`; the contract is in `task.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litdeploy.config.spec import AnyInput, NetworkSpec
from litdeploy.storage.records import Measures, Score
from litdeploy.tasks.classification import Classification
from litdeploy.tasks.dense import Dense
from litdeploy.tasks.embedding import EmbeddingTask
from litdeploy.tasks.task import Curve, Measure, ScoreRow, Task
from litdeploy.tasks.tokens import TokensTask
from litdeploy.tasks.translation import Translation
from litdeploy.tasks.tree import Tree

__all__ = ["CURVES", "TASKS", "Curve", "Measure", "ScoreRow", "Task", "task_of", "task_of_scores"]

TASKS: dict[str, Task[Any]] = {
    task.name: task for task in (Classification(), EmbeddingTask(), Dense(), TokensTask(), Translation(), Tree())
}

# Every curve that a training may have, by its metric.
CURVES: dict[str, Curve] = {curve.metric: curve for task in TASKS.values() for curve in task.curves}


def task_of(what: NetworkSpec | AnyInput | None) -> Task[Any]:
    """The task of a network by its spec; by its input alone, the one that its spec would have by default.

    Args:
        what: None: an exported file that does not state its input, which is a classifier.
    """
    if isinstance(what, NetworkSpec):
        return TASKS[what.task_name]
    return TASKS["classification" if what is None else what.task]


def task_of_scores(*sides: Mapping[str, Score]) -> Task[Any]:
    """The task whose metric these scores are; classification if there are none. For reports, which hold no spec."""
    for score in (score for side in sides for score in side.values()):
        if isinstance(score, Measures):
            return TASKS[score.task]
        return next(task for task in TASKS.values() if isinstance(score, task.score))
    return TASKS["classification"]
