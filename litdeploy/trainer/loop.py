"""The run: phases, epochs, steps, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from litdeploy.bundle import Accuracy
from litdeploy.data import Data, Split, augment, draw_crops, normalise, normalised_batches, shuffled
from litdeploy.errors import TrainingError
from litdeploy.networks.network import logits_of
from litdeploy.recipe import Phase, Recipe
from litdeploy.runtime import accuracy
from litdeploy.spec import InputSpec
from litdeploy.trainer.metrics import MetricsLog, Progress, Row
from litdeploy.trainer.objectives import TrainingPhase
from litdeploy.trainer.step import Step, prepare
from litdeploy.trainer.teacher import Teacher


@dataclass
class Run:
    """What a run works with, and how far it came.

    Attributes:
        student: trained in place, on `device`, channels-last.
        teacher: None where no phase needs one.
        sections: names of the student's planned sections, in the order they run in.
        epochs_done: whole epochs of all phases together.
        validation: accuracy after the last whole epoch.
    """

    student: nn.Module
    teacher: Teacher | None
    phases: Sequence[TrainingPhase]
    sections: Sequence[str]
    data: Data
    input: InputSpec
    recipe: Recipe
    precision: str
    device: torch.device
    log: MetricsLog
    progress: Progress
    epochs_done: int = 0
    images_done: int = 0
    training_seconds: float = 0.0
    validation: Accuracy | None = None

    @property
    def epochs(self) -> int:
        return sum(phase.settings.epochs for phase in self.phases)


def fit(run: Run) -> None:
    """Trains the student through all phases.

    Raises:
        TrainingError: the loss is no longer a finite number.
    """
    order = torch.Generator().manual_seed(run.recipe.seed)
    draws = torch.Generator().manual_seed(run.recipe.seed)
    for phase in run.phases:
        with Step(run.student, phase.objective, run.sections, run.precision) as step:
            optimiser = _optimiser(run, phase)
            schedule = _schedule(optimiser, phase.settings, steps_an_epoch(run.data.train, run.recipe.batch_size))
            for _ in range(phase.settings.epochs):
                run.progress.begin(phase.name, run.epochs_done + 1, run.epochs, len(run.data.train))
                started = time.perf_counter()
                losses = _train_epoch(run, step, optimiser, schedule, order, draws)
                seconds = time.perf_counter() - started
                _check_finite(losses, phase, run)
                run.validation = evaluate(run.student, run.data.validation, run.input, run.precision)
                prepare(run.student, phase.objective, run.sections)
                _record(run, phase, losses, optimiser, seconds)


def _train_epoch(
    run: Run,
    step: Step,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
    draws: torch.Generator,
) -> dict[str, float]:
    """Mean of each loss over the epoch. The sums stay on the device and are read once."""
    sums: dict[str, Tensor] = {}
    steps = 0
    batches = shuffled(len(run.data.train), run.recipe.batch_size, order)
    for picked in run.data.train.pick(batches):
        crops = draw_crops(len(picked.rows_N), run.recipe.augmentation, draws).to(run.device)
        images_NCHW = normalise(augment(picked.images(), crops), run.input)
        features = run.teacher(images_NCHW) if run.teacher is not None and step.objective.needs_teacher else None
        losses = step(optimiser, images_NCHW, picked.labels_N, features)
        schedule.step()
        for name, loss in losses.items():
            sums[name] = sums[name] + loss if name in sums else loss
        steps += 1
        run.images_done += len(picked.labels_N)
        run.progress.advance(len(picked.labels_N))
    return {name: value.item() / steps for name, value in sums.items()}


def evaluate(module: nn.Module, split: Split, spec: InputSpec, precision: str, batch_size: int = 256) -> Accuracy:
    """Accuracy of a module on a split, on the module's device. Leaves it in eval mode."""
    module.eval()
    device = next(module.parameters()).device

    @torch.no_grad()
    def logits(images_NCHW: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return logits_of(module(images_NCHW)).float()

    return accuracy(logits, normalised_batches(split, spec, batch_size))


def _optimiser(run: Run, phase: TrainingPhase) -> torch.optim.Optimizer:
    parameters: Iterable[nn.Parameter] = [*run.student.parameters(), *phase.objective.parameters()]
    return torch.optim.SGD(
        [parameter for parameter in parameters if parameter.requires_grad],
        lr=phase.settings.learning_rate,
        momentum=run.recipe.momentum,
        weight_decay=run.recipe.weight_decay,
    )


def steps_an_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in a split; what is left over is not trained on in that epoch.

    Raises:
        TrainingError: there is none.
    """
    steps = len(split) // batch_size
    if steps == 0:
        raise TrainingError(
            f"the training split has {len(split)} images, fewer than one batch of {batch_size}. "
            f"Give a smaller batch: --batch-size {max(2, len(split) // 4)}"
        )
    return steps


def _schedule(optimiser: torch.optim.Optimizer, phase: Phase, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The phase's schedule, stepped once a step."""
    if phase.schedule == "step":
        milestones = [epoch * steps for epoch in phase.milestones]
        return torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    total = max(1, phase.epochs * steps)
    # One more than the steps: the schedule is stepped after the last update too.
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=phase.learning_rate, total_steps=total + 1, cycle_momentum=False
    )


def _check_finite(losses: dict[str, float], phase: TrainingPhase, run: Run) -> None:
    strange = [name for name, value in losses.items() if not math.isfinite(value)]
    if strange:
        raise TrainingError(
            f"epoch {run.epochs_done + 1} ({phase.name}): {', '.join(strange)} is not a finite number at a learning "
            f"rate of up to {phase.settings.learning_rate:g}. Try a lower one: --learning-rate "
            f"{phase.settings.learning_rate / 3:.2g}"
        )


def _record(
    run: Run, phase: TrainingPhase, losses: dict[str, float], optimiser: torch.optim.Optimizer, seconds: float
) -> None:
    assert run.validation is not None
    run.epochs_done += 1
    run.training_seconds += seconds
    images = steps_an_epoch(run.data.train, run.recipe.batch_size) * run.recipe.batch_size
    row: Row = {
        "phase": phase.name,
        "epoch": run.epochs_done,
        "epochs": run.epochs,
        "learning_rate": optimiser.param_groups[0]["lr"],
        **losses,
        "validation_top1": run.validation.top1,
        "validation_loss": run.validation.loss,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
    }
    run.log.write(row)
    run.progress.end(row)
