"""The verb `train`: a network from new weights, by the labels alone. A teacher, or the from-scratch baseline."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litdeploy.batch import moved
from litdeploy.config.recipe import Recipe
from litdeploy.data import Data, check_against, open_data
from litdeploy.errors import BundleError, SettingsError
from litdeploy.networks import Network, NetworkName, new
from litdeploy.runtime import resolve_precision
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.lock import locked
from litdeploy.storage.records import Accuracy
from litdeploy.trainer.checkpoints import DEFAULT_EVERY, Checkpoints, Every, Saved
from litdeploy.trainer.faults import interrupted, resumable
from litdeploy.trainer.launch import launched
from litdeploy.trainer.loop import evaluate, fit
from litdeploy.trainer.metrics import MetricsLog, Progress
from litdeploy.trainer.objectives import CrossEntropy, Start
from litdeploy.trainer.optimiser import steps_an_epoch
from litdeploy.trainer.parallel import check_recipe
from litdeploy.trainer.resolve import resolve_recipe
from litdeploy.trainer.resume import identity_of_new
from litdeploy.trainer.run import Position, Run
from litdeploy.trainer.start import tell_left_out
from litdeploy.trainer.state import position_of


@dataclass(frozen=True)
class Trained:
    """A file of trained weights, and its accuracy on the validation and the test split."""

    path: Path
    validation: Accuracy
    test: Accuracy


def train(
    network: NetworkName,
    *,
    recipe: Recipe | str | Path | None = None,
    out: str | Path = "teacher.safetensors",
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: str = DEFAULT_EVERY,
    progress: Progress | None = None,
    **changes: Any,
) -> Trained:
    """Trains a new network and writes `out` (`.safetensors`) and its metrics beside it (`.metrics.jsonl`).

    Several processes of a launcher train it together, as by `compress`.

    Without an input shape of its own the network takes the dataset's, and as many classes as there are.

    Args:
        network: see `networks.registry.request`.
        recipe, device, overwrite, checkpoint_every, progress, **changes: as for `compress`.
        resume: go on with the run whose checkpoints are beside `out` (`.checkpoints`); begin where there are none.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
    """
    resolved = resolve_recipe(recipe, changes)
    every = Every.parse(checkpoint_every)
    path = Path(out)
    if path.suffix != ".safetensors":
        raise BundleError(f"--out {path}: weights are written as .safetensors; end the name like that.")
    if path.exists() and not overwrite:
        raise BundleError(f"{path}: is there already; it is kept. Choose another --out, or --overwrite it.")
    launch = launched()
    where = launch.device(device)
    ranks = launch.join(where)
    told = progress if progress is not None and ranks.first else Progress()
    check_recipe(resolved, ranks)
    made, data = _open(network, resolved, where, told)
    precision = resolve_precision(resolved.precision, where)
    (phase,) = CrossEntropy.phases(resolved, Start())
    with ExitStack() as held:
        ranks.on_first(_enter, held, path)
        identity = ranks.on_first(identity_of_new, made.spec, resolved, data, precision, where, ranks)
        checkpoints = Checkpoints(path.with_suffix(".checkpoints"), identity, every, told.note)
        saved = ranks.on_first(_claim, checkpoints, path, overwrite, resume)
        position = Position() if saved is None else position_of(saved)
        metrics = path.with_suffix(".metrics.jsonl") if ranks.first else Path(os.devnull)
        held.enter_context(log := MetricsLog(metrics, rows=position.rows))
        run = Run(
            student=made.module.to(where, memory_format=torch.channels_last),  # type: ignore[call-overload]
            teacher=None,
            phases=[phase],
            sections=(),
            data=data,
            spec=made.spec.with_(classes=data.classes),
            input=made.spec.input,
            recipe=resolved,
            precision=precision,
            device=where,
            folder=path.parent,
            log=log,
            progress=told,
            example=moved(made.example(), where),
            ranks=ranks,
            checkpoints=checkpoints,
            saved=saved,
            position=position,
        )
        with resumable(run):
            try:
                with run.interruption.heard():
                    fit(run)
            except KeyboardInterrupt:
                raise interrupted(run, path) from None
            assert isinstance(run.position.validation, Accuracy)
            test = ranks.on_first(_finish, run, path)
    return Trained(path, run.position.validation, test)


def _open(network: NetworkName, recipe: Recipe, device: torch.device, progress: Progress) -> tuple[Network, Data]:
    """The new network and the data, held against one another before anything is written."""
    data = open_data(recipe.data, device, recipe.seed)
    made = new(
        network,
        normalise=recipe.normalise,
        input_shape=recipe.input_shape,
        data_shape=data.shape,
        classes=len(data.classes),
        seed=recipe.seed,
    ).within(recipe.data.text_length)
    if made.spec.translates:
        raise SettingsError(
            f"{made.source}: makes images and learns from a discriminator, not from labels; litdeploy trains none "
            "anew. Train it with its authors' code, and make it shallower here: litdeploy compress G.ckpt --beta 0"
        )
    if data.noun == "text":
        data = open_data(recipe.data, device, recipe.seed, made.spec)  # whose classes are known by now
    check_against(data, made.spec, made.class_count())
    tell_left_out(data, progress.note)
    steps_an_epoch(data.train, recipe.batch_size)
    return made, data


def _enter(held: ExitStack, path: Path) -> None:
    held.enter_context(locked(path.with_name(f".{path.name}.lock"), str(path), "choose another --out"))


def _claim(checkpoints: Checkpoints, path: Path, overwrite: bool, resume: bool) -> Saved | None:
    """What the run goes on from; None where it begins."""
    checkpoints.tidy()
    if overwrite:
        checkpoints.clear()
    if not resume and checkpoints.exist():
        raise BundleError(
            f"{path}: there is a run of this name that is not finished. Go on with it: the same command with --resume. "
            "Or choose another --out, or --overwrite it."
        )
    return checkpoints.newest()


def _finish(run: Run, path: Path) -> Accuracy:
    test = evaluate(run.student, run.data.test, run.input, "fp32")
    assert isinstance(test, Accuracy)
    write_checkpoint(path, run.student.state_dict(), run.spec)
    assert run.checkpoints is not None
    run.checkpoints.clear()
    return test
