"""The tables of the reports, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from litdeploy.profiler.formatting import in_bytes, milliseconds, relative_error, runner_of, short, times
from litdeploy.profiler.schema import Comparison, Conditions, Gpu, Measurement, Report, SideTiming
from litdeploy.tasks import task_of_scores

NOTHING = "–"


@dataclass(frozen=True)
class TextCell:
    """One cell.

    Attributes:
        small: after the text, in smaller letters: an interval.
        kind: `teacher`, `student`, `strong`, `breaks` (lines may break in it), or several, separated by spaces.
    """

    text: str
    small: str = ""
    kind: str = ""


@dataclass(frozen=True)
class TextTable:
    """A table with a header row; the first cell of each row is its name.

    Attributes:
        groups: rows that belong together.
        narrow: few columns, no wider than text.
        stacked: the small text of a cell is below its text, not after it.
    """

    caption: str
    columns: tuple[TextCell, ...]
    groups: tuple[tuple[tuple[TextCell, ...], ...], ...]
    narrow: bool = False
    stacked: bool = False

    @property
    def rows(self) -> Iterable[tuple[TextCell, ...]]:
        """The rows of all groups."""
        return (row for group in self.groups for row in group)


def cells(*texts: str | TextCell) -> tuple[TextCell, ...]:
    """A row, or the heads of the columns."""
    return tuple(TextCell(text) if isinstance(text, str) else text for text in texts)


def span(low: float | None, high: float | None, text: Callable[[float], str]) -> str:
    """An interval; empty if there is none."""
    return "" if low is None or high is None else f"{text(low)}–{text(high)}"


def median(side: SideTiming) -> TextCell:
    """A median with its interval."""
    return TextCell(milliseconds(side.median_ms), span(side.median_low_ms, side.median_high_ms, milliseconds))


def speedup(comparison: Comparison) -> TextCell:
    """A speed-up with its interval."""
    interval = span(comparison.speedup_low, comparison.speedup_high, lambda x: f"{x:.2f}")
    return TextCell(times(comparison.speedup), interval, "strong")


def grouped(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """Measurements by runner and precision, in their order."""
    groups: dict[str, list[Measurement]] = {}
    for each in measurements:
        groups.setdefault(runner_of(each), []).append(each)
    return list(groups.values())


def sizes(report: Report) -> TextTable:
    """Scores, depth, parameters, FLOPs and file of both networks."""
    teacher, student = report.teacher, report.student
    task = task_of_scores(teacher.scores, student.scores)
    rows = [(row.label, row.teacher, row.student, row.change) for row in task.rows(teacher.scores, student.scores)]
    a, b = teacher.breakdown, student.breakdown
    rows += [
        (f"Depth, {a.depth_unit}", str(a.depth), str(b.depth), f"÷ {report.depth_ratio:.2f}"),
        ("Parameters", short(a.parameters), short(b.parameters), f"÷ {report.parameter_ratio:.2f}"),
        (f"FLOPs per {report.data.noun}", short(a.flops), short(b.flops), f"÷ {report.flop_ratio:.2f}"),
        ("File", in_bytes(teacher.bytes), in_bytes(student.bytes), f"÷ {teacher.bytes / student.bytes:.2f}"),
    ]
    return TextTable(
        "Teacher and student",
        cells("", TextCell(teacher.name, "teacher", "teacher"), TextCell(student.name, "student", "student"), "change"),
        (tuple(cells(label, x, y, TextCell(change, kind="strong breaks")) for label, x, y, change in rows),),
        narrow=True,
    )


def latency(report: Report) -> TextTable:
    """Medians and throughput of both sides, and the speed-up."""
    groups = tuple(
        tuple(
            cells(
                runner_of(each),
                str(each.batch_size),
                *(median(side) for side in (each.teacher, each.student)),
                *(f"{side.images_per_second:,.0f}" for side in (each.teacher, each.student)),
                speedup(each.comparison),
                each.comparison.verdict,
            )
            for each in members
        )
        for members in grouped(report.measurements)
    )
    noun = report.data.noun
    heads = (TextCell(f"{side} {unit}", kind=side) for unit in ("ms", f"{noun}s/s") for side in ("teacher", "student"))
    return TextTable(
        f"Latency in ms a call, throughput in {noun}s/s",
        cells("runner", "batch", *heads, "speed-up", "verdict"),
        groups,
    )


def sections(report: Report) -> TextTable:
    """Time at each batch size, parameters and FLOPs of each section, teacher → student."""
    timed = {(each.name, each.batch_size): each for each in report.section_times}
    batch_sizes = list(dict.fromkeys(each.batch_size for each in report.section_times))
    rows = []
    for teacher, student in zip(report.teacher.breakdown.parts, report.student.breakdown.parts, strict=True):
        found = [timed.get((teacher.name, size)) for size in batch_sizes]
        changes = (
            *(
                f"{milliseconds(each.teacher_ms)} → {milliseconds(each.student_ms)}" if each else NOTHING
                for each in found
            ),
            f"{short(teacher.parameters)} → {short(student.parameters)}",
            f"{short(teacher.flops)} → {short(student.flops)}",
        )
        blocks = NOTHING if teacher.blocks is None else f"{teacher.blocks} → {student.blocks}"
        rows.append(cells(teacher.name, blocks, *(TextCell(change, kind="breaks") for change in changes)))
    flops = f"FLOPs per {report.data.noun}"
    heads = cells("section", "blocks", *(f"ms, batch {size}" for size in batch_sizes), "parameters", flops)
    return TextTable("By section: teacher → student", heads, (tuple(rows),), narrow=len(batch_sizes) < 2)


def fidelity(report: Report) -> TextTable | None:
    """Errors of the student's parts; None if they were not measured."""
    if report.fidelity is None:
        return None
    rows = tuple(
        cells(each.name, relative_error(each.on_teacher), relative_error(each.on_own))
        for each in report.fidelity.deviations
    )
    heads = cells(
        "output of",
        TextCell("on the teacher’s input", kind="teacher"),
        TextCell("in its own chain", kind="student"),
    )
    return TextTable("Relative RMS error", heads, (rows,), narrow=True)


