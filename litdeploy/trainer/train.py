"""The verb `train`: a network from new weights, by the labels alone. A teacher, or the from-scratch baseline."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litdeploy.batch import moved
from litdeploy.bundle import Accuracy
from litdeploy.checkpoint import write_checkpoint
from litdeploy.data import check_against, open_data
from litdeploy.errors import BundleError, SettingsError
from litdeploy.networks import NetworkName, new
from litdeploy.recipe import Recipe
from litdeploy.runtime import resolve_precision
from litdeploy.trainer.compress import resolve_recipe
from litdeploy.trainer.loop import Run, evaluate, fit, steps_an_epoch
from litdeploy.trainer.metrics import MetricsLog, Progress
from litdeploy.trainer.objectives import CrossEntropy, Start
from litdeploy.trainer.parallel import check_recipe, launched


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
    progress: Progress | None = None,
    **changes: Any,
) -> Trained:
    """Trains a new network and writes `out` (`.safetensors`) and its metrics beside it (`.metrics.jsonl`).

    Several processes of a launcher train it together, as by `compress`.

    Without an input shape of its own the network takes the dataset's, and as many classes as there are.

    Args:
        network: see `networks.registry.request`.
        recipe, device, overwrite, progress, **changes: as for `compress`.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
    """
    resolved = resolve_recipe(recipe, changes)
    path = Path(out)
    if path.suffix != ".safetensors":
        raise BundleError(f"--out {path}: weights are written as .safetensors; end the name like that.")
    if path.exists() and not overwrite:
        raise BundleError(f"{path}: is there already; it is kept. Choose another --out, or --overwrite it.")
    launch = launched()
    where = launch.device(device)
    ranks = launch.join(where)
    check_recipe(resolved, ranks)
    data = open_data(resolved.data, where, resolved.seed)
    made = new(
        network,
        normalise=resolved.normalise,
        input_shape=resolved.input_shape,
        data_shape=data.shape,
        classes=len(data.classes),
        seed=resolved.seed,
    )
    if made.spec.translates:
        raise SettingsError(
            f"{made.source}: makes images and learns from a discriminator, not from labels; litdeploy trains none "
            "anew. Train it with its authors' code, and make it shallower here: litdeploy compress G.ckpt --beta 0"
        )
    check_against(data, made.spec, made.class_count())
    steps_an_epoch(data.train, resolved.batch_size)
    ranks.on_first(path.parent.mkdir, parents=True, exist_ok=True)
    (phase,) = CrossEntropy.phases(resolved, Start())
    with MetricsLog(path.with_suffix(".metrics.jsonl") if ranks.first else Path(os.devnull)) as log:
        run = Run(
            student=made.module.to(where, memory_format=torch.channels_last),  # type: ignore[call-overload]
            teacher=None,
            phases=[phase],
            sections=(),
            data=data,
            spec=made.spec.with_(classes=data.classes),
            input=made.spec.input,
            recipe=resolved,
            precision=resolve_precision(resolved.precision, where),
            device=where,
            folder=path.parent,
            log=log,
            progress=progress if progress is not None and ranks.first else Progress(),
            example=moved(made.example(), where),
            ranks=ranks,
        )
        fit(run)
    assert isinstance(run.validation, Accuracy)
    test = ranks.on_first(_finish, run, path)
    return Trained(path, run.validation, test)


def _finish(run: Run, path: Path) -> Accuracy:
    test = evaluate(run.student, run.data.test, run.input, "fp32")
    assert isinstance(test, Accuracy)
    write_checkpoint(path, run.student.state_dict(), run.spec)
    return test
