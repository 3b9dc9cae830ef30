"""Compare two reports: two commits, two machines, two students."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from litdeploy.profiler.formatting import milliseconds, runner_of, times
from litdeploy.profiler.measure.statistics import contradicted, judge
from litdeploy.profiler.schema import Measurement, Report, Verdict, open_report
from litdeploy.storage.records import Record

# Always different, and no property of what was measured.
_NOT_COMPARED = ("date", "load_average")

Estimate = tuple[float, float | None, float | None]  # a figure, and the ends of its 95 % interval


class Ratio(Record):
    """Ratio of a figure in one report to the same figure in the other.

    Attributes:
        ratio: of the two figures.
        low, high: its 95 % interval, from the intervals of both figures as if they were independent (MOVER on
            logarithms: Zou and Donner, Stat. Med. 2008). None if one of them has none. It covers the variation within
            each run; that between runs only if both were repeated with `--processes`.
        verdict: as in `schema.Comparison`; `faster` if B is. Always `unclear` if the processor time of either
            measurement contradicts its speed-up.
    """

    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict


class MeasurementDiff(Record):
    """One runner, precision and batch size in both reports.

    Attributes:
        a, b: the measurements; None if a report has none.
        latency: student's time in A over student's time in B, above 1 if B's is faster; None if one is missing.
        speedup: speed-up over the teacher in B over that in A, above 1 if B gains more; None if one is missing.
            Between two machines, it compares what the student gains on each, whatever their own speed. With the same
            teacher on the same device, `latency` is `faster` or `slower` only if this is too: the teacher was timed
            together with the student in both, which cancels what the machine did differently from run to run.
    """

    runner: str
    precision: str
    batch_size: int
    a: Measurement | None
    b: Measurement | None
    latency: Ratio | None
    speedup: Ratio | None


class FieldDiff(Record):
    """A value that differs between the reports."""

    what: str
    a: str
    b: str


class ReportDiff(Record):
    """Two reports, compared.

    Attributes:
        sentence: how the headline measurement changed from A to B.
        a_path, b_path: where the reports are.
        a, b: the reports.
        differing: differences in environment, networks, data, target and recipe.
        rows: every measurement of either, in A's order and then B's.
    """

    schema_version: Literal[1] = 1
    sentence: str
    a_path: str
    b_path: str
    a: Report
    b: Report
    differing: tuple[FieldDiff, ...]
    rows: tuple[MeasurementDiff, ...]


def compare_reports(a: str | Path, b: str | Path) -> ReportDiff:
    """Compare two reports.

    Args:
        a, b: report.json files, or profiled bundles.

    Raises:
        BundleError: no report there, or none that this version reads.
    """
    first, second = open_report(Path(a)), open_report(Path(b))
    by_key = [
        {(each.runner, each.precision, each.batch_size): each for each in report.measurements}
        for report in (first, second)
    ]
    same_setup = first.teacher.sha256 == second.teacher.sha256 and (
        first.environment.device_name == second.environment.device_name
    )
    rows = tuple(
        _compare(key, *(found.get(key) for found in by_key), same_setup=same_setup)
        for key in dict.fromkeys([*by_key[0], *by_key[1]])
    )
    return ReportDiff(
        sentence=_sentence(second, rows),
        a_path=str(a),
        b_path=str(b),
        a=first,
        b=second,
        differing=tuple(_differing(first, second)),
        rows=rows,
    )


def _compare(
    key: tuple[str, str, int], a: Measurement | None, b: Measurement | None, *, same_setup: bool
) -> MeasurementDiff:
    """Compare one measurement. `same_setup`: both have the same teacher and device."""
    runner, precision, batch_size = key
    latency = speedup = None
    if a and b:
        latency = ratio_of(*((x.median_ms, x.median_low_ms, x.median_high_ms) for x in (a.student, b.student)))
        speedup = ratio_of(*((x.speedup, x.speedup_low, x.speedup_high) for x in (b.comparison, a.comparison)))
        if contradicted(a.comparison) or contradicted(b.comparison):
            speedup = speedup.model_copy(update={"verdict": "unclear"})
            latency = latency.model_copy(update={"verdict": "unclear"})
        elif same_setup and latency.verdict in ("faster", "slower") and latency.verdict != speedup.verdict:
            latency = latency.model_copy(update={"verdict": "unclear"})
    return MeasurementDiff(
        runner=runner, precision=precision, batch_size=batch_size, a=a, b=b, latency=latency, speedup=speedup
    )


def ratio_of(above: Estimate, below: Estimate) -> Ratio:
    """The ratio of two positive figures."""
    (x, x_low, x_high), (y, y_low, y_high) = above, below
    low = high = None
    if x_low and x_high and y_low and y_high:
        low = x / y * math.exp(-math.hypot(math.log(x / x_low), math.log(y_high / y)))
        high = x / y * math.exp(math.hypot(math.log(x_high / x), math.log(y / y_low)))
    verdict, _ = judge(x / y, low, high, 0)
    return Ratio(ratio=x / y, low=low, high=high, verdict=verdict)


def _sentence(b: Report, rows: tuple[MeasurementDiff, ...]) -> str:
    """A sentence about the measurement of B's verdict, or else about the first that both have."""
    both = [(each.a, each.b, each.latency) for each in rows if each.a and each.b and each.latency]
    if not both:
        return "The reports have no measurement in common: no runner, precision and batch size is in both."
    before, after, latency = next((each for each in both if each[1] is b.headline), both[0])
    ratio = times(latency.ratio)
    outcome = {
        "faster": f"{ratio} as fast",
        "slower": f"slower ({ratio} as fast)",
        "same": "as fast",
        "unclear": f"neither clearly faster nor slower ({ratio})",
    }[latency.verdict]
    return (
        f"In {runner_of(after)} at batch {after.batch_size}, B’s student is {outcome}: "
        f"{milliseconds(before.student.median_ms)} → {milliseconds(after.student.median_ms)} ms a call; "
        f"its speed-up over the teacher changed from {before.comparison.speedup:.2f}× to "
        f"{after.comparison.speedup:.2f}×."
    )


def _differing(a: Report, b: Report) -> Iterator[FieldDiff]:
    """Differences in what was measured, and where."""
    values = [
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
    for what in dict.fromkeys([*values[0], *values[1]]):
        before, after = (each.get(what, "–") for each in values)
        if before != after and what not in _NOT_COMPARED:
            yield FieldDiff(what=what, a=before, b=after)


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Every value as text, under its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value))
        else:
            yield prefix + name, "none" if value is None else str(value)
