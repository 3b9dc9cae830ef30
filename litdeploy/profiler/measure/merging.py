"""Measurements of several processes as one: their spread is in its intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from statistics import median
from typing import TypeVar

from litdeploy.profiler.measure.measuring import Results
from litdeploy.profiler.measure.statistics import across_processes, judge, summarise
from litdeploy.profiler.schema import (
    Comparison,
    Conditions,
    Failure,
    Measurement,
    RawSamples,
    Samples,
    SideTiming,
    Stopped,
)

Value = TypeVar("Value")


def merge(results: Sequence[Results]) -> Results:
    """One of several, each of a process of its own.

    What one of them could not measure counts as a failure, and is not among the measurements.
    """
    merged = Results()
    failures: dict[tuple[str, int | None], Failure] = {}
    for each in results:
        failures |= {(failure.runner, failure.batch_size): failure for failure in each.failures}
    merged.failures = list(failures.values())
    for first in results[0].measurements:
        key = (first.runner, first.batch_size)
        members = [found for each in results for found in each.measurements if (found.runner, found.batch_size) == key]
        raw = [found for each in results for found in each.samples if (found.runner, found.batch_size) == key]
        if len(members) == len(results):
            merged.measurements.append(_one(members, raw))
            merged.samples += [each.model_copy(update={"process": number}) for number, each in enumerate(raw)]
    return merged


def _one(members: Sequence[Measurement], raw: Sequence[RawSamples]) -> Measurement:
    first = members[0]
    return first.model_copy(
        update={
            "stopped": _stopped([each.stopped for each in members]),
            "overhead_ms": median(each.overhead_ms for each in members),
            "conditions": _conditions([each.conditions for each in members]),
            "teacher": _side([each.teacher for each in members], [each.timed.teacher for each in raw], first),
            "student": _side([each.student for each in members], [each.timed.student for each in raw], first),
            "comparison": _comparison([each.comparison for each in members], raw),
        }
    )


def _stopped(each: Sequence[Stopped]) -> Stopped:
    """The worst: `settled` only where all were."""
    return next(kind for kind in ("time limit", "samples", "settled") if kind in each)


def _side(sides: Sequence[SideTiming], samples: Sequence[Samples], measurement: Measurement) -> SideTiming:
    pooled = [value for each in samples for value in each.milliseconds]
    summary = summarise(pooled, measurement.batch_size).model_dump()
    values = [(each.median_ms, each.median_low_ms, each.median_high_ms) for each in sides]
    _, low, high = across_processes(values)
    if low is not None and high is not None:
        # The median of all samples is not quite the mean of their medians.
        low, high = min(low, summary["median_ms"]), max(high, summary["median_ms"])
    summary |= {"median_low_ms": low, "median_high_ms": high}
    medians = ("launch_ms", "cpu_ms", "copy_in_ms", "copy_out_ms", "end_to_end_ms", "captured_ms", "energy_joules")
    return sides[0].model_copy(
        update={
            **summary,
            **{name: _of(sides, attrgetter(name), median) for name in medians},
            "load_seconds": median(side.load_seconds for side in sides),
            "first_run_ms": median(side.first_run_ms for side in sides),
            "build_seconds": _of(sides, lambda side: side.build_seconds, max),
            "peak_memory_bytes": _of(sides, lambda side: side.peak_memory_bytes, max),
        }
    )


def _comparison(each: Sequence[Comparison], raw: Sequence[RawSamples]) -> Comparison:
    speedup, low, high = across_processes([(one.speedup, one.speedup_low, one.speedup_high) for one in each])
    paired, _, _ = across_processes([(one.paired_speedup, None, None) for one in each])
    cpu = _of(each, lambda one: one.cpu_speedup, median)
    samples = sum(len(one.timed.teacher.milliseconds) for one in raw)
    waited = any(one.timed.conditions.contended for one in raw)
    verdict, reason = judge(speedup, low, high, samples, cpu if waited else None)
    return Comparison(
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        paired_speedup=paired,
        cpu_speedup=cpu,
        verdict=verdict,
        reason=reason,
        processes=tuple(one.speedup for one in each),
    )


def _conditions(each: Sequence[Conditions]) -> Conditions:
    """Of all the time together; of loads, the highest."""
    return Conditions(
        seconds=sum(one.seconds for one in each),
        cores=each[0].cores,
        other_load=_of(each, lambda one: one.other_load, max),
        machine_load=_of(each, lambda one: one.machine_load, max),
        stolen=_of(each, lambda one: one.stolen, max),
        preemptions=_of(each, lambda one: one.preemptions, sum),
        cpu_seconds=_of(each, lambda one: one.cpu_seconds, sum),
        waiting_seconds=_of(each, lambda one: one.waiting_seconds, sum),
        quota_seconds=_of(each, lambda one: one.quota_seconds, sum),
        clock_mhz=_of(each, lambda one: one.clock_mhz, median),
        clock_low_mhz=_of(each, lambda one: one.clock_low_mhz, min),
        gpu=next((one.gpu for one in each if one.gpu is not None), None),
    )


def _of(
    items: Sequence[Value], field: Callable[[Value], float | None], how: Callable[[list[float]], float]
) -> float | None:
    """`how` over those of the fields that are known; None where none is."""
    known = [value for item in items if (value := field(item)) is not None]
    return how(known) if known else None
