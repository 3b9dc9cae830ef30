"""The run: phases, epochs, steps, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward, mapped
from litdeploy.bundle import Score
from litdeploy.data import Data, Split, normalised_batches
from litdeploy.errors import TrainingError
from litdeploy.networks.network import logits_of
from litdeploy.networks.sections import container
from litdeploy.recipe import Phase, Recipe
from litdeploy.runtime import accuracy
from litdeploy.runtime.fidelity import fidelity
from litdeploy.spec import AnyInput, NetworkSpec, image_of
from litdeploy.trainer.batchnorm import ESTIMATION_BATCHES, average_statistics, estimate_statistics, synchronised
from litdeploy.trainer.cache import FeatureCache
from litdeploy.trainer.epoch import Epochs
from litdeploy.trainer.memory import out_of_memory
from litdeploy.trainer.metrics import MetricsLog, Progress, Row
from litdeploy.trainer.objectives import LitSections, TrainingPhase
from litdeploy.trainer.parallel import ALONE, Ranks, divide
from litdeploy.trainer.plan import compiles_step, fallback, forward_flops, section_flops
from litdeploy.trainer.step import Step
from litdeploy.trainer.teacher import Teacher

# Of Adam, for generators (Radford et al., "DCGAN", 2016; Choi et al., 2018).
_GENERATORS_BETAS = (0.5, 0.999)


@dataclass
class Run:
    """What a run works with, and how far it came.

    Attributes:
        student: trained in place, on `device`, channels-last.
        teacher: None where no phase needs one.
        spec: of the student; it rebuilds the student as it is now.
        sections: names of the student's planned sections, in the order they run in.
        folder: where the run keeps what it needs to go on.
        example: what the student takes, of a few images.
        reference: whose images the student's are measured against, on `device`; None where it tells classes apart.
        cache: of the teacher's features; None: none are kept.
        ranks: that share the run.
        epochs_done: whole epochs of all phases together.
        validation: how good the student was after the last whole epoch.
    """

    student: nn.Module
    teacher: Teacher | None
    phases: Sequence[TrainingPhase]
    sections: Sequence[str]
    data: Data
    spec: NetworkSpec
    input: AnyInput
    recipe: Recipe
    precision: str
    device: torch.device
    folder: Path
    log: MetricsLog
    progress: Progress
    example: Batch
    reference: nn.Module | None = None
    cache: FeatureCache | None = None
    ranks: Ranks = ALONE
    epochs_done: int = 0
    images_done: int = 0
    training_seconds: float = 0.0
    validation: Score | None = None

    @property
    def epochs(self) -> int:
        return sum(phase.settings.epochs for phase in self.phases)


@dataclass(frozen=True)
class Share:
    """What this rank trains of a phase.

    Attributes:
        phase: of its own sections only, where sections are divided.
        sections: that it trains.
        ranks: with which it shares the batches; divided sections share nothing.
        owners: section → its rank; empty where sections are not divided.
    """

    phase: TrainingPhase
    sections: Sequence[str]
    ranks: Ranks
    owners: dict[str, int] = field(default_factory=dict)


def fit(run: Run) -> None:
    """Trains the student through all phases.

    Of several ranks, all have the same student when a phase begins; in the end the first one has it whole.

    Raises:
        TrainingError: the loss is no longer a finite number, or a rank was lost.
    """
    order = torch.Generator().manual_seed(run.recipe.seed)
    draws = torch.Generator().manual_seed(run.recipe.seed)
    for phase in run.phases:
        run.ranks.copy([*run.student.state_dict().values(), *phase.objective.parameters()])
        if phase.transition is not None:
            phase.transition.apply(run)
        with synchronised(run.student, run.ranks) if _synchronises(run) else nullcontext():
            _fit(run, _share(run, phase), order, draws)


def _fit(run: Run, share: Share, order: torch.Generator, draws: torch.Generator) -> None:
    phase = share.phase
    with _step(run, share) as step:
        optimiser = _optimiser(run, phase)
        schedule = _schedule(optimiser, phase.settings, steps_an_epoch(run.data.train, run.recipe.batch_size))
        teacher = run.teacher if phase.objective.needs_teacher else None
        cache = run.cache if teacher is not None else None
        passes = Epochs(
            step, teacher, cache, optimiser, run.input, run.recipe, order, draws, _captures(run), share.ranks
        )
        for _ in range(phase.settings.epochs):
            run.progress.begin(phase.name, run.epochs_done + 1, run.epochs, len(run.data.train))
            started = time.perf_counter()
            try:
                losses = _over_ranks(run, share, _train_epoch(run, passes, schedule))
            except torch.OutOfMemoryError:
                losses = None  # told outside: as long as it is handled, the exception holds the step's memory
            if losses is None:
                del passes, optimiser, schedule
                attempt = None if _synchronises(run) else _attempt(run, share, step, teacher)
                raise out_of_memory(run.recipe.batch_size, attempt, run.device)
            seconds = time.perf_counter() - started
            _check_finite(losses, phase, run)
            _gather(run, share)
            run.validation = run.ranks.on_first(_validate, run, phase, passes)
            step.prepare()
            _record(run, phase, losses, optimiser, seconds)


def _train_epoch(run: Run, passes: Epochs, schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, float]:
    """Mean of each loss over the epoch's steps of this rank. The sums stay on the device and are read once."""
    sums: dict[str, Tensor] = {}
    steps = 0
    for losses in passes.run(run.data.train):
        schedule.step()
        for name, loss in losses.items():
            sums[name] = sums[name] + loss if name in sums else loss.clone()
        steps += 1
        run.images_done += run.recipe.batch_size
        run.progress.advance(run.recipe.batch_size)
    return {name: value.item() / steps for name, value in sums.items()}


