"""The pages as a reader has them: in Chromium, on a phone and on a desk, light and dark, on paper and by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from litdeploy.config.target import Target, Timing
from litdeploy.profiler import profile
from litdeploy.profiler.analysis.diff import compare_reports
from litdeploy.profiler.report.diff_page import render_diff
from litdeploy.profiler.report.page import render
from litdeploy.profiler.report.prediction_page import render_prediction
from litdeploy.profiler.schema import Conditions, Failure, Gpu, Report
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.records import Accuracy
from tests.profiler.conftest import HOSTILE, hostile, measurement, prediction, whole_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 1_400)
SCHEMES = ("light", "dark")

# What is wrong with a page's charts: none, too small, without text, text too small, outside of the chart or on top of
# other text. Texts of one chart may touch; more than a pixel is an overlap.
CHART_FAULTS = """() => {
  const faults = [];
  for (const svg of document.querySelectorAll('svg')) {
    const name = svg.querySelector('title').textContent;
    const box = svg.getBoundingClientRect();
    if (box.width < 200 || box.height < 60) faults.push(`${name}: ${box.width} × ${box.height}`);
    const texts = [...svg.querySelectorAll('text')].map(each => [each.textContent, each.getBoundingClientRect(), each]);
    if (!texts.length) faults.push(`${name}: no text`);
    for (const [text, at, element] of texts) {
      const size = parseFloat(getComputedStyle(element).fontSize) * box.width / svg.viewBox.baseVal.width;
      if (size < 10) faults.push(`${name}: “${text}” is ${size} px`);
      if (at.width < 1 || at.height < 1) faults.push(`${name}: “${text}” has no size`);
      if (at.left < box.left - 2 || at.right > box.right + 2) faults.push(`${name}: “${text}” is outside`);
    }
    texts.forEach(([a, one], index) => texts.slice(index + 1).forEach(([b, two]) => {
      const x = Math.min(one.right, two.right) - Math.max(one.left, two.left);
      const y = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
      if (x > 1 && y > 0.35 * one.height) faults.push(`${name}: “${a}” is over “${b}”`);
    }));
  }
  return faults;
}"""

# WCAG 2.2, 1.4.3: the contrast of each of the page's colours with its ground.
CONTRASTS = """() => {
  const context = document.createElement('canvas').getContext('2d');
  const luminance = name => {
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
    const channels = [1, 3, 5].map(at => parseInt(context.fillStyle.slice(at, at + 2), 16) / 255);
    const [r, g, b] = channels.map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return ['--text', '--muted', '--first', '--second'].map(name => {
    const [dark, light] = [luminance(name), luminance('--page')].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if executable is None:
        pytest.skip(f"there is no Chromium here (looked for {', '.join(CHROMIUMS)})")
    with api.sync_playwright() as playwright:
        # Without the sandbox, which containers seldom allow: it opens nothing but our own pages.
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


def one_sample(report: Report) -> Report:
    """Of each runner and batch size a single sample a side: no interval, no percentile, no verdict."""
    alone = {"samples": 1, "median_low_ms": None, "median_high_ms": None, "p90_ms": None}
    unclear = {"speedup_low": None, "speedup_high": None, "verdict": "unclear", "reason": "too few samples"}
    return report.model_copy(
        update={
            "measurements": tuple(
                each.model_copy(
                    update={
                        "teacher": each.teacher.model_copy(update=alone),
                        "student": each.student.model_copy(update=alone),
                        "comparison": each.comparison.model_copy(update=unclear),
                        "conditions": Conditions(seconds=0.01),
                    }
                )
                for each in report.measurements[:1]
            ),
            "section_times": (),
            "findings": (),
            "fidelity": None,
            "fidelity_missing": "digits: its test split is empty.",
            "training": (),
            "parity": None,
        }
    )


ALL_CONDITIONS = Conditions(
    seconds=20.2,
    cores=tuple(range(16)),
    other_load=0.76,
    machine_load=12.5,
    stolen=0.004,
    preemptions=12_345,
    quota_seconds=1.25,
    clock_mhz=2_596,
    clock_low_mhz=2_596,
    gpu=Gpu(
        clock_mhz=1_700,
        clock_low_mhz=1_600,
        max_clock_mhz=1_980,
        memory_clock_mhz=2_600,
        temperature_c=61,
        power_watts=512,
        throttle_reasons=("software power cap", "hardware thermal slowdown"),
    ),
)


def many(report: Report) -> Report:
    """Six runners at three batch sizes, times from microseconds to minutes, and a chance accuracy on few images."""
    runners = ("eager", "compiled", "onnxruntime", "inductor", "tensorrt", "tensorrt-graph")
    few = Accuracy(top1=0.1, loss=2.3, images=12)
    return report.model_copy(
        update={
            "measurements": tuple(
                measurement(runner, size, 10 ** (index - 2) * size, 10 ** (index - 2) * size / (1 + index)).model_copy(
                    update={"conditions": ALL_CONDITIONS}
                )
                for index, runner in enumerate(runners)
                for size in (1, 64, 1_024)
            ),
            "failures": (
                Failure(runner="tensorrt", batch_size=None, message="there is no CUDA GPU here"),
                Failure(runner="compiled", batch_size=2_048, message=f"out of memory {'/very' * 40} {HOSTILE}"),
            ),
            "teacher": report.teacher.model_copy(update={"accuracy": {"validation": few}}),
            "student": report.student.model_copy(update={"accuracy": {"validation": few}}),
        }
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of all kinds, by name."""
    report, tmp_path = whole_report(), tmp_path_factory.mktemp("pages")
    reports = {"report": report, "one": one_sample(report), "many": many(report), "hostile": hostile(report)}
    files = {}
    for name, each in reports.items():
        (tmp_path / f"{name}.json").write_text(each.model_dump_json())
        files[name] = tmp_path / f"{name}.html"
        files[name].write_text(render(each), encoding="utf-8")
    for a, b in (("report", "many"), ("hostile", "one")):
        files[f"{a} and {b}"] = tmp_path / f"{a}-{b}.html"
        found = compare_reports(tmp_path / f"{a}.json", tmp_path / f"{b}.json")
        files[f"{a} and {b}"].write_text(render_diff(found), encoding="utf-8")
    files["prediction"] = tmp_path / "prediction.html"
    files["prediction"].write_text(render_prediction(prediction()), encoding="utf-8")
    return files


def opened(browser: Browser, path: Path, seen: list[str], **how: Any) -> Page:
    """A page whose messages and requests, but for its own, are told in `seen`."""
    page = browser.new_page(**how)
    page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else seen.append(request.url))
    page.goto(path.as_uri())
    return page


@pytest.mark.slow
def test_every_page_is_quiet_and_whole_at_every_width_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    for name, path in pages.items():
        seen: list[str] = []
        grounds = {}
        for scheme in SCHEMES:
            page = opened(browser, path, seen, color_scheme=scheme)
            for width in WIDTHS:
                where = f"{name}, {scheme}, {width} px"
                page.set_viewport_size({"width": width, "height": 844})
                assert page.locator("svg").count() > 0, where
                assert page.evaluate(CHART_FAULTS) == [], where
                assert page.evaluate("document.documentElement.scrollWidth") <= width, where
            assert min(page.evaluate(CONTRASTS)) >= 4.5, (name, scheme)
            assert page.get_by_role("img").count() == page.locator("svg").count()
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.close()
        assert seen == [], name
        assert grounds["light"] != grounds["dark"]


def test_a_generators_page_shows_its_images(browser: Browser, generator_bundle: Bundle) -> None:
    timing = Timing(warmup_ms=1, samples=8, max_seconds=1)
    profile(generator_bundle, target=Target(device="cpu", runners=("eager",), batch_sizes=(1,), timing=timing))
    seen: list[str] = []
    page = opened(browser, generator_bundle.profile_path / "report.html", seen)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate(CHART_FAULTS) == [], width
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # Decoded, and seen by its whole width.
        sheet = page.locator("img")
        assert sheet.evaluate("each => each.naturalWidth") > 100
        box = sheet.bounding_box()
        assert box is not None
        assert 100 < box["width"] <= width
    assert page.get_by_role("heading", name="Size and likeness").is_visible()
    assert seen == []


def test_what_is_missing_is_said(browser: Browser, pages: dict[str, Path]) -> None:
    seen: list[str] = []
    told = opened(browser, pages["one"], seen).inner_text("body")
    for sentence in (
        "no interval: too few samples",
        "Only one batch size was measured",
        "The time of each section was not measured",
        "Fidelity was not measured: digits: its test split is empty.",
        "Nothing stood out",
        "The bundle contains no record of its epochs",
        "The bundle contains no exported student",
    ):
        assert sentence in told
    told = opened(browser, pages["many"], seen).inner_text("header")
    assert "tensorrt: there is no CUDA GPU here" in told
    assert "compiled, batch 2048: out of memory" in told
    assert HOSTILE in told
    assert seen == []


def test_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    page = opened(browser, pages["report"], [], viewport={"width": 390, "height": 844})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    # What scrolls sideways can be scrolled by the arrow keys, and what is folded opens.
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"
    focusable = "[...document.querySelectorAll('.scroll, pre')].every(each => each.tabIndex === 0)"
    assert page.evaluate(focusable)
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("table", name="Start, memory and energy").is_visible()


@pytest.mark.parametrize("name", ["report", "many"])
def test_on_paper_nothing_is_folded_or_cut(browser: Browser, pages: dict[str, Path], name: str) -> None:
    # The width of A4 less its margins, in CSS pixels.
    page = opened(browser, pages[name], [], color_scheme="dark", viewport={"width": 687, "height": 1_017})
    folded = page.get_by_role("table", name="The machine during the measurement", include_hidden=True)
    page.emulate_media(media="print")
    assert folded.bounding_box() is not None
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 687
    assert page.pdf(format="A4").startswith(b"%PDF")
