"""The report as one page that needs nothing beside itself: no network, no fonts, no scripts."""

from __future__ import annotations

import base64
import re
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from litdeploy.bundle import SAMPLES, Accuracy
from litdeploy.profiler.verdict import decimals, milliseconds, points, times

if TYPE_CHECKING:
    from litdeploy.profiler.report import Report

_SPACE = "\N{NO-BREAK SPACE}"


def render(report: Report) -> str:
    """The page as HTML. Whatever came from files (names, paths, metrics) is escaped.

    Without matplotlib, or the Pillow that it needs, the page has no charts and says so.
    """
    charts = _charts()
    environment = Environment(
        loader=PackageLoader("litdeploy.profiler", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds, "times": times, "short": short, "bytes": in_bytes}
    validation = report.teacher.accuracy.get("validation")
    told = [side.model_dump(exclude_none=True) for each in report.measurements for side in (each.teacher, each.student)]
    by_batch = sorted(report.measurements, key=lambda measurement: measurement.batch_size)
    return environment.get_template("report.html.j2").render(
        report=report,
        verdict=_unbroken(report.verdict, (report.teacher.name, report.student.name)),
        sizes=_sizes(report),
        sections=list(zip(report.teacher.breakdown.parts, report.student.breakdown.parts, strict=True)),
        latency=[
            (batch_size, charts.latency(batch_size, list(members)))
            for batch_size, members in groupby(by_batch, lambda measurement: measurement.batch_size)
            if charts
        ],
        runners=[list(members) for _, members in groupby(report.measurements, lambda measurement: measurement.runner)],
        tails=[name for name in ("p90", "p95", "p99") if any(f"{name}_ms" in side for side in told)],
        drawn=charts is not None,
        loss=charts and charts.training_loss(report.training),
        accuracy=charts and charts.validation_accuracy(report.training, validation.top1 if validation else None),
        likeness=charts and charts.validation_likeness(report.training),
        teacher_validation=validation,
        phases=[str(phase) for phase, _ in groupby(row.get("phase", "") for row in report.training)],
        samples=_data_url(Path(report.bundle) / SAMPLES) if report.student.likeness else None,
        recipe=yaml.safe_dump(report.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
    )


def _data_url(path: Path) -> str | None:
    """A PNG as part of the page; None where there is none."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if path.is_file() else None


def _charts() -> ModuleType | None:
    try:
        from litdeploy.profiler import charts
    except ImportError:
        return None
    return charts


def _unbroken(text: str, names: tuple[str, str]) -> Markup:
    """The text, escaped, with the names marked, so that no line breaks at their hyphens."""
    split = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return Markup("").join(Markup("<span>{}</span>").format(part) if part in names else part for part in split)


def short(number: float) -> str:
    """A count for people: `856 k`, `1.27 M`, `251 M`, with a space that no line breaks at."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            value = number / factor
            return (f"{value:.3g}" if value < 999.5 else f"{value:.0f}") + _SPACE + letter
    return f"{number:g}"


def in_bytes(number: int) -> str:
    """Bytes for people, in powers of 1000: `3.45 MB`."""
    text = short(number)
    return f"{text}B" if _SPACE in text else f"{text}{_SPACE}B"


def _sizes(report: Report) -> list[tuple[str, str, str, str]]:
    """Rows (what, teacher, student, change) of the first table."""
    teacher, student = report.teacher, report.student
    rows = []
    for split in sorted(teacher.accuracy.keys() | student.accuracy.keys()):
        before, after = teacher.accuracy.get(split), student.accuracy.get(split)
        change = "–"
        if before and after:
            change = f"{points(before, after):+.{decimals(min(before.images, after.images))}f} points".replace("-", "−")
        rows.append((f"Accuracy, {split}", _percent(before), _percent(after), change))
    rows += [(f"Against the teacher's, {split}", "–", found.told(), "–") for split, found in student.likeness.items()]
    a, b = teacher.breakdown, student.breakdown
    rows.append((f"Depth, {a.depth_unit}", str(a.depth), str(b.depth), f"÷ {report.depth_ratio:.2f}"))
    rows.append(("Parameters", short(a.parameters), short(b.parameters), f"÷ {report.parameter_ratio:.2f}"))
    rows.append(("FLOPs an image", short(a.flops), short(b.flops), f"÷ {report.flop_ratio:.2f}"))
    rows.append(("File", in_bytes(teacher.bytes), in_bytes(student.bytes), f"÷ {teacher.bytes / student.bytes:.2f}"))
    return rows


def _percent(accuracy: Accuracy | None) -> str:
    return "not measured" if accuracy is None else f"{100 * accuracy.top1:.{decimals(accuracy.images)}f} %"
