"""Diagnose what bounds the speed and what disturbed the measurement: sentences, with the figures behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from litdeploy.profiler.analysis.breakdown import depth_ratio
from litdeploy.profiler.formatting import milliseconds, times
from litdeploy.profiler.machine.roofline import Rates, Work, roof
from litdeploy.profiler.schema import REMAINDER, Finding, Kind, Measurement, RawSamples, SectionTime, Side

_BOUND_FROM = 0.5  # share of a call's time that a ceiling explains
_LAUNCH_BOUND_FROM = 1.5  # times as long as captured, or as compiled at a batch large enough to hide launching
_COPY_BOUND_FROM = 0.3  # share of the time from host memory to host memory
_OTHER_LOAD_FROM = 0.1  # cores
_STOLEN_FROM = 0.02
_QUOTA_FROM = 0.01
_DRIFT_FROM = 1.1
_BEHIND_PACE_BELOW = 0.98
_HALF_FROM = 8  # samples: the medians of shorter halves differ by chance


def ideal_ratio(
    teacher: Side, student: Side, headline: Measurement, section_times: Sequence[SectionTime]
) -> Iterator[Finding]:
    """Compare the measured speed-up with the ratio of FLOPs, and locate the time that did not shrink with it."""
    flops, depth = teacher.breakdown.flops / student.breakdown.flops, depth_ratio(teacher.breakdown, student.breakdown)
    slow, fast, how = headline.teacher.median_ms, headline.student.median_ms, ""
    if headline.conditions.contended and headline.teacher.cpu_ms and headline.student.cpu_ms:
        # Wall-clock time contains the other work; processor time hardly does.
        slow, fast, how = headline.teacher.cpu_ms, headline.student.cpu_ms, " in processor time"
    speedup = slow / fast
    figures = {"depth_ratio": depth, "flop_ratio": flops, "speedup": speedup, "share_of_ideal": speedup / flops}
    text = (
        f"In {_at(headline)}, the student has {times(depth)} less depth and "
        f"{times(flops)} fewer FLOPs, and is {times(speedup)} as fast{how}: {speedup / flops:.0%} of the ideal "
        "by FLOPs."
    )
    # c, the time that is the same in both: (slow - c) / (fast - c) is the ratio of FLOPs.
    fixed = (flops * fast - slow) / (flops - 1) if flops > 1 else 0.0
    if 0 < fixed < fast:
        figures |= {"fixed_ms": fixed, "fixed_share": fixed / fast}
        text += (
            f" The rest is as if {milliseconds(fixed)} ms of each call ({fixed / fast:.0%} of the student's) did not "
            "shrink with the FLOPs."
        )
    text += _outside(student, headline.batch_size, section_times, figures)
    yield _finding("ideal ratio", headline, text, figures)


def _outside(student: Side, batch_size: int, section_times: Sequence[SectionTime], figures: dict[str, float]) -> str:
    """The student's time outside its sections, where no block can be left out; adds to `figures`."""
    mine = [each for each in section_times if each.batch_size == batch_size]
    total = sum(each.student_ms for each in mine)
    if not total:
        return ""
    rest_ms = sum(each.student_ms for each in mine if each.name == REMAINDER)
    flops = sum(part.flops for part in student.breakdown.parts if part.name == REMAINDER) / student.breakdown.flops
    figures |= {"stem_and_head_ms": rest_ms, "stem_and_head_share": rest_ms / total, "stem_and_head_flop_share": flops}
    return (
        f" Stem and head, which are not compressed, take {rest_ms / total:.0%} of the student's time in eager PyTorch, "
        f"with {flops:.1%} of its FLOPs."
    )


def bounds(
    measurements: Sequence[Measurement], ceilings: Callable[[Measurement], tuple[Work, Rates] | None]
) -> Iterator[Finding]:
    """What bounds the student in each runner, at the smallest and at the largest batch.

    Args:
        ceilings: work of one call of the student, and the device's rates; None if they are not known.
    """
    sizes = {each.batch_size for each in measurements}
    for each in measurements:
        known = ceilings(each) if each.batch_size in (min(sizes), max(sizes)) else None
        if known is not None:
            yield _roofline_bound(each, *known)


