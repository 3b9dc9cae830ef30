from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from litdeploy import __version__
from litdeploy.cli import COMMANDS, options
from litdeploy.storage.bundle import DEFAULT_PATH
from tests.cli.conftest import Run

HEAVY = {"torch", "onnx", "onnxruntime", "datasets", "numpy", "sklearn", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "heavy"), [([], HEAVY | {"pydantic", "yaml"}), (["compress"], HEAVY | {"litdeploy.storage"})]
)
def test_help_imports_none_of_the_heavy_libraries(arguments: list[str], heavy: set[str]) -> None:
    code = (
        "import sys\nfrom litdeploy.cli import app\n"
        f"try:\n    app({[*arguments, '--help']!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_begins_as_in_the_list_of_commands(run: Run, command: str) -> None:
    answer = run(command, "--help")
    assert answer.code == 0
    assert f"Usage: litdeploy {command}" in answer.out
    summary = COMMANDS[command][1]
    assert summary in " ".join(answer.out.split())
    assert summary in " ".join(run("--help").out.replace("│", "").split())


def test_the_main_options_come_first_and_the_others_in_panels(run: Run) -> None:
    panels: dict[str, list[str]] = {}
    for line in run("compress", "--help").out.splitlines():
        if line.startswith("╭─"):
            panels[line.strip("╭─╮ ")] = []
        elif line.startswith("│ --"):
            panels[list(panels)[-1]].append(line.split()[1])
    assert list(panels) == [
        "Arguments",
        "Options",
        "Student",
        "Network",
        "Data",
        "Distillation",
        "Training",
        "Output and resuming",
    ]
    assert panels["Options"][:2] == ["--student-depth", "--data"]
    assert 10 <= len(panels["Options"]) <= 14
    assert panels["Output and resuming"] == [
        "--overwrite",
        "--resume",
        "--checkpoint-every",
        "--tensorboard",
        "--track",
    ]


def test_the_default_bundle_is_that_of_the_functions() -> None:
    assert options.DEFAULT_BUNDLE == DEFAULT_PATH


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == f"litdeploy {__version__}"


def test_an_unknown_command_gets_a_suggestion(run: Run) -> None:
    answer = run("compres")
    assert answer.code == 2
    assert "Did you mean 'compress'" in answer.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("litdeploy pre", "predict"),
        ("litdeploy compress --student-d", "--student-depth"),
        ("litdeploy train a --prec", "--precision"),
    ],
)
def test_the_shell_completes_commands_and_options(line: str, expected: str) -> None:
    words = {"_LITDEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    code = f"import os\nos.environ.update({words!r})\nfrom litdeploy.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert expected in done.stdout.split(), done.stderr


def test_the_public_functions_are_there() -> None:
    import litdeploy

    assert sorted(litdeploy.__all__) == litdeploy.__all__
    assert litdeploy.__doc__ is not None
    for name in litdeploy.__all__:
        function = getattr(litdeploy, name)
        assert callable(function)
        assert function.__doc__, name
        assert f"    {name}(" in litdeploy.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        litdeploy.nonsense  # noqa: B018


class Called(Exception):
    pass


# Command → what it needs on its line.
NEEDED = {
    "compare": ("digits-resnet", "--teacher", "t.pt", "--depths", "8"),
    "compress": ("t.pt",),
    "data": ("pack", "digits", "--out", "x.safetensors"),
    "demo": (),
    "deploy": ("t.pt",),
    "diff": ("a", "b"),
    "evaluate": ("t.pt",),
    "export": ("--onnx",),
    "inspect": ("t.pt",),
    "predict": ("t.pt", "--student-depth", "8"),
    "profile": (),
    "schema": (),
    "train": ("resnet8",),
    "verify": (),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_calls_the_public_function_of_its_name(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import litdeploy

    def call(*arguments: object, **options: object) -> None:
        raise Called

    function = "pack" if command == "data" else command
    assert function in litdeploy.__all__
    monkeypatch.setattr(litdeploy, function, call, raising=False)
    import_module(f"litdeploy.cli.{command}")
    with pytest.raises(Called):
        run(command, *NEEDED[command])
