"""The verb `compress`: from a teacher to a bundle with a trained, shallower student."""

from __future__ import annotations

import copy
import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    sha256_of,
)
from litdeploy.checkpoint import write_checkpoint
from litdeploy.data import check_against, open_data
from litdeploy.errors import InterruptedRun, NetworkError, SettingsError, StudentError
from litdeploy.networks import Network, NetworkName
from litdeploy.networks.registry import is_code
from litdeploy.recipe import Recipe, read_recipe
from litdeploy.runtime import device_name, resolve_precision
from litdeploy.spec import TranslationInput
from litdeploy.trainer.checkpoints import DEFAULT_EVERY, Checkpoints, Every
from litdeploy.trainer.faults import resumable
from litdeploy.trainer.loop import evaluate, fit
from litdeploy.trainer.metrics import MetricsLog, Progress, check_tensorboard
from litdeploy.trainer.objectives import OBJECTIVES, check_fits
from litdeploy.trainer.optimiser import steps_an_epoch
from litdeploy.trainer.parallel import check_recipe, launched
from litdeploy.trainer.resume import going_on, identity_of
from litdeploy.trainer.run import Position, Run
from litdeploy.trainer.samples import write_samples
from litdeploy.trainer.start import add_teacher, begin, keep_teacher, load_teacher, tell_left_out
from litdeploy.trainer.state import checkpoint, position_of


