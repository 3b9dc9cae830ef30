from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from litdeploy.cli import main
from litdeploy.networks import new
from litdeploy.storage.checkpoint import write_checkpoint

# Its log goes to what sys.stderr is now, and not to a test's own, which is closed later.
with suppress(ImportError):
    import datasets  # noqa: F401


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in an empty folder, as the `litdeploy` script does."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["litdeploy", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def reader_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained VDCNN-17 for texts of 64 characters and two classes."""
    made = new("vdcnn17,width=2,hidden=4", normalise=None, input_shape=(64,), classes=2, seed=0)
    path = tmp_path_factory.mktemp("reader") / "reader.safetensors"
    write_checkpoint(path, made.module.state_dict(), made.spec)
    return path