# The details at the end of the page: tables whose columns are left out if nothing is known for any row.

T = TypeVar("T")
Column = tuple[str, Callable[[T], str | None]]


def _ms(name: str) -> Callable[[SideTiming], str | None]:
    return lambda side: None if (value := getattr(side, name)) is None else milliseconds(value)


def _of_gpu(text: Callable[[Gpu], str]) -> Callable[[Conditions], str | None]:
    return lambda now: None if now.gpu is None else text(now.gpu)


def _cores(cores: tuple[int, ...]) -> str:
    """`0, 1`; of more than four the first, the last and their number."""
    return ", ".join(map(str, cores)) if len(cores) <= 4 else f"{cores[0]}–{cores[-1]} ({len(cores)})"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


_START: tuple[Column[SideTiming], ...] = (
    ("load s", lambda side: _number(side.load_seconds, ".2f")),
    ("build s", lambda side: _number(side.build_seconds, ".2f")),
    ("first call ms", _ms("first_run_ms")),
    ("peak memory", lambda side: None if side.peak_memory_bytes is None else in_bytes(side.peak_memory_bytes)),
    ("energy J a call", lambda side: _number(side.energy_joules, ".3g")),
)
_CALL: tuple[Column[SideTiming], ...] = (
    ("samples", lambda side: f"{side.samples:,}"),
    ("quartiles", lambda side: f"{milliseconds(side.q1_ms)}–{milliseconds(side.q3_ms)}"),
    ("p90", _ms("p90_ms")),
    ("p95", _ms("p95_ms")),
    ("p99", _ms("p99_ms")),
    ("p99.9", _ms("p99_9_ms")),
    ("processor time", _ms("cpu_ms")),
    ("launch", _ms("launch_ms")),
    ("copy in", _ms("copy_in_ms")),
    ("copy out", _ms("copy_out_ms")),
    ("end to end", _ms("end_to_end_ms")),
    ("as CUDA graph", _ms("captured_ms")),
)
_CONDITIONS: tuple[Column[Conditions], ...] = (
    ("seconds", lambda now: f"{now.seconds:.1f}"),
    ("on cores", lambda now: _cores(now.cores) if now.cores else None),
    ("other load, cores", lambda now: _number(now.other_load, ".2f")),
    ("on the machine", lambda now: _number(now.machine_load, ".2f")),
    ("waited s", lambda now: _number(now.waiting_seconds, ".2f")),
    ("stolen", lambda now: None if now.stolen is None else f"{100 * now.stolen:.1f} %"),
    ("preempted", lambda now: _number(now.preemptions, ",d")),
    ("stopped by quota s", lambda now: _number(now.quota_seconds, ".2f")),
    ("clock MHz", lambda now: _number(now.clock_mhz, ",.0f")),
    ("lowest", lambda now: _number(now.clock_low_mhz, ",.0f")),
)
_GPU: tuple[Column[Conditions], ...] = (
    ("clock MHz", _of_gpu(lambda gpu: f"{gpu.clock_mhz:,.0f} of {gpu.max_clock_mhz:,.0f}")),
    ("lowest", _of_gpu(lambda gpu: f"{gpu.clock_low_mhz:,.0f}")),
    ("°C", _of_gpu(lambda gpu: f"{gpu.temperature_c:.0f}")),
    ("W", _of_gpu(lambda gpu: f"{gpu.power_watts:.0f}")),
    ("throttled by", _of_gpu(lambda gpu: ", ".join(gpu.throttle_reasons) or "nothing")),
)


