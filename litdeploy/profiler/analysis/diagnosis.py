"""What the speed is bound by, and what disturbed the measurement: in words, with the figures behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from litdeploy.profiler.analysis.breakdown import depth_ratio
from litdeploy.profiler.figures import milliseconds, times
from litdeploy.profiler.machine.roofline import Rates, Work, roof
from litdeploy.profiler.schema import REMAINDER, Finding, Kind

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement, SectionTime, Side


_BOUND_FROM = 0.5  # of the time that a call takes, at a ceiling: then it is what the call is bound by
_LAUNCH_BOUND_FROM = 1.5  # times as long as captured, or as compiled at a batch so large that launching is nothing
_COPY_BOUND_FROM = 0.3  # of the time from host memory to host memory


def found(kind: Kind, measurement: Measurement, sentence: str, figures: dict[str, float]) -> Finding:
    """A finding of one measurement."""
    return Finding(
        kind=kind,
        sentence=sentence,
        figures=figures,
        runner=measurement.runner,
        batch_size=measurement.batch_size,
    )


def ideal_ratio(
    teacher: Side, student: Side, headline: Measurement, section_times: Sequence[SectionTime]
) -> Iterator[Finding]:
    """What the ratio of FLOPs would make of the time, what was made of it, and where the rest went."""
    flops, depth = teacher.breakdown.flops / student.breakdown.flops, depth_ratio(teacher.breakdown, student.breakdown)
    slow, fast, how = headline.teacher.median_ms, headline.student.median_ms, ""
    if headline.conditions.contended and headline.teacher.cpu_ms and headline.student.cpu_ms:
        # The clock on the wall tells of the other work more than of these two.
        slow, fast, how = headline.teacher.cpu_ms, headline.student.cpu_ms, " in processor time"
    speedup = slow / fast
    figures = {"depth_ratio": depth, "flop_ratio": flops, "speedup": speedup, "share_of_ideal": speedup / flops}
    told = (
        f"In {headline.runner} at batch {headline.batch_size}, the student has {times(depth)} less depth and "
        f"{times(flops)} fewer FLOPs, and is {times(speedup)} as fast{how}: {speedup / flops:.0%} of the ideal "
        "by FLOPs."
    )
    # What takes as long in both, c: (slow - c) / (fast - c) is the ratio of FLOPs.
    fixed = (flops * fast - slow) / (flops - 1) if flops > 1 else 0.0
    if 0 < fixed < fast:
        figures |= {"fixed_ms": fixed, "fixed_share": fixed / fast}
        told += (
            f" The rest is as if {milliseconds(fixed)} ms of each call ({fixed / fast:.0%} of the student's) did not "
            "shrink with the FLOPs."
        )
    told += _outside(student, headline.batch_size, section_times, figures)
    yield found("ideal ratio", headline, told, figures)


def _outside(student: Side, batch_size: int, section_times: Sequence[SectionTime], figures: dict[str, float]) -> str:
    """How much of the student's time is outside of its sections, where no block can be left out."""
    mine = [each for each in section_times if each.batch_size == batch_size]
    total = sum(each.student_ms for each in mine)
    if not total:
        return ""
    rest_ms = sum(each.student_ms for each in mine if each.name == REMAINDER)
    flops = sum(part.flops for part in student.breakdown.parts if part.name == REMAINDER) / student.breakdown.flops
    figures |= {"stem_and_head_ms": rest_ms, "stem_and_head_share": rest_ms / total, "stem_and_head_flop_share": flops}
    return (
        f" Stem and head, which stay as they are, take {rest_ms / total:.0%} of the student's time in eager PyTorch, "
        f"with {flops:.1%} of its FLOPs."
    )


def bounds(
    measurements: Sequence[Measurement], ceilings: Callable[[Measurement], tuple[Work, Rates] | None]
) -> Iterator[Finding]:
    """What bounds the student in each runner, at the smallest and at the largest batch.

    Args:
        ceilings: work of one call of the student, and rates of the device; None where they are not known.
    """
    sizes = {each.batch_size for each in measurements}
    for each in measurements:
        known = ceilings(each) if each.batch_size in (min(sizes), max(sizes)) else None
        if known is not None:
            yield from roofline_bound(each, *known)


def roofline_bound(measurement: Measurement, work: Work, rates: Rates) -> Iterator[Finding]:
    """What bounds the student at most: arithmetic, memory or neither.

    Args:
        work: of one call of the student.
        rates: what the device was measured to do, in this precision.
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
    where = f"{measurement.runner} at batch {measurement.batch_size}"
    arithmetic = ceiling.by_operations >= ceiling.by_bytes
    rate = (
        f"{figures['reached_gflop_per_second']:.3g} of {figures['ceiling_gflop_per_second']:.3g} GFLOP/s"
        if arithmetic
        else f"{figures['reached_gigabytes_per_second']:.3g} of {figures['ceiling_gigabytes_per_second']:.3g} GB/s"
    )
    if share >= _BOUND_FROM:
        kind: Kind = "arithmetic-bound" if arithmetic else "memory-bound"
        told = f"The student is {kind} in {where}: {rate} that this device was measured to do ({share:.0%})."
        if share > 1:
            told += " More than the ceiling: other work disturbed the measurement of that."
    else:
        kind = "overhead-bound"
        told = (
            f"The student is bound by neither arithmetic nor memory in {where}: {rate} that this device was measured "
            f"to do ({share:.0%}). The rest is launching, elementwise work, and kernels below the ceiling."
        )
    yield found(kind, measurement, told, figures)


def launch_bound(measurements: Sequence[Measurement]) -> Iterator[Finding]:
    """Where launching operators takes longer than the work in them: on CUDA by capture, elsewhere by the batch."""
    for each in measurements:
        captured = each.student.captured_ms
        if captured is not None and each.student.median_ms >= _LAUNCH_BOUND_FROM * captured:
            share = 1 - captured / each.student.median_ms
            told = (
                f"The student is launch-bound in {each.runner} at batch {each.batch_size}: {share:.0%} of its "
                f"{milliseconds(each.student.median_ms)} ms go away when its calls are captured as a CUDA graph."
            )
            figures = {"median_ms": each.student.median_ms, "captured_ms": captured, "launch_share": share}
            yield found("launch-bound", each, told, figures)
    if not any(each.student.captured_ms is not None for each in measurements):
        yield from _dispatch_bound(measurements)


def _dispatch_bound(measurements: Sequence[Measurement]) -> Iterator[Finding]:
    """Eager PyTorch against the fastest runner beside it, at the smallest and at the largest batch."""
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
    """Where copying to the device and back is much of the time that a caller waits."""
    for each in measurements:
        side = each.student
        if side.end_to_end_ms is None or side.copy_in_ms is None or side.copy_out_ms is None:
            continue
        copies = side.copy_in_ms + side.copy_out_ms
        share = copies / side.end_to_end_ms
        if share >= _COPY_BOUND_FROM:
            told = (
                f"The student is copy-bound in {each.runner} at batch {each.batch_size}: {milliseconds(copies)} of "
                f"{milliseconds(side.end_to_end_ms)} ms from host memory to host memory are copying ({share:.0%})."
            )
            figures = {"copies_ms": copies, "end_to_end_ms": side.end_to_end_ms, "copy_share": share}
            yield found("copy-bound", each, told, figures)
