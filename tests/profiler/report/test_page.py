from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from pydantic import BaseModel

from litdeploy.profiler.report.page import render
from litdeploy.profiler.schema import Report
from tests.profiler.conftest import HOSTILE, hostile


class Outline(HTMLParser):
    """Which elements are open when the page ends, its headings' levels, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def test_the_page_is_whole_and_stands_alone(report: Report) -> None:
    page = render(report)
    parsed = outline(page)
    assert not parsed.open
    assert parsed.headings[0] == "h1"
    assert parsed.headings.count("h1") == 1
    assert len(parsed.ids) == len(set(parsed.ids))
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert "http" not in page
    assert "@import" not in page
    assert "data:" not in page


def test_the_verdict_comes_first(report: Report) -> None:
    page = render(report)
    [(heading, rest)] = re.findall(r"<h1>(.*?)</h1>(.*)", page, re.DOTALL)
    assert re.sub("</?span>", "", heading) == report.verdict
    assert "<table" in rest


def test_every_chart_has_a_name_and_a_description_and_the_pages_colours(report: Report) -> None:
    charts = re.findall(r"<svg.*?</svg>", render(report), re.DOTALL)
    # Latency at three batch sizes, throughput in three runners, sections' time, parameters and FLOPs, fidelity,
    # accuracy against latency, loss and validation accuracy.
    assert len(charts) == 3 + 3 + 3 + 1 + 1 + 2
    for chart in charts:
        assert re.match(
            r'<svg viewBox="[\d. ]+" role="img" aria-labelledby="[\w-]+ [\w-]+"><title id=.*?<desc id=', chart
        )
        assert not re.findall(r"#[0-9a-f]{6}", chart)
        assert "var(--second)" in chart
        for target in re.findall(r'(?:url\(#|href="#)([\w-]+)', chart):
            assert f'id="{target}"' in chart


def test_what_comes_from_files_is_escaped(report: Report) -> None:
    page = render(hostile(report))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not outline(page).open


def test_a_page_shows_the_cut_alone_and_what_the_training_warned_of(report: Report) -> None:
    plain = render(report)
    assert "the cut alone" not in plain
    assert "The training warned" not in plain
    cut = {"phase": "cut", "epoch": 0, "epochs": 5, "validation_top1": 0.5}
    changes = {"training": (cut, *report.training), "warnings": ("no epoch made the student <better>",)}
    page = render(report.model_copy(update=changes))
    assert "The first point is the cut alone, before its first step." in page
    assert "<li>no epoch made the student &lt;better&gt;</li>" in page
    assert "Phases: cut" not in page


@pytest.mark.parametrize(
    "training", [(), ({},), ({"epoch": 1, "loss": None},), ({"phase": None, "epoch": "one", "loss": True},)]
)
def test_a_page_without_a_training_curve(report: Report, training: tuple[dict[str, object], ...]) -> None:
    assert "contains no record of its epochs" in render(report.model_copy(update={"training": training}))


def test_a_page_of_little(report: Report) -> None:
    bare = {"accuracy": {}}
    little = report.model_copy(
        update={
            "teacher": report.teacher.model_copy(update=bare),
            "student": report.student.model_copy(update=bare),
            "measurements": report.measurements[:1],
            "parity": None,
            "training": ({"epoch": 1, "validation_top1": 0.5},),
            "test_used_once": False,
            "environment": report.environment.model_copy(update={"load_average": None}),
        }
    )
    page = render(little)
    assert "no accuracy on a test split" in page
    assert "no exported student" in page
    assert not outline(page).open


def test_a_page_where_matplotlib_is_missing(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "litdeploy.profiler.report.charts", raising=False)
    monkeypatch.delattr("litdeploy.profiler.report.charts", raising=False)
    page = render(report)
    assert "There are no charts" in page
    assert "metrics.jsonl" in page
    assert "<svg" not in page
    assert not outline(page).open


def test_the_page_is_the_same_for_the_same_report(report: Report) -> None:
    assert render(report) == render(report)


def every_text_hostile(value: Any) -> Any:
    """The same with every text in it replaced."""
    if isinstance(value, BaseModel):
        return value.model_copy(
            update={name: every_text_hostile(getattr(value, name)) for name in type(value).model_fields}
        )
    if isinstance(value, dict):
        return {HOSTILE if isinstance(key, str) else key: every_text_hostile(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(every_text_hostile, value))
    # Without letters that the charts' font lacks: a runner's name is drawn.
    return HOSTILE.removesuffix("漢") if isinstance(value, str) else value


def test_whatever_text_of_a_report_is_hostile_it_is_escaped(report: Report) -> None:
    changed = every_text_hostile(report).model_copy(update={"recipe": report.recipe, "training": report.training})
    page = render(changed)
    assert "<script" not in page
    assert outline(page).tags.isdisjoint({"script", "link", "img", "iframe"})
    assert not outline(page).open
