from __future__ import annotations

from pathlib import Path

import pytest

from tests import house


def _found(root: Path, files: dict[str, str]) -> list[tuple[str, str, int]]:
    """Rule, file and line of each violation in a package `made` of these files; folders become packages."""
    package = root / "made"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for folder in path.parents:
            if folder == root:
                break
            if not (folder / "__init__.py").exists():
                (folder / "__init__.py").touch()
    return [(found.rule, found.path.removeprefix("made/"), found.line) for found in house.check(package)]


@pytest.mark.parametrize(
    "back",
    [
        "from made.a import thing\n",
        "from . import a\n",
        "from .a import thing\n",
        "import made.a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made.a import thing\n",
        "def late():\n    from made.a import thing\n    return thing\n",
        "from importlib import import_module\nimport_module('made.a')\n",
    ],
    ids=["absolute", "submodule", "relative", "module", "for types", "in a function", "by name"],
)
def test_a_cycle_is_found_however_it_is_closed(tmp_path: Path, back: str) -> None:
    found = _found(tmp_path, {"a.py": "from made.b import other\nthing = 1\n", "b.py": f"{back}other = 2\n"})
    assert found == [("cycle", "a.py", 1)]


def test_what_a_package_only_hands_on_is_imported_from_where_it_is_defined(tmp_path: Path) -> None:
    files = {
        "p/__init__.py": "from made.p.a import thing as thing\nfrom made.p.b import other as other\n",
        "p/a.py": "thing = 1\n",
        "p/b.py": "from made.p import thing\nother = thing\n",
    }
    assert _found(tmp_path, files) == []
    files["p/a.py"] = "def thing():\n    from made.p import other\n    return other\n"
    assert _found(tmp_path, files) == [("cycle", "p/a.py", 2)]


def test_what_a_package_defines_is_imported_from_its_init(tmp_path: Path) -> None:
    files = {"p/__init__.py": "from made.p.a import thing\nTABLE = [thing]\n", "p/a.py": "thing = 1\n"}
    assert _found(tmp_path, files) == []
    files["p/a.py"] = "def thing():\n    from made.p import TABLE\n    return TABLE\n"
    assert [rule for rule, _, _ in _found(tmp_path, files)] == ["cycle"]


def test_a_submodule_is_not_its_parent_s_init(tmp_path: Path) -> None:
    files = {
        "p/__init__.py": "from made.q import user as user\n",
        "p/a.py": "",
        "q.py": "from made.p import a\nuser = a\n",
    }
    assert _found(tmp_path, files) == []


def test_each_cycle_is_named_once_and_shortest_first(tmp_path: Path) -> None:
    files = {
        "a.py": "from made import b\n",
        "b.py": "from made import a, c\n",
        "c.py": "from made import d\n",
        "d.py": "from made import b\n",
    }
    assert _found(tmp_path, files) == [("cycle", "a.py", 1), ("cycle", "b.py", 1)]
    assert _found(tmp_path, {"b.py": "from made import c\n"}) == [("cycle", "b.py", 1)]


def test_who_asks_for_the_task(tmp_path: Path) -> None:
    asks = (
        "from made.records import Accuracy\n\n\ndef f(spec, score):\n    return spec.translates or score is Accuracy\n"
    )
    found = _found(
        tmp_path,
        {
            "records.py": "Accuracy = object()\n",
            "ask.py": asks,
            "say.py": '"""Accuracy, Likeness."""\nTEXT = "translates"\n',
            **dict.fromkeys(("tasks/a.py", "networks/families/a.py", "config/spec.py", "storage/records.py"), asks),
        },
    )
    assert found == [("task", "ask.py", 1), ("task", "ask.py", 5), ("task", "ask.py", 5), ("task", "records.py", 1)]


def test_functions_of_many_parameters(tmp_path: Path) -> None:
    many = ", ".join(f"a{index}" for index in range(13))
    found = _found(
        tmp_path,
        {
            "__init__.py": "from made.verb import verb as verb\n__all__ = ['verb']\n",
            "verb.py": f"def verb({many}):\n    pass\n\n\ndef helper({many}):\n    pass\n",
            "cli/a.py": f"def command({many}): ...\n@app.command()\ndef b({many}): ...\ndef show({many}): ...\n",
            "kernel.py": f"@triton.jit\ndef kernel({many}): ...\n",
            "method.py": f"class A:\n    def few(self, {many[4:]}): ...\n    def many(self, {many}): ...\n"
            f"    def rest(self, {many[8:]}, *more, **options): ...\n",
        },
    )
    assert found == [
        ("parameters", "cli/a.py", 4),
        ("parameters", "method.py", 3),
        ("parameters", "method.py", 4),
        ("parameters", "verb.py", 5),
    ]


