"""Two reports held side by side: two commits, two machines, two students."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from litdeploy.profiler.figures import milliseconds, runner_of, times
from litdeploy.profiler.measure.statistics import contradicted, judge
from litdeploy.profiler.schema import Measurement, Report, Verdict, open_report
from litdeploy.storage.records import Record

# What is told apart from the rest, or says nothing of how it was measured.
_NOT_COMPARED = ("date", "load_average")


class Ratio(Record):
    """How many times as large a figure of A is as the same figure of B.

    Attributes:
        ratio: of the two figures.
        low, high: its 95 % interval, from both figures' own as if they were independent (MOVER on logarithms: Zou and
            Donner, Stat. Med. 2008). None where one of them has none. It holds what varies within each run, and what
            varies between runs only where both were repeated with `--processes`.
        verdict: as of `statistics.Comparison`; `faster` where B is. Always `unclear` where the speed-up of either
            measurement is one that its processor time contradicts.
    """

    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict


class Row(Record):
    """One runner, precision and batch size in both reports.

    Attributes:
        a, b: the measurements; None where a report has none.
        latency: student's time in A over student's time in B, above 1 where B's is faster; None where one is missing.
        speedup: speed-up over the teacher in B over that in A, above 1 where B gains more; None likewise. Of two
            machines it compares what the student gains on each, whatever their own speed. Of the same teacher on the
            same device `latency` is `faster` or `slower` only where this is too: the teacher was timed beside the
            student in both, so that it cancels what the machine did otherwise from one run to the next.
    """

    runner: str
    precision: str
    batch_size: int
    a: Measurement | None
    b: Measurement | None
    latency: Ratio | None
    speedup: Ratio | None


class Differing(Record):
    """A thing that is not the same in both reports."""

    what: str
    a: str
    b: str


class SideBySide(Record):
    """Two reports.

    Attributes:
        sentence: what became of the headline measurement from A to B.
        a_path, b_path: where the reports are.
        a, b: the reports.
        differing: of environment, networks, data, target and recipe, what differs.
        rows: every measurement of either, in A's order and then B's.
    """

    schema_version: Literal[1] = 1
    sentence: str
    a_path: str
    b_path: str
    a: Report
    b: Report
    differing: tuple[Differing, ...]
    rows: tuple[Row, ...]


def compare_reports(a: str | Path, b: str | Path) -> SideBySide:
    """Holds two reports side by side.

    Args:
        a, b: report.json files, or bundles that were profiled.

    Raises:
        BundleError: no report there, or not one that this version reads.
    """
    first, second = open_report(Path(a)), open_report(Path(b))
    by_key = [{_key(each): each for each in report.measurements} for report in (first, second)]
    keys = list(dict.fromkeys([*by_key[0], *by_key[1]]))
    alike = first.teacher.sha256 == second.teacher.sha256 and (
        first.environment.device_name == second.environment.device_name
    )
    rows = tuple(_row(key, *(found.get(key) for found in by_key), alike=alike) for key in keys)
    return SideBySide(
        sentence=_sentence(second, rows),
        a_path=str(a),
        b_path=str(b),
        a=first,
        b=second,
        differing=tuple(_differing(first, second)),
        rows=rows,
    )


def _key(measurement: Measurement) -> tuple[str, str, int]:
    return measurement.runner, measurement.precision, measurement.batch_size


def _row(key: tuple[str, str, int], a: Measurement | None, b: Measurement | None, *, alike: bool) -> Row:
    """One row.

    Args:
        alike: whether the teacher and the device are the same in both.
    """
    runner, precision, batch_size = key
    latency = speedup = None
    if a and b:
        latency = ratio_of(*((x.median_ms, x.median_low_ms, x.median_high_ms) for x in (a.student, b.student)))
        speedup = ratio_of(*((x.speedup, x.speedup_low, x.speedup_high) for x in (b.comparison, a.comparison)))
        if contradicted(a.comparison) or contradicted(b.comparison):
            speedup = speedup.model_copy(update={"verdict": "unclear"})
            latency = latency.model_copy(update={"verdict": "unclear"})
        elif alike and latency.verdict in ("faster", "slower") and latency.verdict != speedup.verdict:
            latency = latency.model_copy(update={"verdict": "unclear"})
    return Row(runner=runner, precision=precision, batch_size=batch_size, a=a, b=b, latency=latency, speedup=speedup)


def ratio_of(above: tuple[float, float | None, float | None], below: tuple[float, float | None, float | None]) -> Ratio:
    """The ratio of two positive figures, each (figure, low, high) with its 95 % interval."""
    (x, x_low, x_high), (y, y_low, y_high) = above, below
    low = high = None
    if x_low and x_high and y_low and y_high:
        low = x / y * math.exp(-math.hypot(math.log(x / x_low), math.log(y_high / y)))
        high = x / y * math.exp(math.hypot(math.log(x_high / x), math.log(y / y_low)))
    verdict, _ = judge(x / y, low, high, 0)
    return Ratio(ratio=x / y, low=low, high=high, verdict=verdict)


def _sentence(b: Report, rows: tuple[Row, ...]) -> str:
    """Of the measurement that B's verdict speaks of, or else the first that both have."""
    both = [(each.a, each.b, each.latency) for each in rows if each.a and each.b and each.latency]
    if not both:
        return "The reports have no measurement in common: no runner, precision and batch size is in both."
    was, now, latency = next((each for each in both if each[1] is b.headline), both[0])
    ratio = times(latency.ratio)
    outcome = {
        "faster": f"{ratio} as fast",
        "slower": f"slower ({ratio} as fast)",
        "same": "as fast",
        "unclear": f"neither clearly faster nor slower ({ratio})",
    }[latency.verdict]
    return (
        f"In {runner_of(now)} at batch {now.batch_size}, B’s student is {outcome}: "
        f"{milliseconds(was.student.median_ms)} → {milliseconds(now.student.median_ms)} ms a call; "
        f"its speed-up over the teacher went from {was.comparison.speedup:.2f}× to "
        f"{now.comparison.speedup:.2f}×."
    )


def _differing(a: Report, b: Report) -> Iterator[Differing]:
    """What differs in what was measured, and where."""
    told = [
        {
            **dict(_flat(report.environment.model_dump(mode="json"), "")),
            "teacher": f"{report.teacher.name}, SHA-256 {report.teacher.sha256[:12]}…",
            "student": f"{report.student.name}, SHA-256 {report.student.sha256[:12]}…",
            "data": f"{report.data.source}, {report.data.fingerprint[:12]}…",
            **dict(_flat(report.target.model_dump(mode="json"), "target ")),
            **dict(_flat(report.recipe.model_dump(mode="json"), "recipe ")),
        }
        for report in (a, b)
    ]
    for what in dict.fromkeys([*told[0], *told[1]]):
        before, after = (each.get(what, "–") for each in told)
        if before != after and what not in _NOT_COMPARED:
            yield Differing(what=what, a=before, b=after)


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Every value as text, by the names that lead to it."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield (
                prefix + name,
                "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value),
            )
