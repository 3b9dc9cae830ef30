"""Trackers: TensorBoard's own files, and the calls of libraries that are not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from litdeploy.config.recipe import Recipe
from litdeploy.errors import DependencyError, InterruptedRun, SettingsError
from litdeploy.trainer.progress import Row, Run
from litdeploy.trainer.trackers import TRACKERS, tracker

ROW: Row = {"phase": "lit", "epoch": 3, "epochs": 9, "loss": 0.5, "validation_top1": 0.75}
NUMBERS = {"loss": 0.5, "validation_top1": 0.75}


class Library(SimpleNamespace):
    """A stand-in for a library: the names, arguments and keywords of its functions that were called."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **words: Any) -> Library:
            self.calls.append((name, args, words))
            return self

        return call


def tracked(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, error: BaseException | None) -> list[Any]:
    library = Library()
    monkeypatch.setitem(sys.modules, name, library)
    made = tracker(name)
    made.on_fit_start(Run(folder / "deploy", Recipe()))
    made.on_validation_end(ROW)
    if error is None:
        made.on_fit_end()
    else:
        made.on_exception(error)
    calls: list[Any] = library.calls
    return calls


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun, settings, numbers, ended = tracked("mlflow", monkeypatch, tmp_path, None)
    assert begun == ("start_run", (), {"run_name": f"{tmp_path.name}/deploy"})
    assert settings[0] == "log_params"
    assert settings[1][0]["main.epochs"] == 9
    assert numbers == ("log_metrics", (NUMBERS,), {"step": 3})
    assert ended == ("end_run", (), {})
    for error, status in ((InterruptedRun(), "KILLED"), (ValueError(), "FAILED")):
        assert tracked("mlflow", monkeypatch, tmp_path, error)[-1] == ("end_run", (), {"status": status})


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    begun, numbers, ended = tracked("wandb", monkeypatch, tmp_path, None)
    assert begun[0] == "init"
    assert (begun[2]["project"], begun[2]["config"]["main.epochs"]) == ("litdeploy", 9)
    assert numbers == ("log", (NUMBERS,), {"step": 3})
    assert ended == ("finish", (), {})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    calls = tracked("wandb", monkeypatch, tmp_path, InterruptedRun())
    assert "project" not in calls[0][2]
    assert calls[-1] == ("finish", (), {"exit_code": 130})


def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun, numbers, ended = tracked("trackio", monkeypatch, tmp_path, None)
    assert (begun[0], begun[2]["project"]) == ("init", "litdeploy")
    assert numbers == ("log", (NUMBERS,), {"step": 3})
    assert ended[0] == tracked("trackio", monkeypatch, tmp_path, ValueError())[-1][0] == "finish"


def test_tensorboard_is_written_for_real_and_a_resumed_run_replaces_later_epochs(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for before, loss in (((), 0.5), (({**ROW, "epoch": 2},), 0.25)):
        made = tracker("tensorboard")
        made.on_fit_start(Run(tmp_path, Recipe(), before))
        made.on_validation_end({**ROW, "loss": loss})
        made.on_fit_end()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Scalars("loss")[-1].value == 0.25
    assert {scalar.step for scalar in read.Scalars("validation_top1")} == {3}


@pytest.mark.parametrize("name", ["mlflow", "wandb", "trackio"])
def test_an_absent_library_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=rf"--track {name}.*litdeploy\[{name}\]"):
        tracker(name)


def test_an_unknown_tracker() -> None:
    with pytest.raises(SettingsError, match=f"--track comet.*{', '.join(TRACKERS)}"):
        tracker("comet")
