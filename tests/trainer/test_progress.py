"""Callbacks of a run, their display, and what is no callback."""

from __future__ import annotations

import io
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from litdeploy import terminal
from litdeploy.errors import InterruptedRun, SettingsError
from litdeploy.trainer import Callback, Progress, compress
from litdeploy.trainer.progress import Callbacks, Row, Run, callbacks_of, epoch_line
from litdeploy.trainer.trackers import TensorBoard

QUICK: dict[str, Any] = {
    "data": "digits",
    "student_depth": 8,
    "device": "cpu",
    "precision": "fp32",
    "main": {"epochs": 1, "learning_rate": 0.05},
    "finetune": {"epochs": 1, "learning_rate": 0.01},
}


class Recorder(Callback):
    """The names of what was called, in order, and what was said; stops the run at a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.called: list[str] = []
        self.rows: list[Row] = []
        self.done: list[int] = []
        self.losses: set[str] = set()
        self.steps, self._stop = 0, stop

    def on_fit_start(self, run: Run) -> None:
        self.called.append("fit start")
        self.run = run

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        self.called.append(f"epoch {epoch}/{epochs} {phase}")
        self.done.append(done)

    def on_train_batch_end(self, samples: int, losses: Mapping[str, Tensor]) -> None:
        self.steps += 1
        self.losses |= {name for name, loss in losses.items() if not loss.requires_grad and loss.dim() == 0}
        if self.steps == self._stop:
            signal.raise_signal(signal.SIGINT)

    def on_validation_end(self, metrics: Row) -> None:
        self.rows.append(metrics)

    def on_checkpoint(self, epochs: int, step: int) -> None:
        self.called.append(f"checkpoint {epochs} {step}")

    def on_fit_end(self) -> None:
        self.called.append("fit end")

    def on_exception(self, error: BaseException) -> None:
        self.called.append(type(error).__name__)


def test_a_run_calls_its_callbacks_and_a_resumed_one_says_what_was_done(teacher_path: Path, tmp_path: Path) -> None:
    stopped, resumed, second = Recorder(stop=3), Recorder(), Recorder()
    with pytest.raises(InterruptedRun):
        compress(teacher_path, out=tmp_path / "b", progress=False, callbacks=[stopped], **QUICK)
    assert stopped.called == ["fit start", "epoch 1/2 lit", "checkpoint 0 3", "InterruptedRun"]
    assert (stopped.run.folder, stopped.run.first_epoch) == (tmp_path / "b", 0)
    assert {"loss", "kd"} < stopped.losses
    compress(teacher_path, out=tmp_path / "b", progress=resumed, callbacks=[second], resume=True, **QUICK)
    assert resumed.called == second.called == ["fit start", "epoch 1/2 lit", "epoch 2/2 finetune", "fit end"]
    assert resumed.done == [3 * 128, 0]
    assert [row["epoch"] for row in stopped.rows + resumed.rows] == [0, 1, 2]


def test_the_default_shows_lines_where_there_is_no_terminal(
    teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(teacher_path, out=tmp_path / "b", **QUICK)
    shown = capsys.readouterr().err
    assert "     lit   1/2   loss" in shown
    assert "finetune   2/2   loss" in shown
    compress(teacher_path, out=tmp_path / "c", progress=False, **QUICK)
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_that_an_error_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = terminal.PlainConsole(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("litdeploy.trainer.progress.errors", console)
    progress = Progress()
    progress.on_train_epoch_start("lit", 2, 3, samples=100, done=40)
    progress.on_train_batch_end(20, {})
    progress.on_exception(RuntimeError())
    assert "lit 2/3" in screen.getvalue()
    assert "60/100 images" in screen.getvalue()
    progress.on_train_batch_end(20, {})  # the bar is gone
    progress.on_exception(RuntimeError())


@pytest.mark.parametrize(
    ("progress", "callbacks", "message"),
    [
        (print, (), "progress: <built-in function print> is no callback"),
        (3, (), "progress: 3 is no callback"),
        (True, [Recorder], r"the class Recorder is no callback. Give an instance of it: Recorder\(\)"),
        (True, [print], "callbacks: <built-in function print> is no callback"),
        (True, Recorder(), "callbacks: is a Recorder. Give a list"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_written(
    progress: Any, callbacks: Any, message: str, teacher_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        compress(teacher_path, out=tmp_path / "b", progress=progress, callbacks=callbacks, **QUICK)
    assert not (tmp_path / "b").exists()


def test_callbacks_of_a_call() -> None:
    mine, tracker = Recorder(), TensorBoard()
    assert callbacks_of(mine) is mine
    both = callbacks_of(True, [mine, tracker])
    assert isinstance(both, Callbacks)
    assert [type(each) for each in both.each] == [Progress, Recorder, TensorBoard]
    silent = callbacks_of(False)
    assert isinstance(silent, Callbacks)
    assert silent.each == ()


@pytest.mark.parametrize(
    ("score", "expected"),
    [({"validation_top1": 0.89671, "validation_loss": 0.4}, "89.67 %"), ({"validation_psnr": 31.24}, "31.24 dB")],
)
def test_an_epoch_is_one_line_with_its_tasks_metric(score: dict[str, float], expected: str) -> None:
    row = {"phase": "main", "epoch": 3, "epochs": 10, "loss": 0.25, "seconds": 1.24, "images_per_second": 999.6}
    line = epoch_line({**row, **score}, "text")
    assert line == f"    main   3/10   loss 0.2500   validation {expected}   1.2 s   1000 texts/s"
