"""Figures as SVG: inline, in colours and letters of the page around them, or as a file of their own."""

from __future__ import annotations

import io
import re

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

# Colours that stand for the page's own: an SVG is drawn once and must follow the page from light to dark.
TEXT, MUTED, RULE, TEACHER, STUDENT = (f"#0a0b0{number}" for number in range(1, 6))
SERIES = tuple(f"#0c0d0{number}" for number in range(1, 8))  # lines that are neither teacher nor student

# Stand-in → the page's variable, and what a file by itself has, on white.
_VARIABLES = {
    TEXT: ("text", "#1d1f23"),
    MUTED: ("muted", "#5c626b"),
    RULE: ("rule", "#dcdad5"),
    TEACHER: ("teacher", "#2f6ba8"),
    STUDENT: ("student", "#b85a08"),
    **{
        stand_in: (f"series-{number}", colour)
        for number, (stand_in, colour) in enumerate(
            zip(
                SERIES,
                ("#2e7d4f", "#8a4fa3", "#a8324a", "#0f7c8a", "#7a6a12", "#5c626b", "#a33f8f"),
                strict=True,
            ),
            start=1,
        )
    },
}

UNIT = 1 / 72  # inch; the page shows it as one CSS pixel
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "litdeploy",
    "font.size": 14.0,
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
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an inline element that names itself to a screen reader.

    Args:
        name: unlike that of any other figure on the page.
        title, description: plain text.
    """
    drawing = _drawn(figure)
    # Several drawings share the page, so each needs ids of its own; and HTML knows `href` without its namespace.
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", drawing).replace("xlink:href", "href")
    for stand_in, (variable, _) in _VARIABLES.items():
        drawing = drawing.replace(stand_in, f"var(--{variable})")
    width, height = figure.get_size_inches() / UNIT
    opening = (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-labelledby="{name}-title {name}-description">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">{escape(description)}</desc>'
    )
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: opening, drawing).strip())


def standalone_svg(figure: Figure) -> str:
    """The figure as a file, on white."""
    figure.set_facecolor("#ffffff")
    drawing = _drawn(figure)
    for stand_in, (_, colour) in _VARIABLES.items():
        drawing = drawing.replace(stand_in, colour)
    return drawing


def _drawn(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=_METADATA)
    drawing = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    return re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
