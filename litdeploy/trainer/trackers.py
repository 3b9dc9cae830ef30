"""Trackers of experiments, as callbacks: TensorBoard, MLflow, Weights & Biases and trackio.

Each is given the recipe when a run begins, and after each epoch the numbers of its line of metrics.jsonl, by epoch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from litdeploy.errors import InterruptedRun, SettingsError, import_library
from litdeploy.trainer.progress import Callback, Row, Run

_PROJECT = "litdeploy"


class TensorBoard(Callback):
    """Event files for TensorBoard, under `tensorboard` in the run's folder.

    Raises:
        DependencyError: the library is not installed; as the other trackers when they are made.
    """

    def __init__(self) -> None:
        self._library = _imported("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None

    def on_fit_start(self, run: Run) -> None:
        # What a run wrote after the checkpoint that it resumes is left out.
        self._writer = self._library.SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_epoch)

    def on_validation_end(self, metrics: Row) -> None:
        for name, value in metrics.items():
            if isinstance(value, float):
                self._writer.add_scalar(name, value, metrics["epoch"])
        self._writer.flush()

    def on_fit_end(self) -> None:
        self._writer.close()

    def on_exception(self, error: BaseException) -> None:
        self._writer.close()


class MLflow(Callback):
    """A run of MLflow, in the experiment and on the server that MLFLOW_EXPERIMENT_NAME and MLFLOW_TRACKING_URI name."""

    def __init__(self) -> None:
        self._library = _imported("mlflow", "mlflow")

    def on_fit_start(self, run: Run) -> None:
        self._library.start_run(run_name=_name(run))
        self._library.log_params(_settings(run))

    def on_validation_end(self, metrics: Row) -> None:
        self._library.log_metrics(_numbers(metrics), step=metrics["epoch"])

    def on_fit_end(self) -> None:
        self._library.end_run()

    def on_exception(self, error: BaseException) -> None:
        self._library.end_run(status="KILLED" if isinstance(error, InterruptedRun) else "FAILED")


class WandB(Callback):
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, or `litdeploy`."""

    def __init__(self) -> None:
        self._library = _imported("wandb", "wandb")
        self._run: Any = None

    def on_fit_start(self, run: Run) -> None:
        named = {} if os.environ.get("WANDB_PROJECT") else {"project": _PROJECT}
        self._run = self._library.init(**named, name=_name(run), config=_settings(run))

    def on_validation_end(self, metrics: Row) -> None:
        self._run.log(_numbers(metrics), step=metrics["epoch"])

    def on_fit_end(self) -> None:
        self._run.finish()

    def on_exception(self, error: BaseException) -> None:
        self._run.finish(exit_code=InterruptedRun.exit_code if isinstance(error, InterruptedRun) else 1)


class Trackio(Callback):
    """A run of trackio, on this machine, in the project `litdeploy`."""

    def __init__(self) -> None:
        self._library = _imported("trackio", "trackio")

    def on_fit_start(self, run: Run) -> None:
        self._library.init(project=_PROJECT, name=_name(run), config=_settings(run))

    def on_validation_end(self, metrics: Row) -> None:
        self._library.log(_numbers(metrics), step=metrics["epoch"])

    def on_fit_end(self) -> None:
        self._library.finish()

    def on_exception(self, error: BaseException) -> None:
        self._library.finish()


TRACKERS: dict[str, type[Callback]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}


def tracker(name: str) -> Callback:
    """A tracker by its name on the command line.

    Raises:
        SettingsError: there is none of this name.
        DependencyError: its library is not installed.
    """
    if name not in TRACKERS:
        raise SettingsError(f"--track {name}: no such tracker. Use one of {', '.join(TRACKERS)}.")
    return TRACKERS[name]()


def _imported(module: str, extra: str) -> Any:
    return import_library(module, f"--track {extra}", f"pip install 'litdeploy[{extra}]'")


def _name(run: Run) -> str:
    """What the run is called: its folder's name, with its parent's, since many are called `deploy`."""
    path = run.folder.resolve()
    return "/".join(Path(path.parent.name, path.name).parts)


def _settings(run: Run) -> dict[str, Any]:
    """The recipe flat: `data.source`, `main.epochs`, …"""
    return dict(_flat(run.recipe.model_dump(mode="json", exclude_none=True)))


def _flat(values: dict[str, Any], at: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _flat(value, f"{at}{key}.") if isinstance(value, dict) else [(f"{at}{key}", value)]
    return found


def _numbers(metrics: Row) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}
