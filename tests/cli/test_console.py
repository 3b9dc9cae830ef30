from __future__ import annotations

import pytest
from rich.table import Table

from litdeploy.cli import console

HOSTILE = "\x1b]0;title\x07\x1b[2J\u202eabc [red]x[/no] :smile:"


def test_a_name_gives_the_terminal_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(HOSTILE)
    table = Table()
    table.add_column("name")
    table.add_row(HOSTILE)
    console.output.print(table)
    console.output.print(HOSTILE)
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert "\\x1b]0;title\\x07" in text
        assert "[red]x[/no] :smile:" in text
