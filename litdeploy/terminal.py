"""Printing to a terminal, for the command line and the progress of a training: plain text from anyone's files."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

# Characters that a terminal interprets as commands, or that reverse the direction of reading.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class PlainConsole(Console):
    """Prints text without interpreting it: names and messages may come from an untrusted file."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(escaped(text), **options)


def escaped(text: str) -> str:
    """Text from an untrusted file as a terminal may show it: its control characters written out."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


output = PlainConsole(soft_wrap=True)
errors = PlainConsole(stderr=True, soft_wrap=True)


def note(text: str) -> None:
    """Print a line to standard error."""
    errors.print(text, markup=False, highlight=False)
