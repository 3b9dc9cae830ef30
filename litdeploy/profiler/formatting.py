"""Format numbers for people: the same in sentences, tables and charts."""

from __future__ import annotations

from litdeploy.profiler.schema import Measurement

_SPACE = "\N{NO-BREAK SPACE}"

# A chart cannot show numbers beyond it, nor what is not finite; a file may hold any number.
LARGEST = 1e15


def milliseconds(value: float) -> str:
    """Milliseconds with three significant digits and no exponent: `0.512`, `12.3`, `1,234`."""
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:,.{1 if value < 100 else 0}f}"


def times(ratio: float) -> str:
    """A ratio: `2.6×`, `0.83×`."""
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def short(number: float) -> str:
    """A count: `856 k`, `1.27 M`, `251 M`, with a no-break space."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            value = number / factor
            return (f"{value:.3g}" if value < 999.5 else f"{value:.0f}") + _SPACE + letter
    return f"{number:g}"


def in_bytes(number: int) -> str:
    """Bytes in powers of 1000: `3.45 MB`."""
    text = short(number)
    return f"{text}B" if _SPACE in text else f"{text}{_SPACE}B"


def relative_error(error: float | None) -> str:
    """A relative RMS error in percent."""
    if error is None:
        return "not finite"
    return f"{100 * error:.1f} %" if error >= 1e-3 or not error else f"{100 * error:.1g} %"


def runner_of(measurement: Measurement) -> str:
    """The runner's name, with the precision if it is not fp32."""
    precision = "" if measurement.precision == "fp32" else f" {measurement.precision}"
    return measurement.runner + precision
