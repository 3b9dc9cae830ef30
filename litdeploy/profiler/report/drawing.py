"""How every chart is drawn: SVG that takes its colours and letters from the page around it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from litdeploy.profiler.figures import LARGEST

# Colours that stand for the page's own: an SVG is drawn once and must follow the page from light to dark.
TEXT, MUTED, RULE, FIRST, SECOND = (f"#0a0b0{number}" for number in range(1, 6))
SERIES = tuple(f"#0c0d0{number}" for number in range(1, 8))  # of lines that are neither
_VARIABLES = {
    TEXT: "text",
    MUTED: "muted",
    RULE: "rule",
    FIRST: "first",
    SECOND: "second",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)},
}

# A panel is drawn as wide as a phone's page, where it fills the line; elsewhere several stand side by side. Its units
# are 1/72 inch, which the page shows as one CSS pixel.
_WIDTH = 5.0
_UNIT = 1 / 72
_FONT_SIZE = 14.0
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "litdeploy",
    "font.size": _FONT_SIZE,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0.0,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
}
_ROW_UNITS = 74  # height of one pair of bars with its name
_BAR = 0.26  # of a row
LETTER = 0.62 * _FONT_SIZE  # about as wide as one is


@dataclass(frozen=True)
class Bar:
    """One bar: its length, how it is told, and the ends of its interval, where it has one."""

    value: float
    text: str
    low: float | None = None
    high: float | None = None

    @property
    def end(self) -> float:
        """Where bar and interval end."""
        return self.value if self.high is None else max(self.value, self.high)


def pairs(
    rows: Sequence[tuple[str, Bar | None, Bar | None]], name: str, title: str, description: str, missing: str = "–"
) -> Markup:
    """A pair of bars a row, the first above the second, each with its interval and its figure.

    Args:
        rows: name and both bars; None where there is none, which `missing` says in its place.
        description: what a screen reader says ahead of the figures, which are added.
    """
    rows = [(label, _drawable(first), _drawable(second)) for label, first, second in rows]
    with panel(height=len(rows) * _ROW_UNITS + 12) as (figure, axes):
        axes.axis("off")
        for row, (label, *bars) in enumerate(rows):
            axes.text(0, row - 0.36, label, va="center", color=MUTED)
            for offset, bar, colour in zip((-0.08, 0.22), bars, (FIRST, SECOND), strict=True):
                _draw(axes, row + offset, bar, colour, missing)
        shown = [bar for _, *bars in rows for bar in bars if bar]
        # As wide as the bar that reaches furthest together with its figure, which does not shrink with the scale.
        ends = (bar.end / (1 - (LETTER * len(bar.text) + 10) * _UNIT / _WIDTH) for bar in shown)
        axes.set_xlim(0, max(ends, default=0) or 1)
        axes.set_ylim(len(rows) - 0.45, -0.6)
        figure.subplots_adjust(left=0.003, right=1, top=1, bottom=0)
    told = "; ".join(
        f"{label}: {first.text if first else missing}, {second.text if second else missing}"
        for label, first, second in rows
    )
    return svg(figure, name, title, f"{description} {told}.")


def _drawable(bar: Bar | None) -> Bar | None:
    """The bar, where an axis can hold it: a file may claim any number."""
    if bar is None or not all(abs(x) < LARGEST for x in (bar.value, bar.low or 0.0, bar.high or 0.0)):
        return None
    return bar


def _draw(axes: Axes, y: float, bar: Bar | None, colour: str, missing: str) -> None:
    if bar is None:
        axes.annotate(missing, (0, y), (2, 0), textcoords="offset points", va="center_baseline", color=MUTED)
        return
    axes.barh(y, bar.value, _BAR, color=colour)
    if bar.low is not None and bar.high is not None:
        axes.plot((bar.low, bar.high), (y, y), color=TEXT, lw=1.4, solid_capstyle="butt")
        for x in (bar.low, bar.high):
            axes.plot((x, x), (y - _BAR / 3, y + _BAR / 3), color=TEXT, lw=1.4, solid_capstyle="butt")
    axes.annotate(bar.text, (bar.end, y), (6, 0), textcoords="offset points", va="center_baseline")


@contextmanager
def panel(height: float, width: float = _WIDTH / _UNIT) -> Iterator[tuple[Figure, Axes]]:
    """A figure of this size, in CSS pixels of a phone's page, with axes in the page's style."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width * _UNIT, height * _UNIT), facecolor="none")
        yield figure, figure.add_subplot()


def svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an inline element that names itself to a screen reader.

    Args:
        name: of this drawing on its page: letters, digits and hyphens.
        title, description: plain text, which is escaped here.
    """
    drawing = _drawn(figure)
    # Several drawings share the page, so each needs ids of its own; and HTML knows `href` without its namespace.
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawing).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    width, height = figure.get_size_inches() * 72
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>'
    )
    # matplotlib escapes the text that it draws, and the rest is ours.
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: opening, drawing).strip())  # noqa: S704


def standalone_svg(figure: Figure) -> str:
    """The figure as a file of its own: in the page's colours of a light screen, on white."""
    style = resources.files("litdeploy.profiler.report").joinpath("templates", "page.css").read_text(encoding="utf-8")
    # The first block of the page's style is that of a light screen.
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", style.partition("}")[0]))
    figure.set_facecolor("#ffffff")
    drawing = _drawn(figure)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, colours[variable])
    return drawing


def _drawn(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names in other scripts: the page's fonts have their letters, whatever matplotlib's own lacks.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
