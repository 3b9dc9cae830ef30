from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from litdeploy.cli import console
from litdeploy.profiler.report.tables import TextCell, TextTable

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


def test_a_table_and_json_give_it_none_either(capsys: pytest.CaptureFixture[str]) -> None:
    cell = TextCell(HOSTILE, HOSTILE)
    console.print_table(TextTable(HOSTILE, (TextCell(HOSTILE),), (((cell,),),)))
    console.print_json({"name": f"{HOSTILE}\x9b2J"})
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(printed)
    assert json.loads(printed[printed.index("{\n") :]) == {"name": f"{HOSTILE}\x9b2J"}


@pytest.mark.parametrize("command", ["schema", "inspect --json {teacher}"])
def test_an_output_that_cannot_be_written_gets_a_message(command: str, teacher_path: Path) -> None:
    words = command.format(teacher=teacher_path).split()
    run = [sys.executable, "-m", "litdeploy", *words]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (
        2,
        "litdeploy: the output cannot be written (No space left on device).\n",
    )
