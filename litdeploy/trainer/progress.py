"""Where a run reports: callbacks, their display in a terminal or notebook, and `metrics.jsonl`."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from litdeploy.config.recipe import Recipe
from litdeploy.config.spec import Noun
from litdeploy.errors import BundleError, SettingsError
from litdeploy.files import open_regular, parse_json, write_whole
from litdeploy.tasks import CURVES
from litdeploy.terminal import errors, note

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Row = dict[str, str | int | float]
_MOST_LINE_BYTES = 2**20


@dataclass(frozen=True)
class Run:
    """A run that begins.

    Attributes:
        folder: of its files.
        recipe: how it trains.
        rows: of metrics.jsonl, of the run that it resumes; else empty.
    """

    folder: Path
    recipe: Recipe
    rows: Sequence[Row] = ()

    @property
    def first_epoch(self) -> int:
        """The first that it reports; 0 is the student before its first step."""
        return int(self.rows[-1]["epoch"]) + 1 if self.rows else 0


class Callback:
    """What a run calls; the defaults do nothing. Of several processes only the first calls it.

    Attributes:
        noun: what the run trains on; set before it begins.
    """

    noun: Noun = "image"

    def note(self, text: str) -> None:
        """A line for the user, at any time."""

    def on_fit_start(self, run: Run) -> None:
        """The run begins, or is resumed."""

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        """An epoch of this many samples begins; `done` of them were trained on before the run was interrupted."""

    def on_train_batch_end(self, samples: int, losses: Mapping[str, Tensor]) -> None:
        """A step is done.

        Args:
            losses: by name, on the device, valid until the next step. Reading one waits for the device.
        """

    def on_validation_end(self, metrics: Row) -> None:
        """An epoch, or the student before its first step (phase `cut`), is validated; its line of metrics.jsonl."""

    def on_checkpoint(self, epochs: int, step: int) -> None:
        """A checkpoint is written, after this many whole epochs and steps of the next."""

    def on_fit_end(self) -> None:
        """The run is complete."""

    def on_exception(self, error: BaseException) -> None:
        """The run ends by an error, or by the user (`InterruptedRun`)."""


class Callbacks(Callback):
    """Several callbacks as one, in order."""

    def __init__(self, each: Sequence[Callback]) -> None:
        self.each = tuple(each)

    def note(self, text: str) -> None:
        for callback in self.each:
            callback.note(text)

    def on_fit_start(self, run: Run) -> None:
        for callback in self.each:
            callback.noun = self.noun
            callback.on_fit_start(run)

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        for callback in self.each:
            callback.on_train_epoch_start(phase, epoch, epochs, samples, done)

    def on_train_batch_end(self, samples: int, losses: Mapping[str, Tensor]) -> None:
        for callback in self.each:
            callback.on_train_batch_end(samples, losses)

    def on_validation_end(self, metrics: Row) -> None:
        for callback in self.each:
            callback.on_validation_end(metrics)

    def on_checkpoint(self, epochs: int, step: int) -> None:
        for callback in self.each:
            callback.on_checkpoint(epochs, step)

    def on_fit_end(self) -> None:
        for callback in self.each:
            callback.on_fit_end()

    def on_exception(self, error: BaseException) -> None:
        for callback in self.each:
            callback.on_exception(error)


class Progress(Callback):
    """Shows a run on standard error: a bar with rate and remaining time in a terminal or notebook, and a line an
    epoch."""

    _bar: Bar | None = None

    def note(self, text: str) -> None:
        note(text)

    def on_train_epoch_start(self, phase: str, epoch: int, epochs: int, samples: int, done: int) -> None:
        in_notebook = errors.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        if not errors.is_terminal and not in_notebook:
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[noun]}s"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task(f"{phase} {epoch}/{epochs}", total=samples, completed=done, rate="", noun=self.noun)

    def on_train_batch_end(self, samples: int, losses: Mapping[str, Tensor]) -> None:
        if self._bar is not None:
            [task] = self._bar.tasks
            rate = f"{task.speed:.0f} {self.noun}s/s" if task.speed else ""
            self._bar.update(task.id, advance=samples, rate=rate)

    def on_validation_end(self, metrics: Row) -> None:
        self._close()
        if "loss" in metrics:  # not the student before its first step
            note(epoch_line(metrics, self.noun))

    def on_exception(self, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        """Remove the bar, if there is one: an error is printed below it else."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def epoch_line(row: Mapping[str, Any], noun: str) -> str:
    """One line on an epoch.

    Args:
        row: its line of metrics.jsonl.
        noun: what the network takes.
    """
    name, value = next((name, value) for name, value in row.items() if name.startswith("validation_"))
    curve = next((curve for curve in CURVES.values() if f"validation_{curve.metric}" in row), None)
    if curve is None:  # the user's own metric
        validation = f"{name.removeprefix('validation_')} {value:.4g}"
    else:
        validation = f"{curve.factor * row[f'validation_{curve.metric}']:.2f} {curve.unit}"
    return (
        f"{row['phase']:>8} {row['epoch']:>3}/{row['epochs']}   loss {row['loss']:.4f}   "
        f"validation {validation}   {row['seconds']:.1f} s   {row['images_per_second']:.0f} {noun}s/s"
    )


def callbacks_of(progress: object, callbacks: object = ()) -> Callback:
    """The callbacks of a call as one.

    Args:
        progress: a callback in place of the display; None or True: the display; False: none.
        callbacks: a sequence of further ones.

    Raises:
        SettingsError: one is no callback.
    """
    shown = [] if progress is False else [Progress() if progress is None or progress is True else progress]
    if not isinstance(callbacks, list | tuple):
        raise SettingsError(f"callbacks: is a {type(callbacks).__name__}. Give a list: callbacks=[MLflow()].")
    found = [("progress", each) for each in shown] + [("callbacks", each) for each in callbacks]
    for name, each in found:
        if not isinstance(each, Callback):
            what = f"the class {each.__name__}" if isinstance(each, type) else repr(each)
            right = f"an instance of it: {each.__name__}()" if isinstance(each, type) else "an instance of a subclass"
            raise SettingsError(
                f"{name}: {what} is no callback. Give {right} of litdeploy.Callback, which has on_train_batch_end, "
                "on_validation_end and others to override."
            )
    each = [callback for _, callback in found if isinstance(callback, Callback)]
    return each[0] if len(each) == 1 else Callbacks(each)


class MetricsLog:
    """One line of JSON an epoch, flushed at once.

    Args:
        path: of `metrics.jsonl`.
        rows: of a resumed run; later lines in the file are cut off.

    Raises:
        BundleError: the file cannot be written.
    """

    def __init__(self, path: Path, rows: Sequence[Row] = ()) -> None:
        self._path = path
        if path != Path(os.devnull):
            with write_whole(path) as temporary:
                temporary.write_text("".join(_line(row) for row in rows), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise BundleError(f"{self._path}: cannot be written ({error.strerror}). Make room there.") from error

    def close(self) -> None:
        self._file.close()


def may_be_replaced(path: Path) -> bool:
    """Whether there is no file, or the log of an earlier run, which may have ended before its first line."""
    if path.is_symlink():
        return False
    if not path.exists():
        return True
    try:
        with open_regular(path) as file:
            first = file.readline(_MOST_LINE_BYTES)
        found = parse_json(first) if first else None
    except (OSError, ValueError):
        return False
    return not first or (isinstance(found, dict) and {"phase", "epoch"} <= found.keys())


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
