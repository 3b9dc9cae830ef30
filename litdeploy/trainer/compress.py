"""The verb `compress`: from a teacher to a bundle with a trained, shallower student."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import litdeploy
from litdeploy.batch import moved
from litdeploy.bundle import (
    DEFAULT_PATH,
    Accuracy,
    Bundle,
    Manifest,
    RunRecord,
    Score,
    TeacherRecord,
)
from litdeploy.checkpoint import write_checkpoint
from litdeploy.data import check_against, open_data
from litdeploy.errors import InterruptedRun, SettingsError, StudentError
from litdeploy.networks import Network, NetworkName
from litdeploy.recipe import Recipe, read_recipe
from litdeploy.runtime import device_name, resolve_precision
from litdeploy.spec import TranslationInput
from litdeploy.trainer.loop import Run, evaluate, fit, steps_an_epoch
from litdeploy.trainer.metrics import MetricsLog, Progress, check_tensorboard
from litdeploy.trainer.objectives import OBJECTIVES, check_fits
from litdeploy.trainer.parallel import check_recipe, launched
from litdeploy.trainer.samples import write_samples
from litdeploy.trainer.start import add_teacher, begin, keep_teacher, load_teacher


def compress(
    teacher: str | Path | Network,
    *,
    recipe: Recipe | str | Path | None = None,
    out: str | Path = DEFAULT_PATH,
    device: str = "auto",
    network: NetworkName | None = None,
    overwrite: bool = False,
    tensorboard: bool = False,
    feature_cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Bundle:
    """Makes a teacher shallower and trains the result, by LIT unless the recipe says otherwise.

    Where a launcher (torchrun, srun) started several processes, each calls this: they train together, and the first
    writes the bundle.

    Args:
        teacher: a file of weights, or a network that was loaded. Left as it is.
        recipe: a recipe, or the name or path of one; None: the defaults.
        out: folder that becomes the bundle.
        device: `auto`, `cpu`, `cuda` or `cuda:i`; of several processes on a machine, `cuda` gives each its own.
        network: the teacher's network, where its file does not tell: see `networks.load`.
        overwrite: replace another run in `out`.
        tensorboard: write the metrics for TensorBoard too, under `out/tensorboard`.
        feature_cache_dir: folder in which the teacher's features are kept for further students of the same teacher and
            data; None: they are not kept beyond this run.
        progress: told of every epoch.
        **changes: fields of the recipe, over what it says: `student_depth=20`, `data="digits"`, `epochs=5`.

    Returns:
        The bundle, complete.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
        InterruptedRun: the user interrupted the training; the bundle says so and holds the weights so far.
    """
    resolved = resolve_recipe(recipe, changes)
    launch = launched()
    where = launch.device(device)
    ranks = launch.join(where)
    progress = progress if progress is not None and ranks.first else Progress()
    if tensorboard:
        check_tensorboard()
    loaded, record = load_teacher(teacher, resolved, network)
    if loaded.spec.plan is not None:
        raise StudentError(f"{loaded.source} is a student already. Compress its teacher to the depth that is wanted.")
    student, start = begin(loaded, resolved, network, where)
    phases = OBJECTIVES[resolved.method].phases(resolved, replace(start, teacher=loaded))
    check_recipe(resolved, ranks, start.sections, feature_cache_dir is not None)
    data = open_data(resolved.data, where, resolved.seed)
    check_against(data, loaded.spec, loaded.class_count())
    steps_an_epoch(data.train, resolved.batch_size)
    check_fits(phases, loaded, resolved.method)
    bundle = Bundle(out)
    ranks.on_first(bundle.claim, overwrite)
    if record is None:
        record = ranks.on_first(keep_teacher, bundle, loaded)
    metrics = bundle.metrics_path if ranks.first else Path(os.devnull)
    log = MetricsLog(metrics, bundle.path / "tensorboard" if tensorboard and ranks.first else None)
    with log, _own_folder(bundle) as folder:
        run = Run(
            student=student.module.to(where, memory_format=torch.channels_last),  # type: ignore[call-overload]
            teacher=None,
            phases=[phase for phase in phases if phase.settings.epochs],
            sections=start.sections,
            data=data,
            spec=student.spec.with_(classes=data.classes),
            input=loaded.spec.input,
            recipe=resolved,
            precision=resolve_precision(resolved.precision, where),
            device=where,
            folder=bundle.path,
            log=log,
            progress=progress,
            example=moved(loaded.example(), where),
            ranks=ranks,
        )
        kept = None if feature_cache_dir is None else Path(feature_cache_dir)
        add_teacher(run, loaded, start, record.sha256, kept or folder, kept is not None)
        return _train(bundle, run, loaded, record)


def resolve_recipe(recipe: Recipe | str | Path | None, changes: dict[str, Any]) -> Recipe:
    """The recipe with the changes over it. `data` may be just the source; `epochs` scales both phases, and
    `learning_rate` is that of the main phase.

    Raises:
        SettingsError: a field that there is not, or a value that it does not take.
    """
    base = recipe if isinstance(recipe, Recipe) else read_recipe(recipe) if recipe else Recipe()
    changes = {key: value for key, value in changes.items() if value is not None}
    epochs = changes.pop("epochs", None)
    learning_rate = changes.pop("learning_rate", None)
    data = changes.pop("data", {})
    data = {"source": str(data)} if isinstance(data, str | Path) else dict(data)
    if {"student_depth", "student_blocks"} & changes.keys():
        base = base.model_copy(update={"student_depth": None, "student_blocks": None})
    merged = {**base.data.model_dump(mode="json", exclude_defaults=True), **data}
    source = merged.get("source")
    if source is None:
        raise SettingsError(
            "no data to train on: name it with --data (a folder, a Parquet or CSV file, a hub id such as "
            "uoft-cs/cifar10, or digits), or a recipe that does."
        )
    if Path(source).exists():
        merged["source"] = str(Path(source).resolve())
    if changes.get("discriminator"):
        changes["discriminator"] = str(Path(changes["discriminator"]).resolve())
    if learning_rate is not None:
        changes["main"] = {**base.main.model_dump(mode="json"), "learning_rate": learning_rate}
    resolved = base.with_(**changes, data=merged)
    if epochs is not None:
        if epochs < 1:
            raise SettingsError(f"--epochs {epochs}: at least one epoch is needed.")
        resolved = resolved.with_epochs(epochs)
    return resolved


def _train(bundle: Bundle, run: Run, loaded: Network, teacher: TeacherRecord) -> Bundle:
    started, clock = datetime.now(UTC), time.perf_counter()
    of_teacher: dict[str, Score] = {}
    # Not the trainer's teacher: that one may be in bf16, and its batch norms are folded.
    as_given = copy.deepcopy(loaded.module).to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        if loaded.spec.translates:
            run.reference = as_given.eval()
        else:
            of_teacher["validation"] = run.ranks.on_first(_teacher_on_validation, run, as_given)
        fit(run)
        run.progress.note("testing teacher and student on the test split, once")
        student_test = run.ranks.on_first(_test, run, run.student)
        if run.reference is None:
            of_teacher["test"] = run.ranks.on_first(_test, run, as_given)
        else:
            run.ranks.on_first(_draw_samples, bundle, run, run.reference)
    except KeyboardInterrupt:
        if run.ranks.first:
            _finish(bundle, run, teacher, started, clock, {"teacher": of_teacher}, "interrupted")
        raise InterruptedRun(
            f"interrupted after {run.epochs_done} of {run.epochs} epochs; {bundle.path} says so and holds the weights "
            "so far. To train again: the same command with --overwrite."
        ) from None
    metrics = {"teacher": of_teacher, "student": {"test": student_test}}
    run.ranks.on_first(_finish, bundle, run, teacher, started, clock, metrics, "complete")
    return bundle


def _test(run: Run, module: nn.Module) -> Score:
    return evaluate(module, run.data.test, run.input, "fp32", run.reference)


def _draw_samples(bundle: Bundle, run: Run, teacher: nn.Module) -> None:
    assert isinstance(run.input, TranslationInput)
    drawn = write_samples(bundle.samples_path, teacher, run.student, run.data.test, run.input, run.data.classes)
    run.progress.note(f"{bundle.samples_path}: drawn" if drawn else "no sample sheet: it needs Pillow")


@contextmanager
def _own_folder(bundle: Bundle) -> Iterator[Path]:
    """A folder of the bundle for features that need not outlive the run."""
    folder = bundle.path / "features"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _teacher_on_validation(run: Run, teacher: nn.Module) -> Score:
    found = evaluate(teacher, run.data.validation, run.input, run.precision)
    assert isinstance(found, Accuracy)
    run.progress.note(f"teacher: {found.top1:.2%} on {found.images} validation images")
    chance = 1 / len(run.data.classes)
    if found.top1 < chance + 0.1 * (1 - chance):
        run.progress.note(
            f"warning: that is hardly better than guessing ({chance:.0%}). Is the input the teacher's own (now "
            f"{run.input.told()}; of images --normalise), and are these the classes it was trained on?"
        )
    return found


def _finish(
    bundle: Bundle,
    run: Run,
    teacher: TeacherRecord,
    started: datetime,
    clock: float,
    metrics: dict[str, dict[str, Score]],
    status: str,
) -> None:
    """Weights first, the manifest that names them last."""
    sha256 = write_checkpoint(bundle.student_path, run.student.state_dict(), run.spec)
    if run.validation is not None:
        metrics = {**metrics, "student": {"validation": run.validation, **metrics.get("student", {})}}
    record = RunRecord(
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
        images_per_second=round(run.images_done / max(run.training_seconds, 1e-9), 1),
        epochs=run.epochs_done,
        device=device_name(run.device),
        precision=run.precision,
        versions={"python": platform.python_version(), "torch": torch.__version__},
        ranks=run.ranks.size,
    )
    bundle.write(
        Manifest.model_validate(
            {
                "litdeploy": litdeploy.__version__,
                "status": status,
                "teacher": teacher,
                "student": run.spec,
                "student_sha256": sha256,
                "recipe": run.recipe,
                "data": run.data.record(),
                "run": record,
                "metrics": metrics,
            }
        )
    )
