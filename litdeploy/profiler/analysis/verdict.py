"""The outcome in one sentence, and no better than it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litdeploy.profiler.figures import decimals, points, times
from litdeploy.storage.records import Accuracy, Likeness

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement, Side


def sentence(teacher: Side, student: Side, measurement: Measurement, device: str) -> str:
    """What was gained in speed, and what it cost in accuracy: of the test split, else of the validation split."""
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
    if split := likeness_split(student.likeness):
        near = student.likeness[split]
        return (
            f"{speed}; its images have a PSNR of {near.psnr:.1f} dB and an SSIM of {near.ssim:.4f} to the teacher's "
            f"({split} split)."
        )
    return f"{speed}, {_cost(teacher.accuracy, student.accuracy)}."


def accuracy_split(teacher: dict[str, Accuracy], student: dict[str, Accuracy]) -> str | None:
    """The split by which both are judged: `test`, else `validation`; None where no split has both accuracies."""
    return next((name for name in ("test", "validation") if name in teacher and name in student), None)


def likeness_split(student: dict[str, Likeness]) -> str | None:
    """The split by which a student's images are judged: `test`, else `validation`; None where neither was measured."""
    return next((name for name in ("test", "validation") if name in student), None)


def _cost(teacher: dict[str, Accuracy], student: dict[str, Accuracy]) -> str:
    split = accuracy_split(teacher, student)
    if split is None:
        return "and what that cost in accuracy was not measured"
    before, after = teacher[split], student[split]
    places = decimals(min(before.images, after.images))
    shown = f"{100 * before.top1:.{places}f} → {100 * after.top1:.{places}f} % on the {split} split"
    change = points(before, after)
    if change == 0:
        return f"at the same accuracy ({shown})"
    return f"at {abs(change):.{places}f} points {'more' if change > 0 else 'less'} accuracy ({shown})"
