"""The report as one HTML page that needs nothing else: no network, no fonts, no scripts."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from litdeploy.profiler.formatting import milliseconds, runner_of, short, times
from litdeploy.profiler.report import tables
from litdeploy.profiler.schema import Measurement, Report
from litdeploy.storage.records import CUT, descent
from litdeploy.tasks import CURVES, task_of_scores

# Findings that put the figures themselves in doubt: they are shown with the verdict.
DISTURBANCES = ("throttled", "noisy neighbour", "drift", "behind pace")

_CHARTS = ("latency", "throughput", "sections", "fidelity", "score_latency", "training")

TitledChart = tuple[str, Markup]


def render(report: Report, sample_sheet: bytes | None = None) -> str:
    """Render the page. Everything that came from files (names, paths, metrics) is escaped.

    Without matplotlib, or the Pillow that it needs, the page has no charts and says so.

    Args:
        sample_sheet: a generator's, as PNG; None if there is none.
    """
    groups = tables.grouped(report.measurements)
    scores = report.teacher.scores, report.student.scores
    task = task_of_scores(*scores)
    charts = chart_module()
    trained = [row for row in report.training if row.get("phase") != CUT]
    return fill(
        "report.html.j2",
        report=report,
        task=task,
        verdict=unbroken(report.verdict, (report.teacher.name, report.student.name)),
        strip=_strip(report),
        descent=descent(report.lineage) if report.lineage else None,
        tables={
            "latency": tables.latency(report),
            "sections": tables.sections(report),
            "fidelity": tables.fidelity(report),
            "sizes": tables.sizes(report),
            "start": tables.start(report),
            "calls": tables.calls(report),
            "conditions": tables.conditions(report),
            "gpu": tables.gpu(report),
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
        split=task.split(*scores),
        sample_sheet=None if sample_sheet is None else base64.b64encode(sample_sheet).decode(),
        phases=[str(phase) for phase, _ in groupby(row.get("phase", "") for row in trained)],
        cut=len(trained) < len(report.training),
        recipe=yaml.safe_dump(report.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        drawn=charts is not None,
        charts=_charts(charts, report, groups) if charts else dict.fromkeys(_CHARTS),
    )


def fill(template: str, package: str = "litdeploy.profiler.report", /, **values: Any) -> str:
    """Fill a template with its values, each escaped unless it is `Markup`.

    Args:
        package: that contains the template; it may extend and include those of this package.
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
    """The module `charts`; None if matplotlib cannot be imported."""
    try:
        from litdeploy.profiler.report import charts
    except ImportError:
        return None
    return charts


def unbroken(text: str, names: Sequence[str]) -> Markup:
    """The text, escaped, with the names marked so that no line breaks at their hyphens."""
    split = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return Markup("").join(Markup("<span>{}</span>").format(part) if part in names else part for part in split)


def _charts(
    charts: ModuleType, report: Report, groups: list[list[Measurement]]
) -> dict[str, list[TitledChart] | Markup | None]:
    """The report's charts, by their place in the template."""
    noun = report.data.noun
    by_batch = sorted(report.measurements, key=lambda each: each.batch_size)
    parts = list(zip(report.teacher.breakdown.parts, report.student.breakdown.parts, strict=True))
    return {
        "latency": [
            (f"Batch size {size}", charts.latency(size, list(members)))
            for size, members in groupby(by_batch, lambda each: each.batch_size)
        ],
        "throughput": [
            (f"{runner_of(members[0])}, {noun}s/s", charts.throughput(f"throughput-{index}", noun, members))
            for index, members in enumerate(groups)
            if len(members) > 1
        ],
        "sections": [
            *(
                (f"Time of a call, batch size {size}", charts.section_times(size, list(members)))
                for size, members in groupby(report.section_times, lambda each: each.batch_size)
            ),
            ("Parameters", charts.section_sizes("parameters", "Parameters by section", parts)),
            (f"FLOPs per {noun}", charts.section_sizes("flops", "FLOPs by section", parts)),
        ],
        "fidelity": charts.fidelity(report.fidelity) if report.fidelity else None,
        "score_latency": _score_latency(charts, report),
        "training": _training(charts, report),
    }


def _score_latency(charts: ModuleType, report: Report) -> Markup | None:
    """The score against latency; None if it is no share of correct answers, or not known for both on one split."""
    task = task_of_scores(report.teacher.scores, report.student.scores)
    split = task.split(report.teacher.scores, report.student.scores)
    if split is None:
        return None
    values = []
    for side in (report.teacher, report.student):
        score = side.scores.get(split)
        interval = task.interval(score) if score else None
        if score is None or score.correct is None or interval is None:
            return None
        low, high = (100 * end for end in interval)
        values.append(charts.Value(100 * score.correct, f"{100 * score.correct:.2f} %", low, high))
    at_headline = [each for each in report.measurements if each.batch_size == report.headline.batch_size]
    drawing: Markup = charts.score_latency(at_headline, task.measure, *values)
    return drawing


def _training(charts: ModuleType, report: Report) -> list[TitledChart]:
    """The loss, and the metric of each task that the rows contain."""
    validation = report.teacher.scores.get("validation")
    teacher = validation.correct if validation else None
    drawn = [("Training loss", charts.training_loss(report.training))]
    for curve in CURVES.values():
        drawn.append((curve.title, charts.validation_curve(report.training, curve, teacher)))
    return [(title, drawing) for title, drawing in drawn if drawing is not None]


def _strip(report: Report) -> list[tuple[str, str, str]]:
    """(name, figure, small text after it) of the most important figures."""
    headline = report.headline
    gain = tables.speedup(headline.comparison)
    interval = f"95 %: {gain.small}" if gain.small else "no interval: too few samples"
    teacher_ms, student_ms = (milliseconds(side.median_ms) for side in (headline.teacher, headline.student))
    scores = report.teacher.scores, report.student.scores
    score = task_of_scores(*scores).headline(*scores)
    a, b = report.teacher.breakdown, report.student.breakdown
    return [
        ("Speed-up", gain.text, f"{headline.comparison.verdict}, {interval}"),
        ("Latency", f"{teacher_ms} → {student_ms} ms", f"{runner_of(headline)}, batch {headline.batch_size}"),
        *([score] if score else []),
        ("Parameters", f"÷ {report.parameter_ratio:.2f}", f"{short(a.parameters)} → {short(b.parameters)}"),
    ]


def _scenario(measurement: Measurement) -> str:
    match measurement.scenario:
        case "cold cache":
            return "Each call with cold caches: they were emptied before it."
        case "paced":
            return f"Calls at even intervals, {measurement.pace:g} a second, with idle time between them."
        case _:
            return "Calls one after another, with warm caches."
