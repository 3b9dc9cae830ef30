"""The verb `train`: a network from new weights, by the labels alone. A teacher, or the from-scratch baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litdeploy.bundle import Accuracy
from litdeploy.checkpoint import write_checkpoint
from litdeploy.data import check_against, open_data
from litdeploy.errors import BundleError
from litdeploy.networks import NetworkName, new
from litdeploy.recipe import Recipe
from litdeploy.runtime import resolve_device, resolve_precision
from litdeploy.trainer.compress import resolve_recipe
from litdeploy.trainer.loop import Run, evaluate, fit, steps_an_epoch
from litdeploy.trainer.metrics import MetricsLog, Progress
from litdeploy.trainer.objectives import CrossEntropy


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
    where = resolve_device(device)
    data = open_data(resolved.data, where, resolved.seed)
    made = new(
        network,
        normalise=resolved.normalise,
        input_shape=resolved.input_shape or data.shape,
        classes=len(data.classes),
        seed=resolved.seed,
    )
    check_against(data, made.spec, made.class_count())
    steps_an_epoch(data.train, resolved.batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    (phase,) = CrossEntropy.phases(resolved, ())
    with MetricsLog(path.with_suffix(".metrics.jsonl")) as log:
        run = Run(
            student=made.module.to(where, memory_format=torch.channels_last),  # type: ignore[call-overload]
            teacher=None,
            phases=[phase],
            sections=(),
            data=data,
            input=made.spec.input,
            recipe=resolved,
            precision=resolve_precision(resolved.precision, where),
            device=where,
            log=log,
            progress=progress or Progress(),
            example=made.example().to(where),
        )
        fit(run)
    assert run.validation is not None
    test = evaluate(run.student, data.test, run.input, "fp32")
    write_checkpoint(path, run.student.state_dict(), made.spec.with_(classes=data.classes))
    return Trained(path, run.validation, test)
