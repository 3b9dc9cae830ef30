"""The tables at the end of the report: start, parts of a call, tails, and how the machine was meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from litdeploy.profiler.figures import in_bytes, milliseconds, runner_of
from litdeploy.profiler.report.tables import NOTHING, Cell, Table, columns, grouped

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Conditions, Gpu, Measurement, Report, SideTiming

T = TypeVar("T")
Column = tuple[str, Callable[[T], str | None]]


def _ms(name: str) -> Callable[[SideTiming], str | None]:
    def told(side: SideTiming) -> str | None:
        value = getattr(side, name)
        return None if value is None else milliseconds(value)

    return told


def _seconds(name: str) -> Callable[[SideTiming], str | None]:
    def told(side: SideTiming) -> str | None:
        value = getattr(side, name)
        return None if value is None else f"{value:.2f}"

    return told


def _of_gpu(told: Callable[[Gpu], str]) -> Callable[[Conditions], str | None]:
    return lambda now: None if now.gpu is None else told(now.gpu)


def _cores(cores: tuple[int, ...]) -> str:
    """`0, 1`, or of many the first, the last and how many."""
    return ", ".join(map(str, cores)) if len(cores) <= 4 else f"{cores[0]}–{cores[-1]} ({len(cores)})"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


_START: tuple[Column[SideTiming], ...] = (
    ("load s", _seconds("load_seconds")),
    ("build s", _seconds("build_seconds")),
    ("first call ms", _ms("first_run_ms")),
    ("peak memory", lambda side: None if side.peak_memory_bytes is None else in_bytes(side.peak_memory_bytes)),
    ("energy J a call", lambda side: None if side.energy_joules is None else f"{side.energy_joules:.3g}"),
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
    ("least", lambda now: _number(now.clock_low_mhz, ",.0f")),
)
_GPU: tuple[Column[Conditions], ...] = (
    ("clock MHz", _of_gpu(lambda gpu: f"{gpu.clock_mhz:,.0f} of {gpu.max_clock_mhz:,.0f}")),
    ("least", _of_gpu(lambda gpu: f"{gpu.clock_low_mhz:,.0f}")),
    ("°C", _of_gpu(lambda gpu: f"{gpu.temperature_c:.0f}")),
    ("W", _of_gpu(lambda gpu: f"{gpu.power_watts:.0f}")),
    ("throttled by", _of_gpu(lambda gpu: ", ".join(gpu.throttle_reasons) or "nothing")),
)


def start(report: Report) -> Table:
    """What is paid once: loading, building, the first call, memory; and energy."""
    return _by_side("Start, memory and energy", report, _START)


def calls(report: Report) -> Table:
    """Spread, tails and parts of a call, in ms."""
    return _by_side("Spread and parts of a call, in ms", report, _CALL)


def conditions(report: Report) -> Table:
    """How each measurement ended, and how the machine was meanwhile."""
    ended: tuple[Column[Measurement], ...] = (
        ("ended by", lambda each: each.stopped),
        ("timer µs", lambda each: f"{1e3 * each.overhead_ms:.2f}"),
    )
    return _by_measurement("The machine meanwhile", report, (*ended, *map(_of_conditions, _CONDITIONS)))


def gpu(report: Report) -> Table | None:
    """How the GPU was meanwhile; None where nothing is known of one."""
    if not any(each.conditions.gpu for each in report.measurements):
        return None
    return _by_measurement("The GPU meanwhile", report, [_of_conditions(column) for column in _GPU])


def _of_conditions(column: Column[Conditions]) -> Column[Measurement]:
    head, told = column
    return head, lambda each: told(each.conditions)


def _by_measurement(caption: str, report: Report, candidates: Sequence[Column[Measurement]]) -> Table:
    """A row a measurement; columns of which nothing is known are left out."""
    shown = [(head, told) for head, told in candidates if any(told(each) for each in report.measurements)]
    groups = tuple(
        tuple(
            (Cell(runner_of(each)), Cell(str(each.batch_size)), *(Cell(told(each) or NOTHING) for _, told in shown))
            for each in members
        )
        for members in grouped(report.measurements)
    )
    return Table(caption, columns("runner", "batch", *(head for head, _ in shown)), groups)


def _by_side(caption: str, report: Report, candidates: Sequence[Column[SideTiming]]) -> Table:
    """Two rows a measurement; columns of which nothing is known are left out."""
    sides = [side for each in report.measurements for side in (each.teacher, each.student)]
    shown = [(head, told) for head, told in candidates if any(told(side) is not None for side in sides)]
    groups = tuple(
        tuple(
            (
                Cell(runner_of(each)),
                Cell(str(each.batch_size)),
                Cell(role, kind=role),
                *(Cell(told(side) or NOTHING) for _, told in shown),
            )
            for each in members
            for role, side in (("teacher", each.teacher), ("student", each.student))
        )
        for members in grouped(report.measurements)
    )
    return Table(caption, columns("runner", "batch", "", *(head for head, _ in shown)), groups)
