from __future__ import annotations

import subprocess
import sys

import pytest

from litdeploy import __version__
from litdeploy.cli import COMMANDS
from tests.cli.conftest import Run

HEAVY = {"torch", "onnx", "onnxruntime", "datasets", "numpy", "sklearn", "matplotlib"}


def test_help_imports_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\nfrom litdeploy.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    answer = run(command, "--help")
    assert answer.code == 0
    assert "Usage: litdeploy" in answer.out


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == f"litdeploy {__version__}"


def test_the_public_verbs_are_there() -> None:
    import litdeploy

    for verb in litdeploy.__all__:
        assert callable(getattr(litdeploy, verb)), verb
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        litdeploy.nonsense  # noqa: B018