def _roofline_bound(measurement: Measurement, work: Work, rates: Rates) -> Finding:
    """Arithmetic, memory or neither, by the roofline model.

    Args:
        work: of one call of the student.
        rates: measured on this device, in this precision.
    """
    taken = measurement.student.median_ms / 1e3
    ceiling = roof(work, rates)
    share = ceiling.seconds / taken
    figures = {
        "roof_ms": ceiling.seconds * 1e3,
        "median_ms": taken * 1e3,
        "share_of_roof": share,
        "gflop": work.operations / 1e9,
        "megabytes": work.bytes / 1e6,
        "reached_gflop_per_second": work.operations / taken / 1e9,
        "ceiling_gflop_per_second": rates.operations / 1e9,
        "reached_gigabytes_per_second": work.bytes / taken / 1e9,
        "ceiling_gigabytes_per_second": rates.bytes / 1e9,
    }
    arithmetic = ceiling.by_operations >= ceiling.by_bytes
    name, unit = ("gflop_per_second", "GFLOP/s") if arithmetic else ("gigabytes_per_second", "GB/s")
    rate = f"{figures[f'reached_{name}']:.3g} of {figures[f'ceiling_{name}']:.3g} {unit} measured on this device"
    kind: Kind = "arithmetic-bound" if arithmetic else "memory-bound"
    if share < _BOUND_FROM:
        kind = "overhead-bound"
        text = (
            f"The student is bound by neither arithmetic nor memory in {_at(measurement)}: {rate} ({share:.0%}). The "
            "rest is launching, elementwise work, and kernels below the ceiling."
        )
    else:
        text = f"The student is {kind} in {_at(measurement)}: {rate} ({share:.0%})."
        if share > 1:
            text += " That is above the ceiling: other work disturbed the measurement of the ceiling."
    return _finding(kind, measurement, text, figures)


def launch_bound(measurements: Sequence[Measurement]) -> Iterator[Finding]:
    """Launching operators takes longer than the work in them: on CUDA by graph capture, elsewhere by batch size."""
    for each in measurements:
        captured = each.student.captured_ms
        if captured is not None and each.student.median_ms >= _LAUNCH_BOUND_FROM * captured:
            share = 1 - captured / each.student.median_ms
            text = (
                f"The student is launch-bound in {_at(each)}: {share:.0%} of its "
                f"{milliseconds(each.student.median_ms)} ms disappear when its calls are captured as a CUDA graph."
            )
            figures = {"median_ms": each.student.median_ms, "captured_ms": captured, "launch_share": share}
            yield _finding("launch-bound", each, text, figures)
    if not any(each.student.captured_ms is not None for each in measurements):
        yield from _dispatch_bound(measurements)


def _dispatch_bound(measurements: Sequence[Measurement]) -> Iterator[Finding]:
    """Eager PyTorch compared with the fastest other runner, at the smallest and at the largest batch."""
    small, large = (end(each.batch_size for each in measurements) for end in (min, max))
    ratios = {}
    for size in (small, large):
        at = {each.runner: each.student.median_ms for each in measurements if each.batch_size == size}
        others = {runner: ms for runner, ms in at.items() if runner != "eager"}
        if "eager" not in at or not others or small == large:
            return
        fastest = min(others, key=lambda runner: others[runner])
        ratios[size] = (at["eager"] / others[fastest], fastest)
    (at_small, fastest), (at_large, _) = ratios[small], ratios[large]
    if at_small < _LAUNCH_BOUND_FROM * max(at_large, 1.0):
        return
    share = 1 - max(at_large, 1.0) / at_small
    yield Finding(
        kind="launch-bound",
        sentence=(
            f"Eager PyTorch takes {at_small:.1f} times as long as {fastest} at batch {small}, and {at_large:.1f} times "
            f"at batch {large}: at batch {small} about {share:.0%} of its time goes into launching operators."
        ),
        figures={"ratio_at_smallest": at_small, "ratio_at_largest": at_large, "launch_share": share},
        runner="eager",
        batch_size=small,
    )


def copy_bound(measurements: Sequence[Measurement]) -> Iterator[Finding]:
    """Copying to the device and back is a large share of the time that a caller waits."""
    for each in measurements:
        side = each.student
        if side.end_to_end_ms is None or side.copy_in_ms is None or side.copy_out_ms is None:
            continue
        copies = side.copy_in_ms + side.copy_out_ms
        share = copies / side.end_to_end_ms
        if share >= _COPY_BOUND_FROM:
            text = (
                f"The student is copy-bound in {_at(each)}: copying takes {milliseconds(copies)} of "
                f"{milliseconds(side.end_to_end_ms)} ms from host memory to host memory ({share:.0%})."
            )
            figures = {"copies_ms": copies, "end_to_end_ms": side.end_to_end_ms, "copy_share": share}
            yield _finding("copy-bound", each, text, figures)


