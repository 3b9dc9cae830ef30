"""Numbers as text for people: times, ratios, counts, bytes, percentages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy.special import ndtri

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement
    from litdeploy.storage.records import Accuracy

_SPACE = "\N{NO-BREAK SPACE}"

# Beyond it, and for what is not finite, a chart has no place; a file may claim any number.
LARGEST = 1e15
# With fewer images a second decimal would be below the weight of one image.
_IMAGES_FOR_TWO_DECIMALS = 10_000


def milliseconds(value: float) -> str:
    """Milliseconds with three significant digits and no exponent: `0.512`, `12.3`, `1,234`."""
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:,.{1 if value < 100 else 0}f}"


def times(ratio: float) -> str:
    """A ratio for people: `2.6×`, `0.83×`."""
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def short(number: float) -> str:
    """A count for people: `856 k`, `1.27 M`, `251 M`, with a space that no line breaks at."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            value = number / factor
            return (f"{value:.3g}" if value < 999.5 else f"{value:.0f}") + _SPACE + letter
    return f"{number:g}"


def in_bytes(number: int) -> str:
    """Bytes for people, in powers of 1000: `3.45 MB`."""
    text = short(number)
    return f"{text}B" if _SPACE in text else f"{text}{_SPACE}B"


def decimals(images: int) -> int:
    """Decimals of a percentage of that many images."""
    return 2 if images >= _IMAGES_FOR_TWO_DECIMALS else 1


def percent(accuracy: Accuracy | None) -> str:
    """An accuracy for people, with as many decimals as its images allow."""
    return "not measured" if accuracy is None else f"{100 * accuracy.top1:.{decimals(accuracy.images)}f} %"


def relative_error(error: float | None) -> str:
    """A relative RMS error for people, in percent."""
    if error is None:
        return "not finite"
    return f"{100 * error:.1f} %" if error >= 1e-3 or not error else f"{100 * error:.1g} %"


def runner_of(measurement: Measurement) -> str:
    """The runner's name, with the precision where it is not fp32."""
    precision = "" if measurement.precision == "fp32" else f" {measurement.precision}"
    return measurement.runner + precision


def accuracy_interval(accuracy: Accuracy) -> tuple[float, float]:
    """95 % interval of an accuracy on so many images, 0–1 (Wilson, J. Am. Stat. Assoc. 1927)."""
    n, p, z = accuracy.images, accuracy.top1, float(ndtri(0.975))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def points(teacher: Accuracy, student: Accuracy) -> float:
    """Percentage points from teacher to student, between the two numbers as they are shown."""
    places = decimals(min(teacher.images, student.images))
    return round(round(100 * student.top1, places) - round(100 * teacher.top1, places), places)
