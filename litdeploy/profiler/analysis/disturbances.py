"""What disturbed a measurement: other work, held-down clocks, a machine that changed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from litdeploy.profiler.analysis.diagnosis import found
from litdeploy.profiler.figures import times
from litdeploy.profiler.schema import Finding

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement, RawSamples

_OTHER_LOAD_FROM = 0.1  # cores' worth
_STOLEN_FROM = 0.02
_QUOTA_FROM = 0.01
_DRIFT_FROM = 1.1
_BEHIND_PACE_BELOW = 0.98
_HALF_FROM = 8  # samples: from fewer, the medians of both halves differ by chance


def disturbances(measurements: Sequence[Measurement], samples: Sequence[RawSamples]) -> Iterator[Finding]:
    """What else the machine did, each kind told once, of the measurement that it met worst."""
    for look in (_neighbour, _throttled, _quota):
        met = [finding for each in measurements if (finding := look(each)) is not None]
        if met:
            worst = max(met, key=lambda pair: pair[0])[1]
            more = f" ({len(met)} of {len(measurements)} measurements met it; this one worst.)" if met[1:] else ""
            yield worst.model_copy(update={"sentence": worst.sentence + more})
    by_key = {(raw.runner, raw.batch_size): raw for raw in samples}
    for each in measurements:
        raw = by_key.get((each.runner, each.batch_size))
        if raw is not None:
            yield from _drift(each, raw)
            yield from _pace(each, raw)


_Weighed = tuple[float, Finding] | None


def _neighbour(each: Measurement) -> _Weighed:
    seen = each.conditions
    load, stolen = seen.other_load or 0.0, seen.stolen or 0.0
    if load < _OTHER_LOAD_FROM and stolen < _STOLEN_FROM:
        return None
    cores = len(seen.cores or ())
    told = (
        f"Other work ran beside the measurement of {each.runner} at batch {each.batch_size}: it had {load:.0%} of a "
        f"core on the {cores} core{'s' * (cores != 1)} that this process was on"
        + (f", it took the core away {seen.preemptions:,} times" if seen.preemptions else "")
        + (f", and the hypervisor gave {stolen:.0%} of the time to other machines" if stolen >= _STOLEN_FROM else "")
        + ". Times are longer and less steady than on a quiet machine."
    )
    figures = {"other_load_cores": load, "stolen_share": stolen, "preemptions": float(seen.preemptions or 0)}
    cpu = each.comparison.cpu_speedup
    if cpu is not None:
        told += f" In processor time, which other work hardly changes, the student is {times(cpu)} as fast."
        figures |= {"speedup": each.comparison.speedup, "cpu_speedup": cpu}
    return load + stolen, found("noisy neighbour", each, told, figures)


def _throttled(each: Measurement) -> _Weighed:
    gpu = each.conditions.gpu
    if gpu is None or not gpu.throttle_reasons:
        return None
    told = (
        f"The GPU held its clocks down in {each.runner} at batch {each.batch_size} "
        f"({', '.join(gpu.throttle_reasons)}): {gpu.clock_mhz:.0f} of {gpu.max_clock_mhz:.0f} MHz at "
        f"{gpu.power_watts:.0f} W and {gpu.temperature_c:.0f} °C."
    )
    figures = {
        "clock_mhz": gpu.clock_mhz,
        "clock_low_mhz": gpu.clock_low_mhz,
        "max_clock_mhz": gpu.max_clock_mhz,
        "power_watts": gpu.power_watts,
        "temperature_c": gpu.temperature_c,
    }
    return 1 - gpu.clock_mhz / gpu.max_clock_mhz, found("throttled", each, told, figures)


def _quota(each: Measurement) -> _Weighed:
    seen = each.conditions
    share = (seen.quota_seconds or 0.0) / seen.seconds if seen.seconds else 0.0
    if share < _QUOTA_FROM:
        return None
    told = (
        f"The process used up its quota of processor time (cgroup) in {each.runner} at batch {each.batch_size} and was "
        f"stopped for {share:.0%} of the time. Give the container as many cores as it has threads, or fewer threads: "
        "OMP_NUM_THREADS=1"
    )
    return share, found("throttled", each, told, {"stopped_share": share})


def _drift(each: Measurement, raw: RawSamples) -> Iterator[Finding]:
    changes = []
    for side in (raw.timed.teacher, raw.timed.student):
        half = len(side.milliseconds) // 2
        if half < _HALF_FROM:
            return
        changes.append(median(side.milliseconds[-half:]) / median(side.milliseconds[:half]))
    low, high = min(changes), max(changes)
    if low >= _DRIFT_FROM or high <= 1 / _DRIFT_FROM:
        told = (
            f"The machine did not hold still in {each.runner} at batch {each.batch_size}: from the first half to the "
            f"second the teacher's median became {times(changes[0])} and the student's {times(changes[1])} of what it "
            "was. The ratio allows for it, as both sides took turns; the times are of no one state."
        )
        yield found("drift", each, told, {"teacher_change": changes[0], "student_change": changes[1]})


def _pace(each: Measurement, raw: RawSamples) -> Iterator[Finding]:
    starts = raw.timed.starts_ms
    if each.pace is None or len(starts) < 2 or starts[-1] <= starts[0]:
        return
    reached = (len(starts) - 1) / (starts[-1] - starts[0]) * 1e3
    if reached < _BEHIND_PACE_BELOW * each.pace:
        told = (
            f"{each.runner} at batch {each.batch_size} did not keep the pace: {reached:.3g} calls a second, of both "
            f"sides in turn, where {each.pace:g} were asked for. Its times are those of a machine without idle time."
        )
        yield found("behind pace", each, told, {"reached_per_second": reached, "asked_per_second": each.pace})
