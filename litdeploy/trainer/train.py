"""The verb `train`: a network from new weights, by the labels alone. A teacher, or the from-scratch baseline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litdeploy.config.recipe import Recipe
from litdeploy.data import Data, check_against, open_data
from litdeploy.errors import BundleError, DataError, SettingsError
from litdeploy.networks import Network, NetworkName, new
from litdeploy.runtime import resolve_precision
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.lock import locked
from litdeploy.storage.records import Score
from litdeploy.tasks import task_of
from litdeploy.trainer.compress import show_left_out
from litdeploy.trainer.distributed import check_recipe, launched
from litdeploy.trainer.identity import identity_of_new
from litdeploy.trainer.methods import METHODS, Start
from litdeploy.trainer.optimizer import steps_per_epoch, with_optimizer
from litdeploy.trainer.plan import Plan
from litdeploy.trainer.progress import Callback, callbacks_of, may_be_replaced
from litdeploy.trainer.resolve import fitted, resolve_recipe
from litdeploy.trainer.resume import DEFAULT_EVERY, Checkpoints, Every, Snapshot
from litdeploy.trainer.trainer import Trainer
from litdeploy.trainer.validation import evaluate


@dataclass(frozen=True)
class Trained:
    """A file of trained weights, and its scores on the validation and test splits."""

    path: Path
    validation: Score
    test: Score


def train(
    network: NetworkName,
    *,
    recipe: Recipe | str | Path | None = None,
    out: str | Path = "teacher.safetensors",
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: str = DEFAULT_EVERY,
    progress: Callback | bool = True,
    callbacks: Sequence[Callback] = (),
    **changes: Any,
) -> Trained:
    """Train a new network and write `out` (`.safetensors`) and its metrics next to it (`.metrics.jsonl`).

    Several processes of a launcher train it together, as in `compress`.

    Without an input shape of its own, the network takes the dataset's, and its number of classes.

    Args:
        network: see `networks.registry.request`.
        recipe, device, overwrite, checkpoint_every, progress, callbacks, **changes: as for `compress`.
        resume: resume the run whose checkpoints are next to `out` (`.checkpoints`); start if there are none.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
    """
    resolved = resolve_recipe(recipe, changes)
    every = Every.parse(checkpoint_every)
    path = Path(out)
    if path.suffix != ".safetensors":
        raise BundleError(f"--out {path}: weights are written as .safetensors; end the name like that.")
    if path.exists() and not overwrite:
        raise BundleError(f"{path}: exists already; it is kept. Choose another --out, or --overwrite it.")
    metrics = path.with_suffix(".metrics.jsonl")
    if not overwrite and not may_be_replaced(metrics):
        raise BundleError(
            f"{metrics}: the metrics would be written there, and it is not a log of an earlier run; it is kept. Choose "
            "another --out, or --overwrite it."
        )
    launch = launched()
    place = launch.device(device)
    ranks = launch.join(place)
    watching = callbacks_of(progress, callbacks) if ranks.first else Callback()
    check_recipe(resolved, ranks)
    made, data = _open(network, resolved, place, watching)
    resolved = with_optimizer(fitted(resolved, data, watching.note), made.module, watching.note)
    precision = resolve_precision(resolved.precision, place)
    with ExitStack() as held:
        ranks.on_first(_enter, held, path)
        identity = ranks.on_first(identity_of_new, made.spec, resolved, data, precision, place, ranks)
        checkpoints = Checkpoints(path.with_suffix(".checkpoints"), identity, every, watching.note)
        saved = ranks.on_first(_claim, checkpoints, path, overwrite, resume)
        trainer = held.enter_context(
            Trainer(
                Plan(resolved, made, METHODS["scratch"].phases(resolved, Start())),
                data,
                precision,
                place,
                path.parent,
                metrics,
                watching,
                ranks,
                checkpoints,
                saved,
            )
        )
        with trainer.resumable(path):
            trainer.fit()
            assert trainer.position.validation is not None
            for text in trainer.selection.warnings(resolved, data, None):
                watching.note(f"warning: {text}")
            test = ranks.on_first(_finish, trainer, path)
    return Trained(path, trainer.position.validation, test)


def _open(network: NetworkName, recipe: Recipe, device: torch.device, progress: Callback) -> tuple[Network, Data]:
    """The new network and the data, checked against each other before anything is written."""
    data = open_data(recipe.data, device, recipe.seed)
    if not data.labeled:
        raise DataError(
            f"{data.source}: has no labels, or they are not used, and a new network is trained by labels alone. Name "
            "their column (--label-column NAME), or make a trained network shallower, which needs none: litdeploy "
            "compress TEACHER"
        )
    made = new(
        network,
        normalise=recipe.normalise,
        input_shape=recipe.input_shape,
        data_shape=data.shape,
        classes=len(data.classes),
        seed=recipe.seed,
        task=recipe.task,
    ).within(recipe.data.text_length)
    task = task_of(made.spec)
    if not task.labeled:
        raise SettingsError(
            f"{made.source}: {task.makes}, and litdeploy trains new weights of classifiers alone. Train it with its "
            "authors' code, and make it shallower here: litdeploy compress FILE"
            + (" --beta 0" if task.needs_labels else "")
        )
    if data.noun == "text":
        data = open_data(recipe.data, device, recipe.seed, made.spec)  # its classes are known now
    check_against(data, made.spec, made.class_count())
    show_left_out(data, progress)
    steps_per_epoch(data.train, recipe.batch_size)
    return made, data


def _enter(held: ExitStack, path: Path) -> None:
    held.enter_context(locked(path.with_name(f".{path.name}.lock"), str(path), "choose another --out"))


def _claim(checkpoints: Checkpoints, path: Path, overwrite: bool, resume: bool) -> Snapshot | None:
    """The snapshot to resume; None to start."""
    checkpoints.tidy()
    if overwrite:
        checkpoints.clear()
    if not resume and checkpoints.exist():
        raise BundleError(
            f"{path}: there is an unfinished run of this name. Resume it: the same command with --resume. "
            "Or choose another --out, or --overwrite it."
        )
    return checkpoints.newest()


def _finish(trainer: Trainer, path: Path) -> Score:
    test = evaluate(trainer.student, trainer.data.test, trainer.spec, "fp32")
    write_checkpoint(path, trainer.student.state_dict(), trainer.spec)
    trainer.checkpoints.clear()
    return test
