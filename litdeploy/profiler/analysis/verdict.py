"""The outcome in one sentence, and the gates that a CI job puts on it."""

from __future__ import annotations

from litdeploy.errors import GateError
from litdeploy.profiler.formatting import runner_of, times
from litdeploy.profiler.measure.statistics import contradicted
from litdeploy.profiler.schema import Measurement, Report, Side
from litdeploy.tasks import task_of_scores


def sentence(teacher: Side, student: Side, measurement: Measurement, device: str, classes: int = 0) -> str:
    """State the gain in speed and its cost in accuracy, on the test split, else on the validation split.

    Args:
        classes: their number, to compare the accuracy with guessing; 0: not known.
    """
    where = f"in {measurement.runner} at batch {measurement.batch_size} on {device}"
    ratio = times(measurement.comparison.speedup)
    match measurement.comparison.verdict:
        case "faster":
            speed = f"{student.name} answers {ratio} as fast as {teacher.name} {where}"
        case "slower":
            speed = f"{student.name} is slower than {teacher.name}: {ratio} as fast {where}"
        case "same":
            speed = f"{student.name} is as fast as {teacher.name}: {ratio} {where}"
        case "unclear":
            speed = (
                f"No clear difference in speed between {student.name} and {teacher.name} {where} (the ratio of the "
                f"medians is {ratio}, but {measurement.comparison.reason})"
            )
    task = task_of_scores(teacher.scores, student.scores)
    return f"{speed}{task.verdict(teacher.scores, student.scores, classes)}."


def check_gates(report: Report, *, min_speedup: float | None = None, max_accuracy_drop: float | None = None) -> None:
    """Check a report against limits. A limit that cannot be checked counts as broken.

    Args:
        min_speedup: for the headline measurement. The low end of its 95 % interval must reach it: a gate on the middle
            of the interval is passed by luck half of the time.
        max_accuracy_drop: in percentage points from teacher to student, between the two figures as displayed, on the
            test split, else on the validation split.

    Raises:
        GateError: a limit is broken; the message names all that are.
    """
    found = (
        None if min_speedup is None else _speedup(report, min_speedup),
        None if max_accuracy_drop is None else _accuracy_drop(report, max_accuracy_drop),
    )
    if broken := [message for message in found if message]:
        raise GateError("; ".join(broken) + ".")


def _speedup(report: Report, least: float) -> str | None:
    """Why the limit is broken; None if it is not."""
    headline = report.headline
    found = headline.comparison
    where = f"{runner_of(headline)} at batch {headline.batch_size}"
    if found.speedup_low is None:
        return (
            f"--min-speedup {least:g}: {where} has too few samples for an interval of its speed-up "
            f"({found.speedup:.2f}×). Increase timing.samples or timing.max_seconds of the target"
        )
    if found.speedup_low < least:
        return (
            f"the speed-up in {where} is {found.speedup:.2f}×, with 95 % confidence between {found.speedup_low:.2f}× "
            f"and {found.speedup_high:.2f}×: its low end is below --min-speedup {least:g}"
        )
    if contradicted(found):
        return f"--min-speedup {least:g}: the speed-up in {where} cannot be trusted ({found.reason})"
    return None


def _accuracy_drop(report: Report, most: float) -> str | None:
    """Why the limit is broken; None if it is not."""
    teacher, student = report.teacher.scores, report.student.scores
    task = task_of_scores(teacher, student)
    if not task.labeled:
        return (
            f"--max-accuracy-drop {most:g}: {report.student.name} {task.makes}, which have no accuracy. Leave it out; "
            f"the report shows the {task.measure}"
        )
    split = task.split(teacher, student)
    change = None if split is None else task.points(teacher[split], student[split])
    if split is None or change is None:
        return f"--max-accuracy-drop {most:g}: the accuracy of both networks on one split is unknown"
    if -change > most:
        return (
            f"the student's accuracy on the {split} split is {-change:g} points below its teacher's "
            f"({task.figure(teacher[split])} → {task.figure(student[split])}): more than --max-accuracy-drop {most:g}"
        )
    return None