def _attempt(run: Run, share: Share, step: Step, teacher: Teacher | None) -> Callable[[int], None]:
    """Forward and backward of this rank's part of so many images."""

    def attempt(images: int) -> None:
        images = max(1, images // share.ranks.size)
        inputs = mapped(lambda tensor: tensor.new_zeros(images, *tensor.shape[1:]), run.example)
        labels_N = run.data.train.labels.new_zeros(images, *run.data.train.labels.shape[1:])
        features = None if teacher is None else teacher.eager(inputs)
        step.losses(inputs, labels_N, features)["loss"].backward()  # type: ignore[no-untyped-call]

    return attempt


def _synchronises(run: Run) -> bool:
    return run.ranks.size > 1 and run.recipe.batch_norm == "synchronised"


def _share(run: Run, phase: TrainingPhase) -> Share:
    """What this rank trains of the phase: its part of each batch, or its own sections."""
    objective = phase.objective
    if run.ranks.size == 1 or run.recipe.parallel == "data" or not isinstance(objective, LitSections):
        return Share(phase, run.sections, run.ranks)
    owners = divide(section_flops(run.student, run.sections, run.example), run.ranks)
    own = [name for name in run.sections if owners[name] == run.ranks.rank]
    return Share(replace(phase, objective=objective.only(own)), own, ALONE, owners)


def _over_ranks(run: Run, share: Share, losses: dict[str, float]) -> dict[str, float]:
    """Losses of all ranks: means over their parts of the batches; of divided sections each owner's, and the sum."""
    names = ["loss", *(f"section/{name}" for name in share.owners)] if share.owners else list(losses)
    totals = run.ranks.totals([losses.get(name, 0.0) for name in names])
    return {name: total / share.ranks.size for name, total in zip(names, totals, strict=True)}


def _gather(run: Run, share: Share) -> None:
    """Makes the student that is evaluated of what the ranks have: divided sections are fetched from their owners; batch
    norms that followed each rank's part of the batches get their mean."""
    for name, owner in share.owners.items():
        run.ranks.copy(container(run.student, name).state_dict().values(), owner)
    if not _synchronises(run):
        average_statistics(run.student, share.ranks)


def _validate(run: Run, phase: TrainingPhase, passes: Epochs) -> Score:
    if not phase.objective.needs_chain:
        samples = passes.samples(run.data.train, ESTIMATION_BATCHES)
        estimate_statistics(run.student, run.sections, samples, run.precision)
    return evaluate(run.student, run.data.validation, run.input, run.precision, run.reference)


def _step(run: Run, share: Share) -> Step:
    """The share's step, compiled where the recipe says so or it pays."""
    phase = share.phase
    images = phase.settings.epochs * len(run.data.train) / share.ranks.size
    # Backward takes twice what forward takes.
    flops = 3 * images * forward_flops(run.student, run.example)
    compiled = compiles_step(run.recipe.compile, flops, run.device) and not _synchronises(run)
    tell = fallback(run.recipe.compile, run.progress.note)
    return Step(run.student, phase.objective, share.sections, run.precision, compiled, tell, share.ranks)


def _captures(run: Run) -> bool:
    """Whether steps are captured: on CUDA, where their tensors lie there too. Not yet with several ranks."""
    return run.device.type == "cuda" and run.ranks.size == 1 and (run.cache is None or not run.cache.mapped)


def evaluate(
    module: nn.Module,
    split: Split,
    spec: AnyInput,
    precision: str,
    reference: nn.Module | None = None,
    batch_size: int = 256,
) -> Score:
    """How good a module is on a split, on the module's device. Leaves it in eval mode.

    Args:
        reference: of one that makes images: whose images they are held against. None: accuracy is measured.
    """
    batches = normalised_batches(split, spec, batch_size)
    images = image_of(spec)
    if reference is None or images is None:
        return accuracy(_answers(module, precision), batches)
    each = (batch for batch, _ in batches)
    return fidelity(_answers(reference, precision), _answers(module, precision), each, images)


def _answers(module: nn.Module, precision: str) -> Callable[[Batch], Tensor]:
    module.eval()
    device = next(module.parameters()).device

    @torch.no_grad()
    def run(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return logits_of(forward(module, batch)).float()

    return run


def _optimiser(run: Run, phase: TrainingPhase) -> torch.optim.Optimizer:
    parameters: Iterable[nn.Parameter] = [*run.student.parameters(), *phase.objective.parameters()]
    on_cuda = run.device.type == "cuda"
    # A captured graph has its numbers built in: there the learning rate is a tensor, which the fused update reads.
    rate = torch.tensor(phase.settings.learning_rate, device=run.device) if on_cuda else phase.settings.learning_rate
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if run.recipe.optimiser == "adam":
        return torch.optim.Adam(
            trained, lr=rate, betas=_GENERATORS_BETAS, weight_decay=run.recipe.weight_decay, fused=on_cuda
        )
    return torch.optim.SGD(
        trained,
        lr=rate,
        fused=on_cuda,
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
        "learning_rate": float(optimiser.param_groups[0]["lr"]),
        **losses,
        **run.validation.row("validation"),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
    }
    run.log.write(row)
    run.progress.end(row)