def test_long_functions_and_files(tmp_path: Path) -> None:
    fits = "".join("    a = 1\n" for _ in range(house.MOST_FUNCTION_LINES))
    found = _found(
        tmp_path,
        {
            "a.py": f'def fits(\n    a,\n):\n    """Fit.\n\n    It does.\n    """\n{fits}',
            "b.py": f"\n\ndef longer():\n{fits}    b = 1\n",
            "c.py": "a = 1\n" * house.MOST_FILE_LINES,
            "d.py": "a = 1\n" * (house.MOST_FILE_LINES + 1),
        },
    )
    assert found == [("function", "b.py", 3), ("file", "d.py", 1)]


def test_one_name_for_two_classes(tmp_path: Path) -> None:
    found = _found(
        tmp_path,
        {
            "a.py": "class Cell: ...\nclass _Own: ...\nclass Lone: ...\nLIMIT = 1\nChoice = int | str\n",
            "b.py": "\nclass Cell: ...\nclass _Own: ...\nLIMIT = 1\nChoice = bool\n",
            "c.py": "from made.a import Cell\n",
        },
    )
    assert found == [
        ("class-name", "a.py", 1),
        ("class-name", "a.py", 5),
        ("class-name", "b.py", 2),
        ("class-name", "b.py", 5),
    ]


@pytest.mark.parametrize(
    ("text", "rule", "line"),
    [
        ('"""A.\n\nEach file is held\nagainst the other."""\n', "dialect", 3),
        ("a = 1  # held against\n", "dialect", 1),
        ("# It is held\n# against it.\na = 1\n", "dialect", 1),
        ("raise ValueError(\n    'a run is gone on '\n    'with'\n)\n", "dialect", 2),
        ("a = f'{held} is told'\n", "dialect", 1),
        ('def f():\n    """None where it is empty."""\n', "dialect", 2),
        ('"""Of a network that learns."""\n', "dialect", 1),
        ("# whoever reads\n", "dialect", 1),
        ("def told(): ...\n", "dialect", 1),
        ("class Epochs: ...\n", "dialect", 1),
        ("# The colour of a recognised line.\n", "spelling", 1),
        ('def f():\n    """Makes a file."""\n', "mood", 2),
    ],
)
def test_the_dialect_is_found(tmp_path: Path, text: str, rule: str, line: int) -> None:
    assert _found(tmp_path, {"a.py": text})[0] == (rule, "a.py", line)


@pytest.mark.parametrize(
    "text",
    [
        "held = against = told = 1\n",
        "a = f'{told} {where.there_is}'\n",
        "# no such file, losses such as these\n# Compare with the teacher.\n",
        "a = 1  # held\nb = 2  # against\n",
        "c = ['held', 1, 'against']\n",
        '"""Set --normalise; a key is `colour`, {"grey": 1}; normalise: how. Weights of a network."""\n',
        'def f():\n    """Make a file. Names of files."""\n',
    ],
)
def test_other_text_is_let_alone(tmp_path: Path, text: str) -> None:
    assert _found(tmp_path, {"a.py": text}) == []


def test_templates_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "page.html.j2").write_text("<p>\nheld\nagainst</p>\n")
    assert _found(tmp_path, {"a.py": ""}) == [("dialect", "page.html.j2", 2)]


def test_it_prints_what_to_do_and_its_exit_code_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _found(tmp_path, {"a.py": "# somebody\n"})
    assert house.main([str(tmp_path / "made")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "made/a.py:1: [dialect] “somebody”; write: the user, the caller, another process"
    assert lines[-1] == "made: 1 violations (dialect 1)"
    (tmp_path / "made" / "a.py").write_text("")
    assert house.main([str(tmp_path / "made")]) == 0
    assert "in order" in capsys.readouterr().out
