"""`litdeploy diff`, `schema` and the former modes of `profile`; measuring is in test_commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.profiler.conftest import measurement, whole_report


@pytest.fixture
def reports(tmp_path: Path) -> tuple[Path, Path]:
    """Two reports, B with a faster student in onnxruntime: 4.0 times as fast as the teacher."""
    a = whole_report()
    b = a.model_copy(update={"measurements": (measurement("onnxruntime", 1, 5, 1.25),)})
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, report in zip(paths, (a, b), strict=True):
        path.write_text(report.model_dump_json())
    return paths


def test_two_reports_side_by_side(run: Run, reports: tuple[Path, Path], tmp_path: Path) -> None:
    answer = run("diff", *reports, "--html", "new/page.html", "--csv", "both.csv")
    assert answer.code == 0, answer.err
    row = next(line for line in answer.out.splitlines() if line.split()[:2] == ["onnxruntime", "1"])
    assert "1.92 (" in row
    assert "1.54× (" in row
    assert "…" not in answer.out
    assert "B’s student is 1.54× as fast" in answer.out
    assert "<h1>In onnxruntime" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert len((tmp_path / "both.csv").read_text().splitlines()) == 1 + 2 * (9 + 1)

    found = json.loads(run("diff", *reports, "--json").out)
    assert found["a"]["schema_version"] == 2
    assert len(found["rows"]) == 9


def test_the_gates_are_for_b_and_its_files_are_written_all_the_same(
    run: Run, reports: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = reports
    assert run("diff", a, b, "--min-speedup", "3.9", "--max-accuracy-drop", "0.4").code == 0
    answer = run("diff", b, a, "--min-speedup", "3.9", "--max-accuracy-drop", "0.2", "--html", "x.html")
    assert answer.code == 3
    assert "below --min-speedup 3.9; the student's accuracy" in answer.err
    assert "more than --max-accuracy-drop 0.2" in answer.err
    assert (tmp_path / "x.html").is_file()


def test_the_schema_describes_the_fields(run: Run) -> None:
    schema = json.loads(run("schema").out)
    assert schema["properties"]["schema_version"]["const"] == 2
    assert "median_low_ms" in schema["$defs"]["SideTiming"]["properties"]
    assert (
        "percentage" in schema["$defs"]["Fidelity"]["description"]
        or "share" in (schema["$defs"]["Fidelity"]["description"])
    )


@pytest.mark.parametrize(
    ("former", "now"),
    [
        (("profile", "--compare", "a.json", "b.json", "--json"), ("diff", "a.json", "b.json", "--json")),
        (("profile", "--json", "--compare", "a.json", "b.json"), ("diff", "--json", "a.json", "b.json")),
        (("profile", "--schema"), ("schema",)),
        (("profile", "--schema", "--json"), ("schema",)),
        (
            ("profile", "--predict", "absent.pt", "--student-depth", "8", "--target", "cpu"),
            ("predict", "absent.pt", "--student-depth", "8", "--target", "cpu"),
        ),
        (("profile", "--predict=absent.pt", "--student-depth", "8"), ("predict", "absent.pt", "--student-depth", "8")),
    ],
)
def test_the_former_modes_of_profile_name_their_command(
    run: Run, reports: tuple[Path, Path], former: tuple[str, ...], now: tuple[str, ...]
) -> None:
    before, after = run(*former), run(*now)
    assert (before.code, before.out) == (after.code, after.out)
    hint, _, rest = before.err.partition("\n")
    assert hint.startswith("litdeploy: `profile --")
    assert hint.endswith(f"is now a command of its own: litdeploy {now[0]}")
    assert rest == after.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("diff", "a.json", "nowhere"), "nowhere: no such file"),
        (("diff", "a.json", "b.json", "--trace", "t.json"), "No such option: --trace"),
        (("diff", "a.json", "b.json", "--html", "."), "--html .: is a folder"),
        (("diff", "lit", "a.json", "b.json"), "unexpected extra argument"),
        (("predict", "x.pt", "--student-depth", "8", "--min-speedup", "2"), "No such option: --min-speedup"),
        (("profile", "--html", "x.html"), "No such option: --html"),
        (("profile", "--csv", "a.json/x.csv"), "--csv a.json/x.csv: its folder cannot be created"),
    ],
)
def test_bad_options_are_named(run: Run, reports: tuple[Path, Path], arguments: tuple[str, ...], message: str) -> None:
    answer = run(*arguments)
    assert answer.code == 2
    assert message in " ".join(answer.err.split())
