"""The outcome in one sentence, and no better than it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litdeploy.storage.records import Accuracy, Likeness

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement, Side

# With fewer images a second decimal would be below the weight of one image.
_IMAGES_FOR_TWO_DECIMALS = 10_000


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


def times(ratio: float) -> str:
    """A ratio for people: `2.6×`, `0.83×`."""
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def decimals(images: int) -> int:
    """Decimals of a percentage of that many images."""
    return 2 if images >= _IMAGES_FOR_TWO_DECIMALS else 1


def points(teacher: Accuracy, student: Accuracy) -> float:
    """Percentage points from teacher to student, between the two numbers as they are shown."""
    places = decimals(min(teacher.images, student.images))
    return round(round(100 * student.top1, places) - round(100 * teacher.top1, places), places)


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


def milliseconds(value: float) -> str:
    """Milliseconds with three significant digits and no exponent: `0.512`, `12.3`, `1,234`."""
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:,.{1 if value < 100 else 0}f}"
