"""How figures are told to people, on the page and in charts; sentences have theirs in `verdict`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy.special import ndtri

from litdeploy.profiler.analysis.verdict import decimals

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement
    from litdeploy.storage.records import Accuracy

_SPACE = "\N{NO-BREAK SPACE}"

# Beyond it, and for what is not finite, a chart has no place; a file may claim any number.
LARGEST = 1e15


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
