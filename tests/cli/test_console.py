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


@pytest.mark.parametrize(
    ("score", "expected"),
    [({"validation_top1": 0.89671, "validation_loss": 0.4}, "89.67 %"), ({"validation_psnr": 31.24}, "31.24 dB")],
)
def test_an_epoch_is_one_line_with_its_tasks_metric(score: dict[str, float], expected: str) -> None:
    row = {"phase": "main", "epoch": 3, "epochs": 10, "loss": 0.25, "seconds": 1.24, "images_per_second": 999.6}
    line = console.epoch_line({**row, **score}, "text")
    assert line == f"    main   3/10   loss 0.2500   validation {expected}   1.2 s   1000 texts/s"