def compress(
    teacher: str | Path | Network,
    *,
    recipe: Recipe | str | Path | None = None,
    out: str | Path = DEFAULT_PATH,
    device: str = "auto",
    network: NetworkName | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: str = DEFAULT_EVERY,
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
        resume: go on with the run in `out` from its newest whole checkpoint, on the CPU to the very same student; begin
            where there is none, and do nothing where it is complete.
        checkpoint_every: how often one is written under `out/checkpoints`: `10min`, `1epoch`, `500steps`, several with
            commas between, or `off`. A complete run leaves none.
        tensorboard: write the metrics for TensorBoard too, under `out/tensorboard`.
        feature_cache_dir: folder in which the teacher's features are kept for further students of the same teacher and
            data; None: they are not kept beyond this run.
        progress: told of every epoch.
        **changes: fields of the recipe, over what it says: `student_depth=20`, `data="digits"`, `epochs=5`.

    Returns:
        The bundle, complete.

    Raises:
        LitdeployError: one of its kinds, before anything is written.
        InterruptedRun: the user interrupted the training (Ctrl-C, SIGTERM); the bundle says so and holds the weights so
            far, and a checkpoint.
    """
    resolved = resolve_recipe(recipe, changes)
    every = Every.parse(checkpoint_every)
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
    phases = OBJECTIVES[resolved.method].phases(resolved, start)
    check_recipe(resolved, ranks, start.sections, feature_cache_dir is not None)
    data = open_data(resolved.data, where, resolved.seed)
    check_against(data, loaded.spec, loaded.class_count())
    tell_left_out(data, progress.note)
    steps_an_epoch(data.train, resolved.batch_size)
    check_fits(phases, loaded, resolved.method)
    discriminator = None if resolved.discriminator is None else sha256_of(Path(resolved.discriminator))
    bundle = Bundle(out)
    precision = resolve_precision(resolved.precision, where)
    with ExitStack() as held:
        ranks.on_first(_enter, held, bundle, overwrite, resume)
        identity = ranks.on_first(
            identity_of, loaded, record, student.spec.plan, resolved, data, precision, where, ranks, discriminator
        )
        checkpoints = Checkpoints(bundle.checkpoints_path, identity, every, progress.note)
        done, saved = (
            ranks.on_first(going_on, bundle, checkpoints, identity, progress.note) if resume else (False, None)
        )
        if done:
            return bundle
        if record is None:
            record = ranks.on_first(keep_teacher, bundle, loaded)
        position = Position() if saved is None else position_of(saved)
        metrics = bundle.metrics_path if ranks.first else Path(os.devnull)
        events = bundle.path / "tensorboard" if tensorboard and ranks.first else None
        held.enter_context(log := MetricsLog(metrics, events, position.rows))
        folder = held.enter_context(_own_folder(bundle))
        run = Run(
            student=student.module.to(where, memory_format=torch.channels_last),  # type: ignore[call-overload]
            teacher=None,
            phases=[phase for phase in phases if phase.settings.epochs],
            sections=start.sections,
            data=data,
            spec=student.spec.with_(classes=data.classes),
            input=loaded.spec.input,
            recipe=resolved,
            precision=precision,
            device=where,
            folder=bundle.path,
            log=log,
            progress=progress,
            example=moved(loaded.example(), where),
            discriminator=discriminator,
            ranks=ranks,
            checkpoints=checkpoints,
            saved=saved,
            position=position,
        )
        kept = None if feature_cache_dir is None else Path(feature_cache_dir)
        add_teacher(run, loaded, start, record.sha256, kept or folder, kept is not None)
        return _train(bundle, run, loaded, record)


def resolve_recipe(recipe: Recipe | str | Path | None, changes: dict[str, Any]) -> Recipe:
    """The recipe with the changes over it. `data` may be just the source; `epochs` scales both phases, and
    `learning_rate` is that of the main phase.

    Raises:
        SettingsError: a field that there is not, or a value that it does not take.
        NetworkError: the recipe, which may be a stranger's file, names code, and the changes do not.
    """
    base = recipe if isinstance(recipe, Recipe) else read_recipe(recipe) if recipe else Recipe()
    changes = {key: value for key, value in changes.items() if value is not None}
    named = base.indistill.student if base.indistill else None
    if named is not None and is_code(named) and "student" not in changes.get("indistill", {}):
        raise NetworkError(
            f"the recipe says indistill.student: {named!r}, which is code. It is run only when you name it: "
            f"--student-network {shlex.quote(named)}"
        )
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
    if learning_rate is not None:
        changes["main"] = {**base.main.model_dump(mode="json"), "learning_rate": learning_rate}
    resolved = base.with_(**changes, data=merged)
    if resolved.discriminator is not None:
        resolved = resolved.with_(discriminator=str(Path(resolved.discriminator).resolve()))
    if epochs is not None:
        if epochs < 1:
            raise SettingsError(f"--epochs {epochs}: at least one epoch is needed.")
        resolved = resolved.with_epochs(epochs)
    return resolved


def _train(bundle: Bundle, run: Run, loaded: Network, teacher: TeacherRecord) -> Bundle:
    of_teacher: dict[str, Score] = {}
    # Not the trainer's teacher: that one may be in bf16, and its batch norms are folded.
    as_given = copy.deepcopy(loaded.module).to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with resumable(run):
        try:
            with run.interruption.heard():
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
                metrics = {"teacher": of_teacher, "student": {"test": student_test}}
                with run.interruption.held():
                    run.ranks.on_first(_finish, bundle, run, teacher, metrics, "complete")
        except KeyboardInterrupt:
            # A run that was not put back yet has the weights that it began with.
            if run.ranks.first and run.saved is None and not run.interruption.twice:
                if run.trained:
                    checkpoint(run, None)
                _finish(bundle, run, teacher, {"teacher": of_teacher}, "interrupted")
            raise interrupted(run, bundle.path) from None
    return bundle


def interrupted(run: Run, where: Path) -> InterruptedRun:
    """The error of a run that its user stopped."""
    position = run.position
    assert run.checkpoints is not None
    return InterruptedRun(
        f"{where}: interrupted after {position.epochs_done} of {run.epochs} epochs"
        + (f" and {position.step} steps" if position.step else "")
        + f". {run.checkpoints.told()}"
    )


def _enter(held: ExitStack, bundle: Bundle, overwrite: bool, resume: bool) -> None:
    held.enter_context(bundle.lock())
    if not resume or not bundle.exists():
        bundle.claim(overwrite)


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
    yield folder
    # A run that did not come this far may be gone on with.
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
    metrics: dict[str, dict[str, Score]],
    status: str,
) -> None:
    """Weights first, the manifest that names them last. What a complete run was resumed from is not needed any more."""
    bundle.manifest_path.unlink(missing_ok=True)  # of an interruption before; it names other weights
    position = run.position
    sha256 = write_checkpoint(bundle.student_path, run.student.state_dict(), run.spec)
    if position.validation is not None:
        metrics = {**metrics, "student": {"validation": position.validation, **metrics.get("student", {})}}
    record = RunRecord(
        started=position.started,
        seconds=round(run.elapsed, 3),
        images_per_second=round(position.images_done / max(position.training_seconds, 1e-9), 1),
        epochs=position.epochs_done,
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
                "discriminator_sha256": run.discriminator,
                "recipe": run.recipe,
                "data": run.data.record(),
                "run": record,
                "metrics": metrics,
            }
        )
    )
    if status == "complete" and run.checkpoints is not None:
        run.checkpoints.clear()