def disturbances(measurements: Sequence[Measurement], samples: Sequence[RawSamples]) -> Iterator[Finding]:
    """Other work, throttling, drift and a missed pace; the first two once each, for the measurement hit hardest."""
    for look in (_other_work, _throttled, _quota):
        met = [finding for each in measurements if (finding := look(each)) is not None]
        if met:
            worst = max(met, key=lambda pair: pair[0])[1]
            more = f" ({len(met)} of {len(measurements)} measurements were affected; this one most.)" if met[1:] else ""
            yield worst.model_copy(update={"sentence": worst.sentence + more})
    by_key = {(raw.runner, raw.batch_size): raw for raw in samples}
    for each in measurements:
        raw = by_key.get((each.runner, each.batch_size))
        if raw is not None:
            yield from _drift(each, raw)
            yield from _pace(each, raw)


_Weighted = tuple[float, Finding] | None  # severity, finding


def _other_work(each: Measurement) -> _Weighted:
    seen = each.conditions
    load, stolen = seen.other_load or 0.0, seen.stolen or 0.0
    if load < _OTHER_LOAD_FROM and stolen < _STOLEN_FROM:
        return None
    cores = len(seen.cores or ())
    text = (
        f"Other work ran during the measurement of {_at(each)}: it used {load:.0%} of a core on the {cores} "
        f"core{'s' * (cores != 1)} of this process"
        + (f", preempted it {seen.preemptions:,} times" if seen.preemptions else "")
        + (f", and the hypervisor gave {stolen:.0%} of the time to other machines" if stolen >= _STOLEN_FROM else "")
        + ". Times are longer and less steady than on a quiet machine."
    )
    figures = {"other_load_cores": load, "stolen_share": stolen, "preemptions": float(seen.preemptions or 0)}
    cpu = each.comparison.cpu_speedup
    if cpu is not None:
        text += f" In processor time, which other work hardly changes, the student is {times(cpu)} as fast."
        figures |= {"speedup": each.comparison.speedup, "cpu_speedup": cpu}
    return load + stolen, _finding("noisy neighbour", each, text, figures)


def _throttled(each: Measurement) -> _Weighted:
    gpu = each.conditions.gpu
    if gpu is None or not gpu.throttle_reasons:
        return None
    text = (
        f"The GPU throttled its clocks in {_at(each)} "
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
    return 1 - gpu.clock_mhz / gpu.max_clock_mhz, _finding("throttled", each, text, figures)


def _quota(each: Measurement) -> _Weighted:
    seen = each.conditions
    share = (seen.quota_seconds or 0.0) / seen.seconds if seen.seconds else 0.0
    if share < _QUOTA_FROM:
        return None
    text = (
        f"The process used up its quota of processor time (cgroup) in {_at(each)} and was stopped for {share:.0%} of "
        "the time. Give the container as many cores as it has threads, or fewer threads: OMP_NUM_THREADS=1"
    )
    return share, _finding("throttled", each, text, {"stopped_share": share})


def _drift(each: Measurement, raw: RawSamples) -> Iterator[Finding]:
    changes = []
    for side in (raw.timed.teacher, raw.timed.student):
        half = len(side.milliseconds) // 2
        if half < _HALF_FROM:
            return
        changes.append(median(side.milliseconds[-half:]) / median(side.milliseconds[:half]))
    low, high = min(changes), max(changes)
    if low >= _DRIFT_FROM or high <= 1 / _DRIFT_FROM:
        text = (
            f"The machine's speed drifted in {_at(each)}: from the first half of the samples to the second, the "
            f"teacher's median changed by a factor of {times(changes[0])} and the student's by {times(changes[1])}. "
            "The speed-up is still valid, because both sides took turns; the times mix two states of the machine."
        )
        yield _finding("drift", each, text, {"teacher_change": changes[0], "student_change": changes[1]})


def _pace(each: Measurement, raw: RawSamples) -> Iterator[Finding]:
    starts = raw.timed.starts_ms
    if each.pace is None or len(starts) < 2 or starts[-1] <= starts[0]:
        return
    reached = (len(starts) - 1) / (starts[-1] - starts[0]) * 1e3
    if reached < _BEHIND_PACE_BELOW * each.pace:
        text = (
            f"{_at(each)} did not keep the pace: {reached:.3g} calls a second of both sides together, and "
            f"{each.pace:g} were requested. Its times are those of a machine without idle time."
        )
        yield _finding("behind pace", each, text, {"reached_per_second": reached, "asked_per_second": each.pace})


def _finding(kind: Kind, measurement: Measurement, sentence: str, figures: dict[str, float]) -> Finding:
    """A finding about one measurement."""
    runner, batch_size = measurement.runner, measurement.batch_size
    return Finding(kind=kind, sentence=sentence, figures=figures, runner=runner, batch_size=batch_size)


def _at(measurement: Measurement) -> str:
    return f"{measurement.runner} at batch {measurement.batch_size}"