def start(report: Report) -> TextTable:
    """What is paid once: loading, building, the first call, memory; and energy."""
    return _by_side("Start, memory and energy", report, _START)


def calls(report: Report) -> TextTable:
    """Spread, tails and parts of a call, in ms."""
    return _by_side("Spread and parts of a call, in ms", report, _CALL)


def conditions(report: Report) -> TextTable:
    """How each measurement ended, and the state of the machine during it."""
    ended: tuple[Column[Measurement], ...] = (
        ("ended by", lambda each: each.stopped),
        ("timer µs", lambda each: f"{1e3 * each.overhead_ms:.2f}"),
    )
    return _by_measurement("The machine during the measurement", report, (*ended, *map(_of_conditions, _CONDITIONS)))


def gpu(report: Report) -> TextTable | None:
    """The state of the GPU during each measurement; None if nothing is known of one."""
    if not any(each.conditions.gpu for each in report.measurements):
        return None
    return _by_measurement("The GPU during the measurement", report, [_of_conditions(column) for column in _GPU])


def _of_conditions(column: Column[Conditions]) -> Column[Measurement]:
    head, text = column
    return head, lambda each: text(each.conditions)


def _by_measurement(caption: str, report: Report, columns: Sequence[Column[Measurement]]) -> TextTable:
    """One row per measurement."""
    known = [(head, text) for head, text in columns if any(text(each) for each in report.measurements)]
    groups = tuple(
        tuple(
            cells(runner_of(each), str(each.batch_size), *(text(each) or NOTHING for _, text in known))
            for each in members
        )
        for members in grouped(report.measurements)
    )
    return TextTable(caption, cells("runner", "batch", *(head for head, _ in known)), groups)


def _by_side(caption: str, report: Report, columns: Sequence[Column[SideTiming]]) -> TextTable:
    """Two rows per measurement."""
    sides = [side for each in report.measurements for side in (each.teacher, each.student)]
    known = [(head, text) for head, text in columns if any(text(side) is not None for side in sides)]
    groups = tuple(
        tuple(
            cells(
                runner_of(each),
                str(each.batch_size),
                TextCell(role, kind=role),
                *(text(side) or NOTHING for _, text in known),
            )
            for each in members
            for role, side in (("teacher", each.teacher), ("student", each.student))
        )
        for members in grouped(report.measurements)
    )
    return TextTable(caption, cells("runner", "batch", "", *(head for head, _ in known)), groups)
