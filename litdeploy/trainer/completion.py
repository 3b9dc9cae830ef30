"""From a run's first step to its student's complete bundle: trained, measured, written."""

from __future__ import annotations

import copy
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litdeploy.data import prepared
from litdeploy.networks import Network, is_hub
from litdeploy.runtime import device_name
from litdeploy.storage.bundle import Bundle
from litdeploy.storage.checkpoint import write_checkpoint
from litdeploy.storage.records import Manifest, RunRecord, Score
from litdeploy.tasks import task_of
from litdeploy.trainer.chain import Teaching
from litdeploy.trainer.faults import interrupted, resumable
from litdeploy.trainer.loop import evaluate, fit
from litdeploy.trainer.run import Run
from litdeploy.trainer.state import checkpoint
from litdeploy.version import __version__


def complete(bundle: Bundle, run: Run, loaded: Network, teaching: Teaching) -> None:
    """Trains the student, from where the run is, and completes its bundle.

    Args:
        loaded: the teacher that was given; of a chain, what all its students are measured against.

    Raises:
        LitdeployError: as `fit`.
        InterruptedRun: the user stopped it; the bundle says so and holds the weights so far.
    """
    of_teacher = dict(teaching.scores)
    # Not the trainer's teacher: that one may be in bf16, and its batch norms are folded.
    as_given = copy.deepcopy(loaded.module).to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with resumable(run):
        try:
            with run.interruption.heard():
                # A student of students, too, is measured against the teacher that was given.
                if task_of(loaded.spec).needs_reference:
                    run.reference = as_given.eval()
                elif not teaching.lineage:
                    of_teacher["validation"] = run.ranks.on_first(_teacher_on_validation, run, as_given)
                fit(run)
                run.progress.note("testing teacher and student on the test split, once")
                student_test = run.ranks.on_first(_test, run, run.student)
                if run.reference is not None:
                    run.ranks.on_first(_draw_samples, bundle, run, run.reference)
                elif not teaching.lineage:
                    of_teacher["test"] = run.ranks.on_first(_test, run, as_given)
                metrics = {"teacher": of_teacher, "student": {"test": student_test}}
                with run.interruption.held():
                    run.ranks.on_first(_write, bundle, run, teaching, metrics, "complete")
        except KeyboardInterrupt:
            # A run that was not put back yet has the weights that it began with.
            if run.ranks.first and run.saved is None and not run.interruption.twice:
                if run.trained:
                    checkpoint(run, None)
                _write(bundle, run, teaching, {"teacher": of_teacher}, "interrupted")
            raise interrupted(run, bundle.path) from None


def _teacher_on_validation(run: Run, teacher: nn.Module) -> Score:
    found = evaluate(teacher, run.data.validation, run.input, run.precision)
    run.progress.note(f"teacher: {found.summary()} on {found.images} validation {run.data.noun}s")
    chance = task_of(run.spec).chance(found, len(run.data.classes))
    if chance is not None:
        run.progress.note(
            f"warning: that is hardly better than guessing ({chance:.0%}). Is the input the teacher's own (now "
            f"{run.input.summary()}; of images --normalise), and are these the classes it was trained on?"
        )
    return found


def _test(run: Run, module: nn.Module) -> Score:
    return evaluate(module, run.data.test, run.input, "fp32", run.reference)


def _draw_samples(bundle: Bundle, run: Run, teacher: nn.Module) -> None:
    task, split = task_of(run.spec), run.data.test
    count = min(task.samples, len(split))
    [picked] = split.pick([torch.arange(count) * len(split) // count])
    inputs = prepared(picked.images(), run.input, picked.labels_N)
    classes = run.data.classes
    drawn = task.write_samples(bundle.samples_path, teacher, run.student, inputs, picked.labels_N, run.input, classes)
    run.progress.note(f"{bundle.samples_path}: drawn" if drawn else "no sample sheet: it needs Pillow")


def _write_carried(run: Run, folder: Path) -> None:
    """What transformers rebuilds the student by, and makes tokens with: later stages need no other folder."""
    config: Any = getattr(run.student, "config", None)
    if is_hub(run.spec.name):
        config.save_pretrained(folder)
    if run.data.tokens is not None:
        run.data.tokens.save(folder)


def _write(
    bundle: Bundle,
    run: Run,
    teaching: Teaching,
    metrics: dict[str, dict[str, Score]],
    status: str,
) -> None:
    """Weights first, the manifest that names them last. What a complete run was resumed from is not needed any more."""
    bundle.manifest_path.unlink(missing_ok=True)  # of an interruption before; it names other weights
    position = run.position
    carried = bundle.carry(partial(_write_carried, run))
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
                "litdeploy": __version__,
                "status": status,
                "teacher": teaching.record,
                "lineage": teaching.lineage,
                "student": run.spec,
                "student_sha256": sha256,
                "carried": carried,
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
