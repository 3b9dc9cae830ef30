"""The report's tables: what stands in each column, told once for the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from litdeploy.profiler.figures import (
    decimals,
    in_bytes,
    milliseconds,
    percent,
    points,
    relative_error,
    runner_of,
    short,
    times,
)

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Comparison, Measurement, Report, SideTiming
    from litdeploy.storage.records import Accuracy

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in one cell.

    Attributes:
        small: beside it, in smaller letters: an interval.
        kind: `teacher`, `student`, `strong`, `breaks` (lines may break in it), or several with a space between.
    """

    text: str
    small: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table with a header row; the first cell of each row is its name.

    Attributes:
        groups: rows that belong together.
        narrow: few columns, no wider than text.
        stacked: what is small in a cell stands below its text, not beside it.
    """

    caption: str
    columns: tuple[Cell, ...]
    groups: tuple[tuple[tuple[Cell, ...], ...], ...]
    narrow: bool = False
    stacked: bool = False

    @property
    def rows(self) -> Iterable[tuple[Cell, ...]]:
        """The rows of all groups."""
        return (row for group in self.groups for row in group)


def columns(*names: str | Cell) -> tuple[Cell, ...]:
    """Column heads."""
    return tuple(Cell(name) if isinstance(name, str) else name for name in names)


def span(low: float | None, high: float | None, told: Callable[[float], str]) -> str:
    """An interval for people; nothing where there is none."""
    return "" if low is None or high is None else f"{told(low)}–{told(high)}"


def median(side: SideTiming) -> Cell:
    """A median with its interval."""
    return Cell(milliseconds(side.median_ms), span(side.median_low_ms, side.median_high_ms, milliseconds))


def speedup(comparison: Comparison) -> Cell:
    """A speed-up with its interval."""
    return Cell(
        times(comparison.speedup), span(comparison.speedup_low, comparison.speedup_high, lambda x: f"{x:.2f}"), "strong"
    )


def grouped(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """Measurements by runner and precision, in their order."""
    groups: dict[str, list[Measurement]] = {}
    for each in measurements:
        groups.setdefault(runner_of(each), []).append(each)
    return list(groups.values())


def accuracy_change(before: Accuracy, after: Accuracy) -> str:
    """Points from one accuracy to another: `−2.05 points`."""
    change = points(before, after)
    if not change:
        return "±0 points"
    return f"{change:+.{decimals(min(before.images, after.images))}f} points".replace("-", "−")


def sizes(report: Report) -> Table:
    """Accuracy or likeness, depth, parameters, FLOPs and file of both networks."""
    teacher, student = report.teacher, report.student
    rows = []
    for split in sorted(teacher.accuracy.keys() | student.accuracy.keys()):
        before, after = teacher.accuracy.get(split), student.accuracy.get(split)
        change = NOTHING
        if before and after:
            change = accuracy_change(before, after)
        rows.append((f"Accuracy, {split}", percent(before), percent(after), change))
    for split, near in sorted(student.likeness.items()):
        rows.append((f"PSNR to the teacher, {split}", NOTHING, f"{near.psnr:.1f} dB", NOTHING))
        rows.append((f"SSIM to the teacher, {split}", NOTHING, f"{near.ssim:.4f}", NOTHING))
    a, b = teacher.breakdown, student.breakdown
    rows.append((f"Depth, {a.depth_unit}", str(a.depth), str(b.depth), f"÷ {report.depth_ratio:.2f}"))
    rows.append(("Parameters", short(a.parameters), short(b.parameters), f"÷ {report.parameter_ratio:.2f}"))
    rows.append((f"FLOPs per {report.data.noun}", short(a.flops), short(b.flops), f"÷ {report.flop_ratio:.2f}"))
    rows.append(("File", in_bytes(teacher.bytes), in_bytes(student.bytes), f"÷ {teacher.bytes / student.bytes:.2f}"))
    return Table(
        "Teacher and student",
        columns("", Cell(teacher.name, "teacher", "teacher"), Cell(student.name, "student", "student"), "change"),
        (tuple((Cell(what), Cell(x), Cell(y), Cell(change, kind="strong breaks")) for what, x, y, change in rows),),
        narrow=True,
    )


def latency(report: Report) -> Table:
    """Medians and throughput of both sides, and the speed-up."""
    groups = tuple(
        tuple(
            (
                Cell(runner_of(each)),
                Cell(str(each.batch_size)),
                *(median(side) for side in (each.teacher, each.student)),
                *(Cell(f"{side.images_per_second:,.0f}") for side in (each.teacher, each.student)),
                speedup(each.comparison),
                Cell(each.comparison.verdict),
            )
            for each in members
        )
        for members in grouped(report.measurements)
    )
    heads = [Cell(name, kind=name) for name in ("teacher", "student")]
    return Table(
        f"Latency in ms a call, throughput in {report.data.noun}s/s",
        columns(
            "runner",
            "batch",
            *(Cell(f"{head.text} ms", kind=head.kind) for head in heads),
            *(Cell(f"{head.text} {report.data.noun}s/s", kind=head.kind) for head in heads),
            "speed-up",
            "verdict",
        ),
        groups,
    )


def sections(report: Report) -> Table:
    """Time at each batch size, parameters and FLOPs of each section, teacher → student."""
    timed = {(each.name, each.batch_size): each for each in report.section_times}
    batch_sizes = list(dict.fromkeys(each.batch_size for each in report.section_times))
    rows = []
    for teacher, student in zip(report.teacher.breakdown.parts, report.student.breakdown.parts, strict=True):
        times = [timed.get((teacher.name, size)) for size in batch_sizes]
        blocks = NOTHING if teacher.blocks is None else f"{teacher.blocks} → {student.blocks}"
        changes = (
            *(
                f"{milliseconds(each.teacher_ms)} → {milliseconds(each.student_ms)}" if each else NOTHING
                for each in times
            ),
            f"{short(teacher.parameters)} → {short(student.parameters)}",
            f"{short(teacher.flops)} → {short(student.flops)}",
        )
        rows.append((Cell(teacher.name), Cell(blocks), *(Cell(change, kind="breaks") for change in changes)))
    flops = f"FLOPs per {report.data.noun}"
    heads = columns("section", "blocks", *(f"ms, batch {size}" for size in batch_sizes), "parameters", flops)
    return Table("By section: teacher → student", heads, (tuple(rows),), narrow=len(batch_sizes) < 2)


def fidelity(report: Report) -> Table | None:
    """Errors of the student's parts; None where they were not measured."""
    if report.fidelity is None:
        return None
    rows = tuple(
        (Cell(each.name), Cell(relative_error(each.on_teacher)), Cell(relative_error(each.on_own)))
        for each in report.fidelity.deviations
    )
    heads = columns(
        "output of", Cell("on the teacher’s input", kind="teacher"), Cell("in its own chain", kind="student")
    )
    return Table("Relative RMS error", heads, (rows,), narrow=True)
