"""The run: phases, epochs, steps, evaluation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from litdeploy.batch import Batch, forward
from litdeploy.config.spec import AnyInput
from litdeploy.data import Split, normalised_batches
from litdeploy.networks.network import logits_of
from litdeploy.networks.sections import container
from litdeploy.storage.records import Score
from litdeploy.tasks import task_of
from litdeploy.trainer.batchnorm import ESTIMATION_BATCHES, average_statistics, estimate_statistics, synchronised
from litdeploy.trainer.epoch import Epochs
from litdeploy.trainer.faults import guarded
from litdeploy.trainer.live import Live
from litdeploy.trainer.memory import out_of_host_memory, out_of_memory, trial
from litdeploy.trainer.metrics import Row
from litdeploy.trainer.objectives import LitSections, TrainingPhase
from litdeploy.trainer.optimiser import new_optimiser, new_schedule, steps_an_epoch
from litdeploy.trainer.parallel import ALONE, divide
from litdeploy.trainer.plan import compiles_step, fallback, forward_flops, section_flops
from litdeploy.trainer.run import Run, Share
from litdeploy.trainer.state import checkpoint, due, put_back, rebuild
from litdeploy.trainer.step import Step
from litdeploy.trainer.watch import Watch


def fit(run: Run) -> None:
    """Trains the student through all phases, from where the run is.

    Of several ranks, all have the same student when a phase begins; in the end the first one has it whole.

    Raises:
        TrainingError: a loss is no longer a finite number or diverges, memory does not suffice, or a rank was lost.
        DataError: an image that cannot be decoded, or a worker process that died.
        BundleError: a checkpoint cannot be written.
        KeyboardInterrupt: the user's wish; there is a checkpoint.
    """
    with run.interruption.held(), _seeded(run):
        if run.saved is not None:
            rebuild(run)
        for number, phase in enumerate(run.phases):
            if number > run.position.phase:
                run.position.enter(number)
            if number == run.position.phase and run.position.epoch < phase.settings.epochs:
                _fit_phase(run, phase)
        if run.saved is not None:
            put_back(run, None)


@contextmanager
def _seeded(run: Run) -> Iterator[None]:
    """What layers draw by themselves, as dropout does, follows from the seed; each rank draws otherwise."""
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(run.recipe.seed + run.ranks.rank)
        yield


def _fit_phase(run: Run, phase: TrainingPhase) -> None:
    if run.saved is None:
        run.ranks.copy(run.student.state_dict().values())
        if phase.transition is not None:
            phase.transition.apply(run)
    # Not around the whole run: a transition may replace the student's layers' parameters.
    with synchronised(run.student, run.ranks) if _synchronises(run) else nullcontext():
        _fit_share(run, _share(run, phase))


def _fit_share(run: Run, share: Share) -> None:
    phase = share.phase
    with _step(run, share) as step:
        live = _live(run, share, step)
        if run.saved is not None:
            put_back(run, live)
        elif run.position.steps_done == 0:
            if run.cache is not None and run.cache.mapped:
                checkpoint(run, live)  # of which features were kept before the run
        elif max(run.ranks.totals([float(due(run))])):
            checkpoint(run, live)
        while run.position.epoch < phase.settings.epochs:
            lacking = guarded(run, live, _epoch)
            if lacking == "host":
                raise out_of_host_memory(run.recipe.batch_size)
            if lacking == "device":
                # Raised here and not where it happened: as long as that is handled, it holds the step's memory.
                attempt = None if _synchronises(run) else trial(run, share, step, live.passes.teacher)
                del live
                raise out_of_memory(run.recipe.batch_size, attempt, run.device)


def _epoch(run: Run, live: Live) -> None:
    """An epoch, or what is left of the one that the run is in."""
    position, phase = run.position, live.share.phase
    run.progress.begin(phase.name, position.epochs_done + 1, run.epochs, len(run.data.train))
    run.progress.advance(position.step * run.recipe.batch_size)
    _train_epoch(run, live)
    _gather(run, live.share)
    # Of several ranks, one would stop and the others wait for it.
    with run.interruption.released() if run.ranks.size == 1 else nullcontext():
        position.validation = run.ranks.on_first(_validate, run, phase, live.passes)
    live.passes.step.prepare()
    _record(run, live)
    # Between two phases there is none: optimiser and schedule are one phase's. The next one writes it as it begins.
    between = position.epoch == phase.settings.epochs and not run.trained
    if not between and max(run.ranks.totals([float(due(run))])):
        checkpoint(run, live)


def _train_epoch(run: Run, live: Live) -> None:
    """The epoch's steps. Their losses stay on the device, and are looked at every now and then."""
    position, alone = run.position, run.ranks.size == 1
    clock = time.perf_counter() - position.seconds
    for losses in live.passes.run(run.data.train, position.step):
        live.schedule.step()
        live.watch.add(losses)
        position.count_step(run.recipe.batch_size)
        run.progress.advance(run.recipe.batch_size)
        if live.watch.full or (alone and (run.interruption.asked or due(run))):
            stop, write = live.watch.look(run.interruption.asked, due(run))
            position.seconds = time.perf_counter() - clock
            if stop:
                raise KeyboardInterrupt  # `guarded` writes a checkpoint
            if write:
                checkpoint(run, live)
    (stop,) = live.watch.look(run.interruption.asked)
    position.seconds = time.perf_counter() - clock
    if stop:
        raise KeyboardInterrupt


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


def _gather(run: Run, share: Share) -> None:
    """Makes the student that is evaluated of what the ranks have: divided sections are fetched from their owners; batch
    norms that followed each rank's part of the batches get their mean."""
    for name, owner in share.owners.items():
        run.ranks.copy(container(run.student, name).state_dict().values(), owner)
    if not _synchronises(run):
        average_statistics(run.student, share.ranks)


def _live(run: Run, share: Share, step: Step) -> Live:
    phase = share.phase
    optimiser = new_optimiser(run, phase)
    schedule = new_schedule(optimiser, phase.settings, steps_an_epoch(run.data.train, run.recipe.batch_size))
    teacher = run.teacher if phase.objective.needs_teacher else None
    cache = run.cache if teacher is not None else None
    passes = Epochs(
        step, teacher, cache, optimiser, run.input, run.recipe, run.order, run.draws, _captures(run), share.ranks
    )
    return Live(share, optimiser, schedule, passes, Watch(run, share, optimiser))


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
    original = None if reference is None else _answers(reference, precision)
    score: Score = task_of(spec).evaluate(_answers(module, precision), batches, spec, original)
    return score


def _answers(module: nn.Module, precision: str) -> Callable[[Batch], Tensor]:
    module.eval()
    device = next(module.parameters()).device

    @torch.no_grad()
    def run(batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return logits_of(forward(module, batch)).float()

    return run


def _record(run: Run, live: Live) -> None:
    """The epoch is over: its line in the metrics, and the position at the next one's begin."""
    position, recipe = run.position, run.recipe
    assert position.validation is not None
    steps = steps_an_epoch(run.data.train, recipe.batch_size)
    row: Row = {
        "phase": live.share.phase.name,
        "epoch": position.epochs_done + 1,
        "epochs": run.epochs,
        "learning_rate": float(live.optimiser.param_groups[0]["lr"]),
        **{name: total / steps for name, total in position.sums.items()},
        **position.validation.row("validation"),
        "seconds": round(position.seconds, 3),
        "images_per_second": round(steps * recipe.batch_size / position.seconds, 1),
    }
    position.end_epoch(row)
    live.passes.settle()
    run.log.write(row)
    run.progress.end(row)
