"""The report as one page that needs nothing beside itself: no network, no fonts, no scripts."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from litdeploy.profiler.analysis.verdict import accuracy_split, likeness_split
from litdeploy.profiler.figures import milliseconds, percent, runner_of, short, times
from litdeploy.profiler.report import detail_tables, tables
from litdeploy.storage.records import descent

if TYPE_CHECKING:
    from litdeploy.profiler.schema import Measurement, Report

# Findings that put the figures themselves in doubt: they are told beside the verdict.
DISTURBANCES = ("throttled", "noisy neighbour", "drift", "behind pace")

Drawn = tuple[str, Markup]  # a chart with its heading


def render(report: Report, sample_sheet: bytes | None = None) -> str:
    """The page as HTML. Whatever came from files (names, paths, metrics) is escaped.

    Without matplotlib, or the Pillow that it needs, the page has no charts and says so.

    Args:
        sample_sheet: PNG of a generator's; None: there is none.
    """
    charts = chart_module()
    groups = tables.grouped(report.measurements)
    return fill(
        "report.html.j2",
        report=report,
        verdict=unbroken(report.verdict, (report.teacher.name, report.student.name)),
        strip=_strip(report),
        descent=descent(report.lineage) if report.lineage else None,
        tables={
            "latency": tables.latency(report),
            "sections": tables.sections(report),
            "fidelity": tables.fidelity(report),
            "sizes": tables.sizes(report),
            "start": detail_tables.start(report),
            "calls": detail_tables.calls(report),
            "conditions": detail_tables.conditions(report),
            "gpu": detail_tables.gpu(report),
        },
        runners=groups,
        scenario=_scenario(report.headline),
        few=any(each.comparison.speedup_low is None for each in report.measurements),
        processes=[
            (each, ", ".join(map(times, each.comparison.processes)))
            for each in report.measurements
            if each.comparison.processes
        ],
        disturbances=[each for each in report.findings if each.kind in DISTURBANCES],
        drawn=charts is not None,
        accuracy_split=accuracy_split(report.teacher.accuracy, report.student.accuracy),
        sample_sheet=None if sample_sheet is None else base64.b64encode(sample_sheet).decode(),
        phases=[str(phase) for phase, _ in groupby(row.get("phase", "") for row in report.training)],
        recipe=yaml.safe_dump(report.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        **_drawings(charts, report, groups),
    )


def fill(template: str, package: str = "litdeploy.profiler.report", /, **values: Any) -> str:
    """A template with its values, each escaped unless it is `Markup`.

    Args:
        package: that has the template; what it extends and includes may be of this one.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(each, "templates") for each in (package, "litdeploy.profiler.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds, "short": short}
    return environment.get_template(template).render(**values)


def chart_module() -> ModuleType | None:
    """`charts`; None where matplotlib cannot be imported."""
    try:
        from litdeploy.profiler.report import charts
    except ImportError:
        return None
    return charts


def unbroken(text: str, names: Sequence[str]) -> Markup:
    """The text, escaped, with the names marked, so that no line breaks at their hyphens."""
    split = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return Markup("").join(Markup("<span>{}</span>").format(part) if part in names else part for part in split)


def _drawings(
    charts: ModuleType | None, report: Report, groups: list[list[Measurement]]
) -> dict[str, list[Drawn] | Markup | None]:
    """Every chart of the report by its name in the template; nothing where there is nothing to draw."""
    names = ("latency", "throughput", "section_charts", "training")
    if charts is None:
        return {**{name: [] for name in names}, "fidelity": None, "accuracy_latency": None}
    by_batch = sorted(report.measurements, key=lambda each: each.batch_size)
    return {
        "latency": [
            (f"Batch size {size}", charts.latency(size, list(members)))
            for size, members in groupby(by_batch, lambda each: each.batch_size)
        ],
        "throughput": [
            (f"{runner_of(members[0])}, {report.data.noun}s/s", charts.throughput(f"throughput-{index}", members))
            for index, members in enumerate(groups)
            if len(members) > 1
        ],
        "section_charts": _section_drawings(charts, report),
        "fidelity": charts.fidelity(report.fidelity) if report.fidelity else None,
        "accuracy_latency": _accuracy_latency(charts, report),
        "training": _training_drawings(report),
    }


def _section_drawings(charts: ModuleType, report: Report) -> list[Drawn]:
    parts = list(zip(report.teacher.breakdown.parts, report.student.breakdown.parts, strict=True))
    times = [
        (f"Time of a call, batch size {size}", charts.section_times(size, list(members)))
        for size, members in groupby(report.section_times, lambda each: each.batch_size)
    ]
    drawn = [
        ("Parameters", charts.section_sizes("parameters", "Parameters by section", parts)),
        (f"FLOPs per {report.data.noun}", charts.section_sizes("flops", "FLOPs by section", parts)),
    ]
    return [*times, *drawn]


def _accuracy_latency(charts: ModuleType, report: Report) -> Markup | None:
    split = accuracy_split(report.teacher.accuracy, report.student.accuracy)
    if split is None:
        return None
    at_headline = [each for each in report.measurements if each.batch_size == report.headline.batch_size]
    drawing: Markup = charts.accuracy_latency(
        at_headline, report.teacher.accuracy[split], report.student.accuracy[split]
    )
    return drawing


def _training_drawings(report: Report) -> list[Drawn]:
    from litdeploy.profiler.report import training_charts

    validation = report.teacher.accuracy.get("validation")
    drawn = (
        ("Training loss", training_charts.training_loss(report.training)),
        (
            "Validation accuracy, %",
            training_charts.validation_accuracy(report.training, validation.top1 if validation else None),
        ),
        ("Validation PSNR, dB", training_charts.validation_likeness(report.training)),
    )
    return [(title, drawing) for title, drawing in drawn if drawing is not None]


def _strip(report: Report) -> list[tuple[str, str, str]]:
    """(name, figure, what is small beside it) of the figures that one looks for first."""
    headline = report.headline
    gained = tables.speedup(headline.comparison)
    interval = f"95 %: {gained.small}" if gained.small else "no interval: too few samples"
    where = f"{runner_of(headline)}, batch {headline.batch_size}"
    teacher_ms, student_ms = (milliseconds(side.median_ms) for side in (headline.teacher, headline.student))
    strip = [
        ("Speed-up", gained.text, f"{headline.comparison.verdict}, {interval}"),
        ("Latency", f"{teacher_ms} → {student_ms} ms", where),
    ]
    if split := accuracy_split(report.teacher.accuracy, report.student.accuracy):
        before, after = report.teacher.accuracy[split], report.student.accuracy[split]
        strip.append(
            ("Accuracy", tables.accuracy_change(before, after), f"{percent(before)} → {percent(after)}, {split}")
        )
    elif split := likeness_split(report.student.likeness):
        near = report.student.likeness[split]
        strip.append(("Likeness", f"{near.psnr:.1f} dB", f"PSNR, SSIM {near.ssim:.4f}, {split}"))
    a, b = report.teacher.breakdown, report.student.breakdown
    strip.append(("Parameters", f"÷ {report.parameter_ratio:.2f}", f"{short(a.parameters)} → {short(b.parameters)}"))
    return strip


def _scenario(measurement: Measurement) -> str:
    match measurement.scenario:
        case "cold cache":
            return "Each call on cold caches: they were emptied before it."
        case "paced":
            return f"Calls at even times, {measurement.pace:g} a second, with idle time between them."
        case _:
            return "Calls one after the other, on warm caches."
