"""Limits that a report is held against, for somebody's CI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litdeploy.errors import GateError
from litdeploy.profiler.analysis.verdict import accuracy_split
from litdeploy.profiler.figures import decimals, percent, points, runner_of
from litdeploy.profiler.measure.statistics import contradicted

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Report


def check_gates(report: Report, *, min_speedup: float | None = None, max_accuracy_drop: float | None = None) -> None:
    """Holds a report against limits; one that cannot be checked is not kept.

    Args:
        min_speedup: of the headline measurement. The low end of its 95 % interval must reach it: a gate that is passed
            by the middle of the interval is passed by luck half of the time.
        max_accuracy_drop: in percentage points, from teacher to student, on the test split, else on the validation
            split: between the two figures as they are shown.

    Raises:
        GateError: a limit is not kept; the message tells all of them.
    """
    found = (
        None if min_speedup is None else _speedup(report, min_speedup),
        None if max_accuracy_drop is None else _accuracy_drop(report, max_accuracy_drop),
    )
    if broken := [message for message in found if message]:
        raise GateError("; ".join(broken) + ".")


def _speedup(report: Report, least: float) -> str | None:
    """Why the limit is not kept; None where it is."""
    headline = report.headline
    found = headline.comparison
    where = f"{runner_of(headline)} at batch {headline.batch_size}"
    if found.speedup_low is None:
        return (
            f"--min-speedup {least:g}: {where} has too few samples for an interval of its speed-up "
            f"({found.speedup:.2f}×). Give timing.samples or timing.max_seconds of the target more"
        )
    if found.speedup_low < least:
        return (
            f"the speed-up in {where} is {found.speedup:.2f}×, with 95 % confidence between {found.speedup_low:.2f}× "
            f"and {found.speedup_high:.2f}×: its low end is below --min-speedup {least:g}"
        )
    if contradicted(found):
        return f"--min-speedup {least:g}: the speed-up in {where} is not to be trusted ({found.reason})"
    return None


def _accuracy_drop(report: Report, most: float) -> str | None:
    """Why the limit is not kept; None where it is."""
    teacher, student = report.teacher.accuracy, report.student.accuracy
    split = accuracy_split(teacher, student)
    if report.student.likeness:
        return (
            f"--max-accuracy-drop {most:g}: {report.student.name} makes images, which have no accuracy. Leave it out; "
            "the report tells how near they come to the teacher's"
        )
    if split is None:
        return f"--max-accuracy-drop {most:g}: the accuracy of both networks on one split is not known"
    before, after = teacher[split], student[split]
    drop = -points(before, after)
    if drop > most:
        places = decimals(min(before.images, after.images))
        return (
            f"the student's accuracy on the {split} split is {drop:.{places}f} points below its teacher's "
            f"({percent(before)} → {percent(after)}): more than --max-accuracy-drop {most:g}"
        )
    return None
